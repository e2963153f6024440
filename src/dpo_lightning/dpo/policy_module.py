"""The models of a DPO run: loads policy and reference, keeps them on one device, shards and saves them.

`DPOModule` is a `PolicyModule` with a loss, a step and an optimizer.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dpo_lightning.data.batching import PairBatch
from dpo_lightning.data.columns import numeric_column
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.loaders import LengthGroupedBatchSampler
from dpo_lightning.dpo.cached_reference import sees_pairs_again
from dpo_lightning.dpo.half_precision import AUTOCAST, keep_float32
from dpo_lightning.dpo.logps import PairLogps, Scoring, compute_pair_logps, pair_logps
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.dpo.reference import FIXED, FrozenCopy, MovingReference, Reference, Start, find_reference, moving
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import attached_trainer
from dpo_lightning.internals.torch import keep_few_kernels
from dpo_lightning.internals.transformers import attention_in_use
from dpo_lightning.models.hardware import fastest_attention, packing_is_faster
from dpo_lightning.models.hub import first_line
from dpo_lightning.models.policy import assert_no_dropout, load_config, load_policy, position_count, without_adapter
from dpo_lightning.models.sharding import data_parallel_mesh, shard
from dpo_lightning.storage.digests import weights_digest
from dpo_lightning.storage.trust import TRUST
from dpo_lightning.visible import one_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class PolicyModule(LightningModule):
    """A policy that trains and the reference it is compared with, which only a checkpoint of a moving one contains.

    Its hyperparameters are those of `DPOModule` that decide how both are made.
    """

    loss: PreferenceLoss

    def __init__(self) -> None:
        super().__init__()
        keep_few_kernels()  # before anything is computed
        self.policy: PreTrainedModel | PeftModel = None
        self.reference: Reference | None = None
        self.scoring: Scoring | None = None  # decided on the first batch
        self.loaded_attention: str | None = None  # of the policy before any packing, which replaces it
        self.start_digest: str | None = None  # of the weights that a fit starts from
        self.strict_loading = False  # a LoRA checkpoint holds the adapter alone; load_state_dict checks instead
        self._untrained = True  # the policy's weights are still those it was loaded with
        self._validated: dict[int, tuple[Any, Tensor]] = {}  # of this fit, by batch index: data and reference log-probs

    @property
    def data(self) -> PreferenceDataModule | None:
        """The data module of the current run, None if the batches come from elsewhere."""
        trainer = attached_trainer(self)
        data = trainer and trainer.datamodule
        return data if isinstance(data, PreferenceDataModule) else None

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The policy as a plain causal LM of transformers, adapters injected."""
        return without_adapter(self.policy)

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is a frozen model under a peft adapter."""
        return self.policy is not self.causal_lm

    @property
    def size(self) -> str:
        """The number of parameters, and how many are trained: "124.4 million parameters, all trained"."""
        count, trained = (self.causal_lm.num_parameters(only_trainable=only) for only in (False, True))
        share = "all" if count == trained else f"{100 * trained / count:.2g} %"
        return f"{count / 1e6:.4g} million parameters, {share} trained{' (LoRA)' if self.hparams.lora else ''}"

    @property
    def moving_reference(self) -> MovingReference:
        """The reference of a run with `sync_ref_model`."""
        assert isinstance(self.reference, MovingReference)
        return self.reference

    # ------------------------------------------------------------------ load

    def configure_model(self) -> None:
        """Loads the policy and makes its reference; Lightning calls it before any training and any checkpoint.

        Raises:
            UserError: the model cannot be loaded, still has dropout, or has fewer positions than `data.max_length`.
        """
        first_call = self.policy is None
        if first_call:
            self.policy = self.load_policy()
            self.loaded_attention = attention_in_use(self.causal_lm)
            assert_no_dropout(self.policy)
            self._check_data()
            if attached_trainer(self):
                rank_zero_info(f"model: {one_line(self.hparams.name_or_path)}, {self.size}")
        self._record_start()  # before a checkpoint's weights replace these, and before they are sharded
        # With cached log-probs a full fine-tune needs no second model, except for `kl`; an adapter's takes no memory.
        online = self.has_adapter or self.loss.needs_kl or not self.reference_is_cached
        if self.loss.needs_reference and self.reference is None and online:
            self.reference = self.make_reference()
        if first_call and self.device_mesh is not None:
            self._shard()

    def _record_start(self) -> None:
        """Digests the weights that a fit starts from. A new adapter is no part of them, nor of the reference."""
        trainer = attached_trainer(self)
        if self.start_digest is not None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        model = without_adapter(self.policy if self._untrained else self.load_policy())
        new_adapter = self.hparams.lora is not None
        self.start_digest = weights_digest(model, leave_out=lambda name: new_adapter and "lora_" in name)

    @property
    def reference_is_cached(self) -> bool:
        """Whether the current fit reads its reference log-probs from a cache.

        Raises:
            UserError: it is asked to, but the policy is sharded.
        """
        choice, sharded, trainer = self.hparams.reference, self.device_mesh is not None, attached_trainer(self)
        if choice == "cached" and sharded:
            raise UserError("model.reference: cached cannot be filled from a sharded policy; set it to online")
        if sharded or not self.loss.needs_reference or self.hparams.sync_ref_model or choice not in (None, "cached"):
            return False
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self.data is None:
            return False
        return choice == "cached" or sees_pairs_again(trainer, self.data)

    def load_policy(self, **changes: Any) -> "PreTrainedModel | PeftModel":
        """Loads the policy as it is before training; `changes` override arguments of `models.policy.load_policy`."""
        settings = {name: self.hparams[name] for name in inspect.signature(load_policy).parameters}
        if self.hparams.attn_implementation in (None, "packed"):
            settings["attn_implementation"] = self._fastest_attention()
        return load_policy(**settings | changes)

    def _fastest_attention(self) -> str | None:
        if self.data is None or "train" not in self.data.datasets:
            return None
        row_length = numeric_column(self.data.datasets["train"], "length").mean()
        return fastest_attention(*self._hardware, row_length)

    @property
    def _hardware(self) -> tuple[str, bool]:
        """The kind of device, and whether it computes in bfloat16."""
        bf16 = self.hparams.dtype == "bfloat16" or self.trainer.precision.startswith("bf16")
        return self.trainer.strategy.root_device.type, bf16

    def make_reference(self) -> Reference:
        """The reference that `model.reference` names, made from the policy as it is before training."""
        policy, trainer = self.policy, attached_trainer(self)
        if not self.has_adapter and not self._untrained:
            policy = self.load_policy().to(self.device)
        # Sharding needs all weights in one dtype.
        autocast = None if trainer is None or self.device_mesh is not None else AUTOCAST.get(trainer.precision)
        make = moving if self.hparams.sync_ref_model else find_reference(self.hparams.reference or "online")
        return make(Start(policy, self.hparams.lora is not None, autocast))

    def _shard(self) -> None:
        mesh = data_parallel_mesh(self.device_mesh)
        shard(self.causal_lm, mesh, compute_pair_logps, self._gathered_dtype)
        if isinstance(self.reference, FrozenCopy):
            shard(self.reference.model, mesh, compute_pair_logps, self._gathered_dtype)
        elif self.reference is not None:
            self.reference = self.make_reference()  # of the sharded adapter

    @property
    def _gathered_dtype(self) -> torch.dtype | None:
        """The dtype that a sharded model's weights of matrix products are gathered in; None for their own."""
        return None if self.device_mesh is None else AUTOCAST.get(self.trainer.precision)

    @functools.cached_property
    def positions(self) -> int | None:
        """The number of positions that the model has, known before it is loaded; None if it has no such limit."""
        if self.policy is not None:
            return position_count(self.causal_lm.config)
        return position_count(load_config(self.hparams.name_or_path, self.hparams.trust_remote_code))

    def _check_data(self) -> None:
        """Raises UserError if the model cannot take the data's lengths or tokens."""
        if self.data is None:
            return
        longest, positions = self.data.max_length, position_count(self.causal_lm.config)
        if positions and longest > positions:
            raise UserError(f"data.max_length is {longest}, but this model has {positions} positions: lower it to that")
        self.data.check_vocabulary(self.causal_lm.get_input_embeddings().num_embeddings, self.hparams.name_or_path)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "PolicyModule":
        # The reference is no submodule, which keeps it out of checkpoints, so it has to be moved along.
        if self.reference is not None:
            self.reference.apply(fn)
        adapter, in_float32 = self._adapter_tensors(), keep_float32(fn)
        return super()._apply(lambda tensor: (in_float32 if id(tensor) in adapter else fn)(tensor), *args, **kwargs)

    def _adapter_tensors(self) -> set[int]:
        """Ids of an adapter's weights and gradients, without those of whole layers that are trained beside it."""
        if not self.has_adapter:
            return set()
        weights = [p for name, p in self.policy.named_parameters() if p.requires_grad and "modules_to_save" not in name]
        return {id(tensor) for weight in weights for tensor in (weight, weight.grad)}

    # ------------------------------------------------------------------ score

    def reference_logps(self, batch: PairBatch) -> PairLogps | None:
        """Log-probs under the reference, without gradients: the batch's own if it has them, otherwise computed here.

        None if the loss needs no reference.
        """
        if not self.loss.needs_reference:
            return None
        if batch.reference_logps is not None:
            return PairLogps(batch.reference_logps, batch.sequence, batch.num_pairs)
        assert self.reference is not None
        return self.reference.logps(batch, self.ensure_scoring(batch))

    def with_reference_kept(self, batch: PairBatch, batch_idx: int) -> PairBatch:
        """A validation batch with its reference log-probs, which a fit's first validation computes and keeps.

        Unchanged if they would differ in the next validation, or be of other pairs: for a reference that follows the
        policy or is of a kind that is not ours, and for batches in another order each time.
        """
        pairs = self.data and self.data.datasets.get("val")
        sampler = getattr(self.trainer.val_dataloaders, "sampler", None)
        same_pairs = pairs is not None and isinstance(sampler, LengthGroupedBatchSampler) and not sampler.shuffle
        fixed = type(self.reference) in FIXED and not self.hparams.sync_ref_model
        repeats = self.trainer.state.fn == TrainerFn.FITTING and same_pairs and fixed
        if not repeats or batch.reference_logps is not None:
            return batch
        assert self.reference is not None
        kept = self._validated.get(batch_idx)
        if kept is None or kept[0] is not pairs:
            logps = self.reference.logps(batch, self.ensure_scoring(batch)).token_logps
            kept = self._validated[batch_idx] = (pairs, logps)
        return batch._replace(reference_logps=kept[1])

    @torch.no_grad()
    def batch_kl(self, batch: PairBatch) -> Tensor | None:
        """KL divergence of the policy from the reference in nats, a scalar of at least 0; None if the loss needs none.

        Estimated by the mean log-ratio of all ranks' mismatched completions.
        """
        if not self.loss.needs_kl:
            return None
        assert batch.mismatched is not None, "batches need mismatched pairs: `collate(..., mismatch_length=...)`"
        policy = pair_logps(self.causal_lm, batch.mismatched, self.ensure_scoring(batch))
        reference = self.reference_logps(batch.mismatched)
        assert reference is not None
        sums = torch.stack([(policy.token_logps - reference.token_logps).sum(), (policy.lengths > 0).sum()])
        total, completions = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return (total / completions).clamp(min=0)

    def ensure_scoring(self, batch: PairBatch) -> Scoring:
        """The way to compute this model's log-probs, chosen on the first batch (`choose_scoring`) by all ranks."""
        if self.scoring is not None:
            return self.scoring
        attention = self.hparams.attn_implementation
        may_pack = attention == "packed" or attention is None and packing_is_faster(*self._hardware)
        chosen = choose_scoring(self.causal_lm, batch, may_pack=may_pack, products=self._gathered_dtype)
        scoring = self.trainer.strategy.broadcast(chosen)
        if attention == "packed" and not scoring.packed:
            rank_zero_warn("model.attn_implementation is packed, but this model cannot read packed pairs: not packed")
        if not scoring.shared:
            rank_zero_warn(f"prompts are read twice per pair, which is slower: {scoring.reason}")
        if not scoring.gathered:
            rank_zero_warn(
                "the LM head runs on every position, which is slower: this model's logits are made in its own way"
            )
        self.scoring = scoring
        return scoring

    # ------------------------------------------------------------------ save and restore

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The weights that training changes: all of them, or with LoRA the adapter's."""
        state = super().state_dict(*args, **kwargs)
        parameters = dict(self.named_parameters(remove_duplicate=False))  # a tied head has its weight's name too
        for name in list(state):
            # Under an adapter buffers do not change either, and quantized weights have many.
            if not parameters[name].requires_grad if name in parameters else self.has_adapter:
                del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` returned.

        Raises:
            UserError: a trained weight is missing, unknown to this model, or of another shape.
        """
        self.configure_model()
        self._untrained = False
        expected = set(self.state_dict())
        for what, names in {"lacks": expected - set(state_dict), "has an unknown": set(state_dict) - expected}.items():
            if names:
                raise UserError(
                    f"the checkpoint {what} weight {sorted(names)[0]} ({len(names)} in all): it was written for "
                    "another model or other model.lora settings"
                )
        try:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        except RuntimeError as error:  # whose second line says which weight does not fit
            reason = " ".join(str(error).split("\n")[1:2]).strip() or first_line(error)
            raise UserError(f"the checkpoint's weights do not fit this model: {reason}") from error

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "PolicyModule":
        """Like Lightning's, but a file never decides which code runs: `trust_remote_code` has to be given here.

        Without `_instantiator` no LightningCLI parser makes the module, which would import any class the file names.
        """
        return super().load_from_checkpoint(*args, **{TRUST: False, "_instantiator": None} | kwargs)
