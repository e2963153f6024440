"""Where reference log-probs come from: a frozen copy of the policy, or the policy with its adapter switched off."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Reference(Protocol):
    """Log-probs under the model that the policy started from, without gradients."""

    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """As `pair_logps`, of the reference."""
        ...

    def apply(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Follows the module to another device or dtype."""
        ...


class FrozenCopy:
    """A copy of the policy as it is now. It belongs to no module, so no checkpoint and no optimizer sees it.

    Args:
        autocast_dtype: what matrix products are computed in, in mixed precision. The weights of linear layers are
            then kept in it: the same products with half the memory, and no conversion at every batch.
    """

    def __init__(self, policy: "PreTrainedModel", autocast_dtype: torch.dtype | None = None) -> None:
        self.model = copy.deepcopy(policy).requires_grad_(False).eval()
        self.autocast_dtype = autocast_dtype
        if autocast_dtype is not None:
            for weight in _product_weights(self.model):
                weight.data = weight.data.to(autocast_dtype)

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """As `pair_logps`, of the copy."""
        dtype, device = self.autocast_dtype, batch.input_ids.device.type
        with nullcontext() if dtype is None else torch.autocast(device, dtype):
            return pair_logps(self.model, batch, scoring)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follows the module to another device or dtype."""
        self.model._apply(function)


def _product_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights that nothing but a linear layer's product reads: not those that are embeddings too, nor biases."""
    from transformers.pytorch_utils import Conv1D

    looked_up = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    linear = [layer.weight for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)]
    return [weight for weight in linear if id(weight) not in looked_up]


class AdapterOff:
    """The policy with its LoRA adapter switched off: exactly the base model, and no second copy in memory."""

    def __init__(self, policy: "PeftModel") -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """As `pair_logps`, of the base model."""
        with self.policy.disable_adapter():
            return pair_logps(self.policy.get_base_model(), batch, scoring)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing of its own to move."""
