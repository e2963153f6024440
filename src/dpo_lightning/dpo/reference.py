"""Where reference log-probs come from, by the name that `model.reference` gives.

A new kind of reference is one function with `@reference("its name")`: it takes a `Start` and gives a `Reference`. A
user's own needs no change here: `model.reference: my_module:my_function`.

A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, equations 3 and 4) is moved every few steps,
`reference <- alpha * policy + (1 - alpha) * reference`: softly with alpha < 1, entirely with alpha = 1.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.dpo.half_precision import full
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.models.sharding import gathered, placed_like, shard_of
from dpo_lightning.parsing import imported_function

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


class Start(NamedTuple):
    """What a reference is made from, before the first step."""

    policy: "PreTrainedModel | PeftModel"  # as training begins with it
    new_adapter: bool  # the policy is a base model under a LoRA adapter whose output is still 0
    autocast_dtype: torch.dtype | None  # of matrix products, in mixed precision


MakeReference = Callable[[Start], Reference]
REFERENCES: dict[str, MakeReference] = {}


def reference(name: str) -> Callable[[MakeReference], MakeReference]:
    """Registers a kind of reference under its name in `model.reference`."""

    def register(function: MakeReference) -> MakeReference:
        REFERENCES[name] = function
        return function

    return register


def find_reference(name: str) -> MakeReference:
    """The kind of reference of a name. Nothing is imported: the name may be a checkpoint's.

    Raises:
        UserError: none is registered under it.
    """
    if name not in REFERENCES:
        known = ", ".join(REFERENCES) + did_you_mean(name, REFERENCES)
        raise UserError(
            f"model.reference is '{name}': it must be one of {known}, or a function that your own settings "
            "name (my_module:my_function)"
        )
    return REFERENCES[name]


def import_reference(name: str) -> None:
    """Registers a function of the user's own, named `package.module:function`, under that name.

    Raises:
        UserError: it cannot be imported.
    """
    REFERENCES[name] = imported_function(name, "model.reference")


def check_reference(name: str | None, moves: bool, needed: bool) -> None:
    """Checks `model.reference` together with what else decides over the reference.

    Args:
        moves: `model.sync_ref_model`.
        needed: the loss compares with a reference.

    Raises:
        UserError: an unknown kind, or one that these do not go with.
    """
    if name is not None:
        find_reference(name)
    if moves and not needed:
        raise UserError("model.sync_ref_model moves a reference, but this model.loss_type has none: leave it out")
    if name not in (None, "online") and (moves or not needed):
        why = "model.sync_ref_model moves it" if moves else "this model.loss_type has no reference"
        raise UserError(f"model.reference is {name}, but {why}: leave it out")


# ---------------------------------------------------------------------- kinds


@reference("cached")  # the same, scored once and kept on disk
@reference("online")
def frozen(start: Start) -> Reference:
    """The policy as training begins with it."""
    if not hasattr(start.policy, "disable_adapter"):
        return FrozenCopy(start.policy, start.autocast_dtype)
    return AdapterOff(start.policy) if start.new_adapter else AdapterCopy(start.policy)


def moving(start: Start) -> "MovingReference":
    """The same, free to follow the policy (`model.sync_ref_model`)."""
    return AdapterCopy(start.policy) if hasattr(start.policy, "disable_adapter") else MovingCopy(start.policy)


# ---------------------------------------------------------------------- copies and switches


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


# ---------------------------------------------------------------------- moving


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
    return {name: gathered(weight.detach()) for name, weight in reference.weights.items()}


@torch.no_grad()
def load_weights(reference: MovingReference, saved: Mapping[str, Tensor]) -> None:
    """Loads what `weights_to_save` gave."""
    for name, weight in reference.weights.items():
        weight.copy_(placed_like(saved[name], weight))
