"""The load-balancing loss of a mixture of experts, if the model's config asks for one."""

from typing import TYPE_CHECKING

from torch import Tensor

from dpo_lightning.internals.transformers import load_balancing_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import ModelOutput


def set_router_loss(config: "PretrainedConfig", coefficient: float | None) -> None:
    """Sets the weight of the load-balancing loss in a config; 0 switches it off, None changes nothing.

    Raises:
        ValueError: the model has no router.
    """
    if coefficient is None:
        return
    if not hasattr(config, "router_aux_loss_coef"):
        raise ValueError(f"a model of type '{config.model_type}' has no router: leave model.router_aux_loss_coef out")
    config.router_aux_loss_coef, config.output_router_logits = coefficient, coefficient > 0


def router_loss(model: "PreTrainedModel", output: "ModelOutput", real: Tensor) -> Tensor | None:
    """Load-balancing loss (Switch Transformers, Fedus et al. 2021, equations 4 to 6) with the config's weight.

    Args:
        output: of the model or of its base model.
        real: [rows, T] bool, False at padding. A shared prompt counts once.

    Returns:
        A float32 scalar; None if the model has no router, or its config does not ask for the loss.
    """
    if not getattr(model.config, "output_router_logits", False) or not hasattr(model, "router_aux_loss_coef"):
        return None
    balance = load_balancing_loss(output.router_logits, model.num_experts, model.num_experts_per_tok, real)
    return model.router_aux_loss_coef * balance
