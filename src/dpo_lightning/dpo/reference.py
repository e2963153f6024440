"""Where reference log-probs come from, by the name that `model.reference` gives.

To add a kind of reference, write one function with `@reference("its name")` that takes a `Start` and returns a
`Reference`. Users name their own without any change here: `model.reference: my_module:my_function`.

A reference that follows the policy (TR-DPO, Gorbatovski et al. 2024, equations 3 and 4) is updated every few steps:
`reference <- alpha * policy + (1 - alpha) * reference`.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.dpo.half_precision import keep_float32
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.internals.torch import convert, copy_all, lerp_all
from dpo_lightning.models.sharding import gathered, placed_like, shard_of
from dpo_lightning.worker import imported_function

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Reference(Protocol):
    """Log-probs under the model that the policy started from, without gradients."""

    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """Like `pair_logps`, under the reference."""
        ...

    def apply(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Moves or converts the reference's own tensors, as `Module._apply` does the module's."""
        ...


class Start(NamedTuple):
    """What a reference is made from, before the first optimizer step."""

    policy: "PreTrainedModel | PeftModel"  # with the weights that training starts from
    new_adapter: bool  # the policy has a LoRA adapter whose output is still 0
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
    """The function registered under a name. Nothing is imported, since the name may come from a checkpoint.

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
    """Imports and registers a user's function, named `package.module:function`.

    Raises:
        UserError: it cannot be imported.
    """
    REFERENCES[name] = imported_function(name, "model.reference")


def check_reference(name: str | None, moves: bool, needed: bool) -> None:
    """Checks `model.reference` together with the settings that it depends on.

    Args:
        moves: `model.sync_ref_model`.
        needed: the loss compares with a reference.

    Raises:
        UserError: the kind is unknown or contradicts the other settings.
    """
    if name is not None:
        find_reference(name)
    if moves and not needed:
        raise UserError("model.sync_ref_model moves a reference, but this model.loss_type has none: leave it out")
    if name not in (None, "online") and (moves or not needed):
        why = "model.sync_ref_model moves it" if moves else "this model.loss_type has no reference"
        raise UserError(f"model.reference is {name}, but {why}: leave it out")


# ---------------------------------------------------------------------- kinds


@reference("cached")  # the same model, but scored once (`cached_reference`)
@reference("online")
def frozen(start: Start) -> Reference:
    """The policy with the weights that training starts from."""
    if not hasattr(start.policy, "disable_adapter"):
        return FrozenCopy(start.policy, start.autocast_dtype)
    return AdapterOff(start.policy) if start.new_adapter else AdapterCopy(start.policy)


def moving(start: Start) -> "MovingReference":
    """A reference that follows the policy (`model.sync_ref_model`)."""
    return AdapterCopy(start.policy) if hasattr(start.policy, "disable_adapter") else MovingCopy(start.policy)


# ---------------------------------------------------------------------- copies and switches


class FrozenCopy:
    """A copy of the policy. It belongs to no module, which keeps it out of checkpoints and optimizers.

    Args:
        autocast_dtype: dtype of matrix products in mixed precision. Weights of linear layers are kept in it, for the
            same products with half the memory and without a conversion in every batch.
    """

    def __init__(self, policy: "PreTrainedModel", autocast_dtype: torch.dtype | None = None) -> None:
        self.model = copy.deepcopy(policy).requires_grad_(False).eval()
        self.autocast_dtype = autocast_dtype
        if autocast_dtype is not None:
            for weight in _product_weights(self.model):
                weight.data = weight.data.to(autocast_dtype)

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """Like `pair_logps`, under the copy."""
        dtype, device = self.autocast_dtype, batch.input_ids.device.type
        with nullcontext() if dtype is None else torch.autocast(device, dtype):
            return pair_logps(self.model, batch, scoring)

    def as_model(self) -> AbstractContextManager["PreTrainedModel"]:
        """The copy as a causal LM."""
        return nullcontext(self.model)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts the reference's own tensors, as `Module._apply` does the module's."""
        convert(self.model, function)


def _product_weights(model: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers that are not also embeddings."""
    from transformers.pytorch_utils import Conv1D

    embeddings = {layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)}
    linear = {layer.get_parameter("weight") for layer in model.modules() if type(layer) in (nn.Linear, Conv1D)}
    return linear - embeddings


class AdapterOff:
    """The policy with its LoRA adapter switched off: exactly the base model, without a second copy in memory."""

    def __init__(self, policy: "PeftModel") -> None:
        self.policy = policy

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """Like `pair_logps`, under the base model."""
        with self.as_model() as model:
            return pair_logps(model, batch, scoring)

    @contextmanager
    def as_model(self) -> Iterator["PreTrainedModel"]:
        """The base model, during the block."""
        with self.policy.disable_adapter():
            yield self.policy.get_base_model()

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Does nothing: the policy's module moves the weights."""


class AdapterCopy:
    """The policy with a copy of its adapter: one model in memory, and the adapter's weights twice.

    Keeps what an SFT adapter was before preference training. With a new adapter (whose output is 0) it starts as the
    base model.
    """

    def __init__(self, policy: "PeftModel") -> None:
        self.policy = policy
        self.weights = {name: weight.detach().clone() for name, weight in trained_weights(policy).items()}

    @torch.no_grad()
    def logps(self, batch: PairBatch, scoring: Scoring) -> PairLogps:
        """Like `pair_logps`, under the model with the copied adapter."""
        with self.as_model() as model:
            return pair_logps(model, batch, scoring)

    @contextmanager
    def as_model(self) -> Iterator["PreTrainedModel"]:
        """The model with the copied adapter, during the block."""
        # Through `.data`, so that autograd does not object in the policy's backward pass.
        weights = [shard_of(weight.data) for weight in trained_weights(self.policy).values()]
        kept = [weight.clone() for weight in weights]
        copy_all(weights, [shard_of(weight) for weight in self.weights.values()])
        try:
            yield self.policy.get_base_model()
        finally:
            copy_all(weights, kept)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves the copy, which stays in float32 like the policy's own adapter."""
        self.weights = {name: keep_float32(function)(weight) for name, weight in self.weights.items()}


class MovingCopy(FrozenCopy):
    """A copy of the policy that can be updated from it."""

    def __init__(self, policy: "PreTrainedModel") -> None:
        super().__init__(policy)
        self._moving = list(trained_weights(policy))

    @property
    def weights(self) -> dict[str, Tensor]:
        """The copy's weights whose counterparts in the policy train."""
        weights = dict(self.model.named_parameters())
        return {name: weights[name] for name in self._moving}


MovingReference = AdapterCopy | MovingCopy
FIXED = (FrozenCopy, AdapterOff, AdapterCopy)  # which never change, unless `sync_ref_model` moves them


def trained_weights(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the policy that train, by name."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}


# ---------------------------------------------------------------------- updates from the policy


@torch.no_grad()
def move(reference: MovingReference, policy: nn.Module, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, weight by weight.

    Of a LoRA adapter the two factors are mixed separately, which for alpha < 1 is not exactly the mixture of their
    products.
    """
    trained = trained_weights(policy)
    lerp_all(
        [shard_of(weight) for weight in reference.weights.values()],
        [shard_of(trained[name].data) for name in reference.weights],
        alpha,
    )


def weights_to_save(reference: MovingReference) -> dict[str, Tensor]:
    """The reference's weights for a checkpoint, gathered if they are sharded. To be called on all ranks."""
    return {name: gathered(weight.detach()) for name, weight in reference.weights.items()}


@torch.no_grad()
def load_weights(reference: MovingReference, saved: Mapping[str, Tensor]) -> None:
    """Loads what `weights_to_save` returned."""
    for name, weight in reference.weights.items():
        weight.copy_(placed_like(saved[name], weight))
