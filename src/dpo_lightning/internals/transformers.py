"""What we use of transformers beyond its documented interface."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def attention_in_use(model: "PreTrainedModel") -> str:
    """The attention that a model computes with: "eager", "sdpa", ...

    Uses `config._attn_implementation`: `attn_implementation` is only an argument of `from_pretrained`.
    """
    return model.config._attn_implementation


def hub_revision(config: "PretrainedConfig") -> str | None:
    """The commit that a config was downloaded at, None of a local folder.

    Uses `config._commit_hash`: no other part of a loaded model tells.
    """
    return config._commit_hash


def block_classes(model: "PreTrainedModel") -> set[str]:
    """Names of the classes of a model's blocks, its units of sharding; empty where it names none.

    Uses `_no_split_modules`, as accelerate's FSDP wrapping does.
    """
    return set(model._no_split_modules or ())


def load_balancing_loss(router_logits: tuple[Tensor, ...], experts: int, chosen: int, real: Tensor) -> Tensor:
    """Load-balancing loss of all layers' routers, a scalar (Fedus et al. 2021, equations 4 to 6).

    Uses a function of Mixtral's own file, which the other mixtures of experts copy: there is no shared one.

    Args:
        router_logits: of each layer, [tokens, experts].
        chosen: experts per token.
        real: [rows, T] bool, False at padding.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    loss: Any = load_balancing_loss_func(router_logits, experts, chosen, real)
    return loss
