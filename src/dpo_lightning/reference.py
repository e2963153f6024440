"""Where reference log-probs come from: a frozen copy of the policy, or the policy with its adapter switched off."""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dpo_lightning.batching import PairBatch
from dpo_lightning.logps import PairLogps, Scoring, pair_logps

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
    """A copy of the policy as it is now. It belongs to no module, so no checkpoint and no optimizer sees it."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        self.model = copy.deepcopy(policy).requires_grad_(False).eval()

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """As `pair_logps`, of the copy."""
        return pair_logps(self.model, batch, scoring)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follows the module to another device or dtype."""
        self.model._apply(function)


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
