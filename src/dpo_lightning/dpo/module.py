"""DPOModule: PairBatch -> loss, with the policy's optimizer, schedule and checkpoint.

The step is the same in training, validation and testing: log-probs of policy and reference, their loss, metrics.
"""

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dpo_lightning.data.asking import KEY as ASKING
from dpo_lightning.data.asking import asking_of
from dpo_lightning.data.batching import PairBatch, PromptBatch
from dpo_lightning.data.columns import numbers
from dpo_lightning.dpo import resume
from dpo_lightning.dpo.cached_reference import add_reference_logps, is_cached
from dpo_lightning.dpo.gradient_scaler import SkippedSteps, gradient_scaler, unscale_before_clipping
from dpo_lightning.dpo.half_precision import check_trained_dtype, full, keep_inputs
from dpo_lightning.dpo.logps import PairLogps, Scoring, compute_pair_logps, pair_logps
from dpo_lightning.dpo.metrics import PairMetrics
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.dpo.reference import AdapterOff, FrozenCopy, Reference
from dpo_lightning.dpo.reference_adapter import AdapterCopy, MovingCopy, load_weights, move, weights_to_save
from dpo_lightning.dpo.schedules import SCHEDULES, rate_at
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.models.hardware import fastest_attention
from dpo_lightning.models.hub import first_line
from dpo_lightning.models.policy import assert_no_dropout, base_model_name, load_config, load_policy, position_count
from dpo_lightning.models.sharding import check_strategy, data_parallel_mesh, shard, whole
from dpo_lightning.storage.digests import weights_digest
from dpo_lightning.storage.states import check_amount
from dpo_lightning.storage.trust import TRUST

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from dpo_lightning.models.generate import Reply

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of products, by the Trainer's precision
CONVERTED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # of weights, by the same
IN_PROGRESS_BAR = {"loss", "rewards/margins", "rewards/accuracies"}


class DPOModule(LightningModule):
    """Direct Preference Optimization of a causal LM against a frozen reference, or none where the loss uses none.

    Args:
        name_or_path: model to train, a hub id or a local folder.
        beta: strength of the KL constraint; smaller lets the policy go further from the reference.
        loss_type: a loss of `dpo_lightning.dpo.losses` or several.
        loss_weights: a weight for each loss; left out, 1 each.
        label_smoothing: share of pairs taken to be labelled wrongly, of the losses that have it (docs/losses.md).
        loss_options: parameters of the chosen losses and f-divergence, LD-DPO, WPO (see `PreferenceLoss`).
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only (not on biases, norms).
        warmup_steps: optimizer steps of linear warm-up; below 1, a share of all steps.
        lr_scheduler_type: after the warm-up, `linear` or `cosine` down to 0, or `constant`.
        reference: `online` scores every batch with the reference too, `cached` scores all pairs once before training
            and keeps the log-probs on disk for later epochs and runs; left out, cached if there is more than one epoch.
        lora: arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, ...); left out, all weights train.
        gradient_checkpointing: less memory for about a third more time.
        attn_implementation: `eager` or `sdpa`; left out, what is faster here (`hardware.fastest_attention`).
        dtype: of the weights in memory; float32 is right for mixed precision. 16 bits only under an adapter.
        quantization: `4bit` or `8bit` weights under an adapter, by bitsandbytes.
        router_aux_loss_coef: weight of a mixture of experts' load-balancing loss; left out, what its config asks for.
        sync_ref_model: let the reference follow the policy (TR-DPO).
        ref_model_mixup_alpha: share of the policy in the reference when it is moved; 1 makes it the policy.
        ref_model_sync_steps: optimizer steps between two moves.
        max_new_tokens: longest reply that `predict` and `test` generate.
        trust_remote_code: run a hub model's own Python code.
    """

    def __init__(
        self,
        name_or_path: str,
        beta: float = 0.1,
        loss_type: str | list[str] = "sigmoid",
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        loss_options: dict[str, Any] | None = None,
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_steps: float = 0.1,
        lr_scheduler_type: str = "linear",
        reference: str | None = None,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        dtype: str = "float32",
        quantization: str | None = None,
        router_aux_loss_coef: float | None = None,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: float = 0.6,
        ref_model_sync_steps: int = 512,
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss = PreferenceLoss(loss_type, loss_weights, beta, label_smoothing, loss_options)
        if lr_scheduler_type not in SCHEDULES:
            known = ", ".join(SCHEDULES) + did_you_mean(lr_scheduler_type, SCHEDULES)
            raise UserError(f"model.lr_scheduler_type '{lr_scheduler_type}' is unknown: one of {known}")
        for name, value in {
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }.items():
            if not value >= 0:
                raise UserError(f"model.{name} is {value}: it must be 0 or more")
        if max_new_tokens < 1:
            raise UserError(f"model.max_new_tokens is {max_new_tokens}: a reply needs at least 1")
        if dtype not in (dtypes := ("float32", "bfloat16", "float16")):
            raise UserError(
                f"model.dtype '{dtype}' is unknown: one of {', '.join(dtypes)}{did_you_mean(dtype, dtypes)}"
            )
        if attn_implementation not in (None, "eager", "sdpa"):
            near = did_you_mean(attn_implementation, ("eager", "sdpa"))
            raise UserError(
                f"model.attn_implementation '{attn_implementation}' cannot be used: one of eager, sdpa{near}"
            )
        if not 0 < ref_model_mixup_alpha <= 1:
            raise UserError(f"model.ref_model_mixup_alpha is {ref_model_mixup_alpha}: it must be above 0 and at most 1")
        if sync_ref_model and not self.loss.needs_reference:
            raise UserError("model.sync_ref_model moves a reference, but this model.loss_type has none: leave it out")
        if ref_model_sync_steps < 1:
            raise UserError(f"model.ref_model_sync_steps is {ref_model_sync_steps}: it must be 1 or more")
        if reference not in (None, "online", "cached"):
            near = did_you_mean(reference, ("online", "cached"))
            raise UserError(f"model.reference '{reference}' is unknown: it is online or cached{near}")
        if reference == "cached" and (sync_ref_model or not self.loss.needs_reference):
            raise UserError(
                "model.reference is cached, but "
                + ("model.sync_ref_model moves it" if sync_ref_model else "this model.loss_type has no reference")
                + ": leave it out"
            )
        alone = not self.loss.needs_reference
        self.train_metrics, self.val_metrics = PairMetrics(alone), PairMetrics(alone, keep_margins=True)
        self.test_metrics = PairMetrics(alone)
        self.policy: nn.Module | None = None
        self.reference: Reference | None = None
        self.start_digest: str | None = None  # of the weights that a fit starts from
        self._untrained = True  # the policy is still what it started from
        self.scoring: Scoring | None = None
        self.strict_loading = False  # a LoRA checkpoint holds the adapter alone; load_state_dict checks instead
        self.grad_norm: Tensor | None = None
        self.skipped = SkippedSteps()
        self.router_loss: Tensor | None = None
        self.metrics_at_step: dict[str, Tensor] = {}  # kept by `resume.note_step`
        self.batches_before: float | None = None  # in an epoch of the run that is gone on with
        self._logged_step = 0
        self._step_began: float | None = None
        self._seconds, self._pairs = 0.0, 0  # of optimizer steps since the last log

    # ------------------------------------------------------------------ models

    def configure_callbacks(self) -> list[Callback]:
        """None; of all hooks Lightning calls this one first, so what cannot work is refused before data are read.

        Raises:
            UserError: a strategy that is not supported, or weights that would be trained in 16 bits.
        """
        check_strategy(self.trainer.strategy)
        keep_inputs(self.trainer)
        h = self.hparams
        adapter = h.lora is not None or base_model_name(h.name_or_path) != h.name_or_path
        if self.trainer.state.fn == TrainerFn.FITTING and not adapter:
            check_trained_dtype([CONVERTED.get(self.trainer.precision, torch.float32), getattr(torch, h.dtype)])
        return []

    def configure_model(self) -> None:
        """Loads the policy and makes the reference from it, before any training and any checkpoint.

        Raises:
            UserError: the model cannot be loaded, still has dropout, or has fewer positions than `data.max_length`.
        """
        if self.policy is None:
            self.policy = self.load_policy()
            assert_no_dropout(self.policy)
            self._check_max_length()
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
        self.start_digest = weights_digest(model, but=lambda name: new and "lora_" in name)

    def _ready_reference(self) -> None:
        """Of a full fine-tune no copy is made where all that it is wanted for is in a cache."""
        if self.policy is not self.causal_lm or not self.reference_is_cached:
            self.reference = self.make_reference()

    @property
    def reference_is_cached(self) -> bool:
        """Whether the reference log-probs of the present fit come from a cache."""
        if self.hparams.reference == "cached" and self.device_mesh is not None:
            raise UserError("model.reference: cached cannot be filled from a sharded policy; set it to online")
        fixed = self.loss.needs_reference and not self.hparams.sync_ref_model and self.device_mesh is None
        return fixed and is_cached(self.hparams.reference, self._trainer)

    def load_policy(self, **changes: Any) -> "PreTrainedModel | PeftModel":
        """The policy as it was before training, loaded anew; `changes` are settings of `policy.load_policy`."""
        settings = {name: self.hparams[name] for name in inspect.signature(load_policy).parameters}
        settings["attn_implementation"] = self.hparams.attn_implementation or self._fastest_attention()
        return load_policy(**settings | changes)

    def _fastest_attention(self) -> str | None:
        trainer = self._trainer
        pairs = getattr(trainer and trainer.datamodule, "datasets", {}).get("train")
        if pairs is None or "length" not in pairs.column_names:
            return None
        bf16 = self.hparams.dtype == "bfloat16" or trainer.precision.startswith("bf16")
        return fastest_attention(trainer.strategy.root_device.type, bf16, numbers(pairs, "length").mean())

    def make_reference(self) -> Reference:
        """The model that the policy started from, or where it may move, its present state."""
        moving = self.hparams.sync_ref_model
        if self.policy is self.causal_lm:
            if moving and self._untrained:
                return MovingCopy(self.policy)
            # A sharded model wants all its weights in one dtype.
            autocast = None if self.device_mesh is not None else AUTOCAST.get(self._trainer and self._trainer.precision)
            return FrozenCopy(self.policy if self._untrained else self.load_policy().to(self.device), autocast)
        new_adapter = self.hparams.lora is not None
        return AdapterOff(self.policy) if new_adapter and not moving else AdapterCopy(self.policy)

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

    def _check_max_length(self) -> None:
        data = self._trainer and self._trainer.datamodule
        longest = getattr(data, "max_length", 0)
        positions = position_count(self.causal_lm.config)
        if positions and longest > positions:
            raise UserError(f"data.max_length is {longest}, but this model has {positions} positions: lower it to that")
        if hasattr(data, "check_vocabulary"):
            data.check_vocabulary(self.causal_lm.get_input_embeddings().num_embeddings, self.hparams.name_or_path)

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The policy as a plain causal LM of transformers, adapters injected."""
        return self.policy.get_base_model() if hasattr(self.policy, "get_base_model") else self.policy

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DPOModule":
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

    # ------------------------------------------------------------------ the step

    def _shared_step(self, batch: PairBatch, stage: str) -> Tensor:
        self.settle_scoring(batch)
        reference = self.reference_logps(batch)
        policy = pair_logps(self.causal_lm, batch, self.scoring, sum_squares=self.loss.use_weighting)
        losses = self.loss(policy, reference, batch.weight, batch.margin)
        rewards = self.loss.rewards(policy, reference)
        getattr(self, f"{stage}_metrics").update(losses.detach(), rewards, policy, reference)
        if policy.router_loss is None:
            return losses.mean()
        self.router_loss = policy.router_loss.detach().float()
        return losses.mean() + policy.router_loss

    def reference_logps(self, batch: PairBatch) -> PairLogps | None:
        """Log-probs under the reference, without gradients: those that come with the batch, or else computed now.

        None where the loss needs no reference.
        """
        if not self.loss.needs_reference:
            return None
        if batch.reference_logps is not None:
            return PairLogps(batch.reference_logps, batch.sequence, batch.num_pairs)
        return self.reference.logps(batch, self.scoring)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss of a batch, over all ranks once the gradients are averaged."""
        return self._shared_step(batch, "train") * self._rank_weight(batch)

    def _rank_weight(self, batch: PairBatch) -> Tensor | float:
        """A rank's pairs as a multiple of the mean: ranks' gradients are averaged, whatever number each has."""
        ranks = self.trainer.world_size
        if ranks == 1:
            return 1.0
        pairs = torch.tensor(batch.num_pairs, dtype=torch.float32, device=self.device)
        return pairs * ranks / self.trainer.strategy.reduce(pairs.clone(), reduce_op="sum")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._shared_step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._shared_step(batch, "test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> "list[Reply]":
        """Greedy replies to a batch of prompts."""
        from dpo_lightning.models.generate import generate

        return generate(
            self.causal_lm,
            batch.input_ids,
            batch.attention_mask,
            self.trainer.datamodule.tokenizer,
            self.hparams.max_new_tokens,
        )

    def settle_scoring(self, batch: PairBatch) -> None:
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

    # ------------------------------------------------------------------ logging

    def on_train_start(self) -> None:
        """From here on the policy is not its reference. A resumed run has logged the step that it goes on from."""
        unscale_before_clipping(self.trainer)
        if self.trainer.ckpt_path:
            resume.check_restored(self.trainer, self)
        self._untrained = False
        self._logged_step = self.global_step

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Starts the clock of an optimizer step at its first batch, and the batch's own random state."""
        resume.seed_batch(self.trainer)
        resume.note_step(self.trainer, self, batch_idx)
        self._pairs += batch.num_pairs * self.trainer.world_size
        if self._step_began is None:
            self._step_began = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and stops the clock: validation and replies, which come between steps, are not counted.

        A step that the gradient scaler skips counts as one, for `max_steps` and for the moves of the reference; only
        the learning rate's schedule waits (`lr_scheduler_step`).
        """
        with self.skipped.counting(self.trainer):
            super().optimizer_step(*args, **kwargs)
        if self.skipped.in_a_row:
            self.grad_norm = None  # there is none: its gradients overflowed
        # Lightning would keep the gradients until the next forward pass is over, on top of all its activations.
        self.optimizers(use_pl_optimizer=False).zero_grad()
        # Not when the batch has ended: the checkpoint of this step is written before that.
        if self.hparams.sync_ref_model and (self.global_step + 1) % self.hparams.ref_model_sync_steps == 0:
            move(self.reference, self.policy, self.hparams.ref_model_mixup_alpha)
        self._seconds += time.perf_counter() - self._step_began
        self._step_began = None

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Logs the metrics of the pairs since the last time, every `log_every_n_steps` optimizer steps."""
        step = self.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            self.log("train/learning_rate", self.lr_schedulers().get_last_lr()[0])
            if gradient_scaler(self.trainer) is not None:
                self.log("train/skipped_steps", float(self.skipped.total))
            if self.grad_norm is not None:
                self.log("train/grad_norm", whole(self.grad_norm))
            if self.router_loss is not None:
                self.log("train/router_loss", self.router_loss)
            self.log("train/pairs_per_second", self._pairs / self._seconds, prog_bar=True)
            self._seconds, self._pairs = 0.0, 0
            self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the whole validation split."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the whole test split."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        metrics: PairMetrics = getattr(self, f"{stage}_metrics")
        for name, value in metrics.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in IN_PROGRESS_BAR, sync_dist=stage != "train")
        metrics.reset()

    # ------------------------------------------------------------------ optimization

    def on_fit_start(self) -> None:
        """Readies the reference and the policy, which is loaded in eval mode, where gradient checkpointing is off.

        Raises:
            UserError: weights or margins of the data that the loss cannot use.
        """
        data = self._trainer and self._trainer.datamodule
        for pairs in getattr(data, "datasets", {}).values():
            if "weight" in pairs.column_names:
                self.loss.check_columns(torch.tensor(pairs["weight"][:]), torch.tensor(pairs["margin"][:]))
        if self.reference_is_cached:
            first = range(min(len(data.datasets["train"]), data.hparams.batch_size))
            self.settle_scoring(data.batch("train", first).to(self.device))
            start = {"model": self.hparams.name_or_path, "weights": self.start_digest}
            add_reference_logps(
                self.trainer, self.causal_lm, self.scoring, start, lambda: self.reference or self.make_reference()
            )
        self.policy.train()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with linear warm-up and the chosen schedule over all steps of the run."""
        h = self.hparams
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("nothing is trainable: the policy's weights are frozen; unfreeze some, or set model.lora")
        check_trained_dtype(p.dtype for p in trainable)
        groups = [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": h.weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=h.learning_rate, fused=True)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            if h.lr_scheduler_type != "constant" or 0 < h.warmup_steps < 1:
                raise UserError(
                    "the run has no end (trainer.max_epochs and max_steps are -1), so no schedule can be laid over it: "
                    "set one of them, or lr_scheduler_type: constant with a number of warmup_steps"
                )
            steps = 0
        warmup = round(h.warmup_steps * steps) if h.warmup_steps < 1 else int(h.warmup_steps)
        rate = functools.partial(rate_at, schedule=h.lr_scheduler_type, warmup_steps=warmup, steps=int(steps))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer says; the norm that clipping computes anyway is kept for the log.

        Gradients are unscaled by now (`unscale_before_clipping`).
        """
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Steps the schedule, unless the gradient scaler has skipped the step: warm-up is of real steps."""
        if not self.skipped.in_a_row:
            super().lr_scheduler_step(scheduler, metric)

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what resuming needs (`dpo_lightning.dpo.resume`), how to ask, and the reference where it moves."""
        if self.hparams.sync_ref_model:
            checkpoint["reference"] = weights_to_save(self.reference)
        checkpoint["skipped_steps"] = self.skipped.total
        resume.save(self.trainer, self, checkpoint)
        if asking := asking_of(self.trainer):
            checkpoint[ASKING] = asking._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Resumes, if this is a training run.

        Raises:
            UserError: the checkpoint is of a run with other data or settings.
        """
        if self.hparams.sync_ref_model:
            if "reference" not in checkpoint:
                raise UserError("model.sync_ref_model is true, but in the checkpoint's run it was false: leave it out")
            self.configure_model()
            load_weights(self.reference, checkpoint["reference"])
        if self._trainer is not None:
            self.skipped.total = checkpoint.get("skipped_steps", 0)
            check_amount(self.skipped.total, "skipped_steps")
            resume.load(self.trainer, self, checkpoint)

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
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "DPOModule":
        """As Lightning's, but `trust_remote_code` is never taken from the file: give it here."""
        return super().load_from_checkpoint(*args, **{TRUST: False} | kwargs)
