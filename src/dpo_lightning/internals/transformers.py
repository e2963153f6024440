"""What we use of transformers beyond its documented interface."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_in_use(model: "PreTrainedModel") -> str:
    """The attention that a model computes with: "eager", "sdpa", ...

    Uses `config._attn_implementation`: `attn_implementation` is only an argument of `from_pretrained`.
    """
    return model.config._attn_implementation


def hub_commit(name: str) -> str | None:
    """The commit of a hub model whose config has been loaded, None without one.

    Uses the layout of the hub's cache (`snapshots/COMMIT/config.json`): a loaded config no longer has its commit.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent.name if isinstance(config, str) else None


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


def never_run_remote_code() -> None:
    """From now on this process runs no Python code that comes with a model, also where `trust_remote_code` is true.

    Replaces `get_class_in_module`, which all such code is imported by: other programs, such as llama.cpp's converter,
    give `trust_remote_code=True` themselves.
    """
    from transformers import dynamic_module_utils

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("it needs Python code that comes with it, which is not run")

    dynamic_module_utils.get_class_in_module = refuse
