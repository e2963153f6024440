"""References that are the policy's own earlier state: of its adapter alone, or of all its weights, and that may move.

A moving reference (TR-DPO, Gorbatovski et al. 2024, equations 3 and 4) is pulled after the policy every few steps,
`reference <- alpha * policy + (1 - alpha) * reference`: softly with alpha < 1, entirely with alpha = 1.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.dpo.half_precision import full
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps
from dpo_lightning.dpo.reference import FrozenCopy
from dpo_lightning.models.sharding import placed_like, shard_of, whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class AdapterCopy:
    """The policy with its adapter as it is now: one model in memory, and the adapter's weights twice.

    What an SFT adapter was when preference training began, or with a new adapter (whose output is 0) the base model.
    """

    def __init__(self, policy: "PeftModel") -> None:
        self.policy = policy
        self.weights = {name: weight.detach().clone() for name, weight in trained_weights(policy).items()}

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """As `pair_logps`, of the model with the kept adapter."""
        with self._swapped_in():
            return pair_logps(self.policy.get_base_model(), batch, scoring)

    @contextmanager
    def _swapped_in(self) -> Iterator[None]:
        # Through `.data`: a forward pass of the policy whose backward is still to come must not see a change.
        weights = [shard_of(weight.data) for weight in trained_weights(self.policy).values()]
        kept = [weight.clone() for weight in weights]
        torch._foreach_copy_(weights, [shard_of(weight) for weight in self.weights.values()])
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Follows the module to another device; as the policy's own adapter, it stays out of 16 bits."""
        self.weights = {name: full(function)(weight) for name, weight in self.weights.items()}


class MovingCopy(FrozenCopy):
    """A copy of the policy that can follow it."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__(policy)
        self._moving = list(trained_weights(policy))

    @property
    def weights(self) -> dict[str, Tensor]:
        """Those of the copy that the policy trains."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name] for name in self._moving}


MovingReference = AdapterCopy | MovingCopy


def trained_weights(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The policy's weights that training changes, by name."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


@torch.no_grad()
def move(reference: MovingReference, policy: nn.Module, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, weight by weight.

    Of an adapter the two factors are mixed, each for itself: for alpha = 1 that is the policy, in between it is not
    exactly the mixture of the two products.
    """
    trained = trained_weights(policy)
    pairs = [(shard_of(weight), shard_of(trained[name].data)) for name, weight in reference.weights.items()]
    torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), alpha)


def weights_to_save(reference: MovingReference) -> dict[str, Tensor]:
    """A reference's weights for a checkpoint, gathered where they are sharded. To be called on all ranks."""
    return {name: whole(weight.detach()) for name, weight in reference.weights.items()}


@torch.no_grad()
def load_weights(reference: MovingReference, saved: Mapping[str, Tensor]) -> None:
    """Loads what `weights_to_save` gave."""
    for name, weight in reference.weights.items():
        weight.copy_(placed_like(saved[name], weight))
