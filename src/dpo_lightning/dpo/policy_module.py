"""The models of a DPO run: policy and reference loaded, kept on one device, sharded, and saved.

`DPOModule` is a `PolicyModule` with a loss, a step and an optimizer.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.data.columns import numeric_column
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.cached_reference import is_cached
from dpo_lightning.dpo.half_precision import AUTOCAST, full
from dpo_lightning.dpo.logps import PairLogps, Scoring, compute_pair_logps
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.dpo.reference import FrozenCopy, Reference, Start, find_reference, moving
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.errors import UserError
from dpo_lightning.models.hardware import fastest_attention
from dpo_lightning.models.hub import first_line
from dpo_lightning.models.policy import assert_no_dropout, load_config, load_policy, position_count
from dpo_lightning.models.sharding import data_parallel_mesh, shard
from dpo_lightning.storage.digests import weights_digest
from dpo_lightning.storage.trust import TRUST

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PolicyModule(LightningModule):
    """A policy that trains, and the reference it is compared with, which is in a checkpoint only where it moves.

    Its hyperparameters are those of `DPOModule` that say how both are made.
    """

    loss: PreferenceLoss

    def __init__(self) -> None:
        super().__init__()
        self.policy: nn.Module | None = None
        self.reference: Reference | None = None
        self.scoring: Scoring | None = None  # how log-probs are computed
        self.start_digest: str | None = None  # of the weights that a fit starts from
        self.strict_loading = False  # a LoRA checkpoint holds the adapter alone; load_state_dict checks instead
        self._untrained = True  # the policy is still what it started from

    @property
    def data(self) -> PreferenceDataModule | None:
        """What describes the batches of the present run; None where they come from elsewhere."""
        data = self._trainer and self._trainer.datamodule
        return data if isinstance(data, PreferenceDataModule) else None

    # ------------------------------------------------------------------ load

    def configure_model(self) -> None:
        """Loads the policy and makes the reference from it, before any training and any checkpoint.

        Raises:
            UserError: the model cannot be loaded, still has dropout, or has fewer positions than `data.max_length`.
        """
        if self.policy is None:
            self.policy = self.load_policy()
            assert_no_dropout(self.policy)
            self._check_data()
            self._note_start()  # before a checkpoint's weights take their place, and before they are sharded
            if self.loss.needs_reference:
                self._ready_reference()
            if self.device_mesh is not None:
                self._shard()
            return
        self._note_start()
        if self.loss.needs_reference and self.reference is None and not self.reference_is_cached:
            self.reference = self.make_reference()

    def _note_start(self) -> None:
        """Of a fit: which weights it starts from, a new adapter's left out, which are no part of the reference."""
        if self.start_digest is not None or self._trainer is None or self._trainer.state.fn != "fit":
            return
        model, new = self.policy if self._untrained else self.load_policy(), self.hparams.lora is not None
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.start_digest = weights_digest(model, leave_out=lambda name: new and "lora_" in name)

    def _ready_reference(self) -> None:
        """Of a full fine-tune no copy is made where all that it is wanted for is in a cache."""
        if self.policy is not self.causal_lm or not self.reference_is_cached:
            self.reference = self.make_reference()

    @property
    def reference_is_cached(self) -> bool:
        """Whether the reference log-probs of the present fit come from a cache."""
        if self.hparams.reference == "cached" and self.device_mesh is not None:
            raise UserError("model.reference: cached cannot be filled from a sharded policy; set it to online")
        kept = self.hparams.reference in (None, "cached") and not self.hparams.sync_ref_model
        return (
            kept
            and self.loss.needs_reference
            and self.device_mesh is None
            and is_cached(self.hparams.reference, self._trainer)
        )

    def load_policy(self, **changes: Any) -> "PreTrainedModel | PeftModel":
        """The policy as it was before training, loaded anew; `changes` are settings of `policy.load_policy`."""
        settings = {name: self.hparams[name] for name in inspect.signature(load_policy).parameters}
        settings["attn_implementation"] = self.hparams.attn_implementation or self._fastest_attention()
        return load_policy(**settings | changes)

    def _fastest_attention(self) -> str | None:
        if self.data is None or "train" not in self.data.datasets:
            return None
        bf16 = self.hparams.dtype == "bfloat16" or self.trainer.precision.startswith("bf16")
        row_length = numeric_column(self.data.datasets["train"], "length").mean()
        return fastest_attention(self.trainer.strategy.root_device.type, bf16, row_length)

    def make_reference(self) -> Reference:
        """The kind of reference that is set, of the policy as it was before training."""
        policy = self.policy
        if policy is self.causal_lm and not self._untrained:
            policy = self.load_policy().to(self.device)
        # A sharded model wants all its weights in one dtype.
        autocast = None if self.device_mesh is not None else AUTOCAST.get(self._trainer and self._trainer.precision)
        make = moving if self.hparams.sync_ref_model else find_reference(self.hparams.reference or "online")
        return make(Start(policy, self.hparams.lora is not None, autocast))

    def _shard(self) -> None:
        mesh = data_parallel_mesh(self.device_mesh)
        shard(self.causal_lm, mesh, compute_pair_logps)
        if isinstance(self.reference, FrozenCopy):
            shard(self.reference.model, mesh, compute_pair_logps)
        elif self.reference is not None:
            self.reference = self.make_reference()  # of the sharded adapter

    @functools.cached_property
    def positions(self) -> int | None:
        """How many positions the model has, known before it is loaded; None where it does not number them."""
        if self.policy is not None:
            return position_count(self.causal_lm.config)
        return position_count(load_config(self.hparams.name_or_path, self.hparams.trust_remote_code))

    def _check_data(self) -> None:
        """Raises UserError where the model cannot take the data's lengths or tokens."""
        if self.data is None:
            return
        longest, positions = self.data.max_length, position_count(self.causal_lm.config)
        if positions and longest > positions:
            raise UserError(f"data.max_length is {longest}, but this model has {positions} positions: lower it to that")
        self.data.check_vocabulary(self.causal_lm.get_input_embeddings().num_embeddings, self.hparams.name_or_path)

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The policy as a plain causal LM of transformers, adapters injected."""
        return self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "PolicyModule":
        # The reference is no submodule (so that it is in no checkpoint), but it must follow to the device.
        if self.reference is not None:
            self.reference.apply(fn)
        adapter, in_full = self._adapter_tensors(), full(fn)
        return super()._apply(lambda tensor: (in_full if id(tensor) in adapter else fn)(tensor), *args, **kwargs)

    def _adapter_tensors(self) -> set[int]:
        """Ids of an adapter's weights and gradients, not of whole layers that are trained beside it."""
        if self.policy is None or self.policy is self.causal_lm:
            return set()
        weights = [p for name, p in self.policy.named_parameters() if p.requires_grad and "modules_to_save" not in name]
        return {id(tensor) for weight in weights for tensor in (weight, weight.grad)}

    # ------------------------------------------------------------------ score

    def reference_logps(self, batch: PairBatch) -> PairLogps | None:
        """Log-probs under the reference, without gradients: those that come with the batch, or else computed now.

        None where the loss needs no reference.
        """
        if not self.loss.needs_reference:
            return None
        if batch.reference_logps is not None:
            return PairLogps(batch.reference_logps, batch.sequence, batch.num_pairs)
        return self.reference.logps(batch, self.scoring)

    def ensure_scoring(self, batch: PairBatch) -> None:
        """Finds out, once, how this model's log-probs are computed (see `choose_scoring`); on all ranks."""
        if self.scoring is not None:
            return
        scoring = self.trainer.strategy.broadcast(choose_scoring(self.causal_lm, batch))
        if not scoring.shared:
            rank_zero_warn(f"prompts are read twice per pair, which is slower: {scoring.reason}")
        if not scoring.gathered:
            rank_zero_warn(
                "the LM head runs on every position, which is slower: this model's logits are made in its own way"
            )
        self.scoring = scoring

    # ------------------------------------------------------------------ save and restore

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes: all weights, or with LoRA the adapter alone."""
        state = super().state_dict(*args, **kwargs)
        parameters = dict(self.named_parameters(remove_duplicate=False))  # a tied head has its weight's name too
        adapter = self.policy is not None and self.policy is not self.causal_lm
        for name in list(state):
            # Of what lies under an adapter, buffers do not train either: quantized weights have many.
            if not parameters[name].requires_grad if name in parameters else adapter:
                del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave.

        Raises:
            UserError: a trained weight that the checkpoint lacks or that has another shape there, or one that this
                model does not have.
        """
        self.configure_model()
        self._untrained = False
        expected = set(self.state_dict())
        for what, names in {"lacks": expected - set(state_dict), "has an unknown": set(state_dict) - expected}.items():
            if names:
                raise UserError(
                    f"the checkpoint {what} weight {sorted(names)[0]} ({len(names)} in all): it is of another model or "
                    "with other model.lora settings than these"
                )
        try:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # its first line says what was loaded, the second what does not fit
            reason = " ".join(str(error).split("\n")[1:2]).strip() or first_line(error)
            raise UserError(f"the checkpoint's weights do not fit this model: {reason}") from error

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "PolicyModule":
        """As Lightning's, but the file decides over plain values alone, and not over `trust_remote_code`: give it here.

        `_instantiator` would have LightningCLI's parser make the module, which imports any class that a value names.
        """
        return super().load_from_checkpoint(*args, **{TRUST: False, "_instantiator": None} | kwargs)
