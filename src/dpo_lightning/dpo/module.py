"""DPOModule: PairBatch -> loss and metrics, with the policy's optimizer, schedule and checkpoint.

Training, validation and testing share one step: log-probs under policy and reference, then loss and metrics.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import AdamW

from dpo_lightning.data.batching import PairBatch, PromptBatch
from dpo_lightning.data.columns import thumbs
from dpo_lightning.data.loaders import LengthGroupedBatchSampler
from dpo_lightning.data.prompt_format import KEY as PROMPT_FORMAT
from dpo_lightning.data.prompt_format import prompt_format_of
from dpo_lightning.dpo.cached_reference import add_reference_logps
from dpo_lightning.dpo.gradient_scaler import SkippedSteps, gradient_scaler, unscale_before_clipping
from dpo_lightning.dpo.half_precision import CONVERTED, check_trained_dtype, keep_inputs
from dpo_lightning.dpo.kept_memory import KeepMemory
from dpo_lightning.dpo.logps import pair_logps
from dpo_lightning.dpo.metrics import PairMetrics
from dpo_lightning.dpo.optimization import PlateauSchedule, clip_to_norm, make_optimizer, make_scheduler
from dpo_lightning.dpo.policy_module import PolicyModule
from dpo_lightning.dpo.preference_loss import PreferenceLoss, gradient_weights
from dpo_lightning.dpo.reference import check_reference, load_weights, move, weights_to_save
from dpo_lightning.dpo.resume import Resume
from dpo_lightning.dpo.throughput import Throughput
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import attached_trainer
from dpo_lightning.models.policy import base_model_name
from dpo_lightning.models.sharding import check_strategy, gathered
from dpo_lightning.parsing import AtLeast1, NotNegative, PositiveShare, check_settings
from dpo_lightning.storage.states import check_amount

if TYPE_CHECKING:
    from dpo_lightning.models.reply import Reply

IN_PROGRESS_BAR = {"loss", "rewards/margins", "rewards/accuracies"}
NOT_SAVED = ("optimizer", "lr_scheduler")  # settings that are functions, which no checkpoint may name
OWN_CALLBACKS = (Resume, PlateauSchedule, KeepMemory)  # every run of the module has them


class DPOModule(PolicyModule):
    """Direct Preference Optimization of a causal language model.

    Args:
        name_or_path: model to train, a hub id or a local folder.
        beta: strength of the KL constraint; a smaller value lets the policy move further from the reference.
        loss_type: one or several losses of `dpo_lightning.dpo.losses`, or your own (`my_module:my_loss`).
        loss_weights: a weight for each loss; 1 each by default.
        label_smoothing: share of pairs assumed to be labelled wrongly, for losses that have it (docs/losses.md).
        loss_options: other parameters of the losses, f-divergence, LD-DPO and WPO (see `PreferenceLoss`).
        learning_rate: peak learning rate.
        weight_decay: of matrices only, not of biases and norms.
        warmup_steps: optimizer steps of linear warm-up; below 1, a share of all steps.
        lr_scheduler_type: after the warm-up, `linear` or `cosine` down to 0, or `constant`.
        reference: `online` scores each batch with the reference when it is trained on; `cached` scores all pairs once
            before training and keeps the log-probs on disk for later epochs and runs; or another kind of
            `dpo_lightning.dpo.reference`. By default cached if there is more than one epoch.
        lora: arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, ...); by default all weights train.
        gradient_checkpointing: uses less memory and about a third more time.
        attn_implementation: `eager` or `sdpa`, by default the faster one here (`hardware.fastest_attention`); or
            `packed`: all pairs of a batch in one row without padding (`dpo.packing`), if the model can take that. By
            default that too on a CPU in bfloat16.
        dtype: of the weights in memory; float32 is right for mixed precision. 16 bits only under an adapter.
        quantization: `4bit` or `8bit` weights under an adapter, by bitsandbytes.
        router_aux_loss_coef: weight of a mixture of experts' load-balancing loss; by default that of its config.
        sync_ref_model: let the reference follow the policy (TR-DPO).
        ref_model_mixup_alpha: weight of the policy in each update of the reference; 1 replaces the reference.
        ref_model_sync_steps: optimizer steps between two updates of the reference.
        max_new_tokens: longest reply that `predict` and `test` generate.
        trust_remote_code: run a hub model's own Python code.
        optimizer: a class or function that makes the optimizer from parameter groups; AdamW by default. It is in no
            checkpoint, so give it again to resume.
        lr_scheduler: makes a schedule from the optimizer, instead of `warmup_steps` and `lr_scheduler_type`.
    """

    def __init__(
        self,
        name_or_path: str,
        beta: float = 0.1,
        loss_type: str | list[str] = "sigmoid",
        loss_weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        loss_options: dict[str, Any] | None = None,
        learning_rate: NotNegative = 1e-5,
        weight_decay: NotNegative = 0.0,
        warmup_steps: NotNegative = 0.1,
        lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear",
        reference: str | None = None,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: Literal["eager", "sdpa", "packed"] | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["4bit", "8bit"] | None = None,
        router_aux_loss_coef: float | None = None,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: PositiveShare = 0.6,
        ref_model_sync_steps: AtLeast1 = 512,
        max_new_tokens: AtLeast1 = 64,
        trust_remote_code: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_settings(DPOModule.__init__, locals(), "model.")
        super().__init__()
        self.save_hyperparameters(ignore=NOT_SAVED)
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.loss = PreferenceLoss(loss_type, loss_weights, beta, label_smoothing, loss_options)
        check_reference(reference, sync_ref_model, self.loss.needs_reference)
        reference_free = not self.loss.needs_reference
        self.train_metrics, self.test_metrics = (
            PairMetrics(reference_free, in_training=True),
            PairMetrics(reference_free),
        )
        self.val_metrics = PairMetrics(reference_free, keep_margins=True)
        self.grad_norm: Tensor | None = None
        self.router_loss: Tensor | None = None
        self.reference_point: Tensor | None = None  # the batch's KL divergence, where the loss needs it
        self.skipped, self.throughput = SkippedSteps(), Throughput()
        self._logged_step = 0
        self.check_before_saving: Callable[[], None] | None = None  # weights alone are saved without callbacks' hooks

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks of `OWN_CALLBACKS`. As the first hook of a run, it also refuses what cannot work.

        Raises:
            UserError: the strategy is not supported, or weights would be trained in 16 bits.
        """
        check_strategy(self.trainer.strategy)
        keep_inputs(self.trainer)
        h = self.hparams
        adapter = h.lora is not None or base_model_name(h.name_or_path) != h.name_or_path
        if self.trainer.state.fn == TrainerFn.FITTING and not adapter:
            check_trained_dtype([CONVERTED.get(self.trainer.precision, torch.float32), getattr(torch, h.dtype)])
        return [own() for own in OWN_CALLBACKS if not any(isinstance(other, own) for other in self.trainer.callbacks)]

    def setup(self, stage: str) -> None:
        """Checks that the loss can use rows with one completion, if there are any.

        Raises:
            UserError: it cannot, or it needs other rows in each batch and there are none.
        """
        data = self.data
        if data is None or stage == "predict":
            return
        for name, pairs in data.datasets.items():
            if name != "predict" and any(thumbs(pairs)):
                self.loss.check_unpaired(name)
        self.loss.check_batches(data.hparams.batch_size, data.eval_batch_size)

    # ------------------------------------------------------------------ the step

    def _shared_step(self, batch: PairBatch, stage: str) -> Tensor:
        scoring = self.ensure_scoring(batch)
        reference, self.reference_point = self.reference_logps(batch), self.batch_kl(batch)
        policy = pair_logps(self.causal_lm, batch, scoring, sum_squares=self.loss.use_weighting)
        losses = self.loss(policy, reference, batch.weight, batch.margin, self.reference_point)
        rewards = self.loss.rewards(policy, reference)
        gradients = gradient_weights(losses, policy) if losses.requires_grad else None
        getattr(self, f"{stage}_metrics").update(losses.detach(), rewards, policy, reference, gradients)
        if policy.router_loss is None:
            return losses.mean()
        self.router_loss = policy.router_loss.detach().float()
        return losses.mean() + policy.router_loss

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss of the batch; averaging gradients over ranks makes it the mean over all ranks' pairs."""
        return self._shared_step(batch, "train") * self._rank_weight(batch, batch_idx)

    def _rank_weight(self, batch: PairBatch, batch_idx: int) -> Tensor | float:
        """This rank's pairs relative to the mean over ranks, because gradients are averaged without weights."""
        ranks = self.trainer.world_size
        if ranks == 1:
            return 1.0
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, LengthGroupedBatchSampler):
            return batch.num_pairs * ranks / sampler.sizes[batch_idx]
        pairs = torch.tensor(batch.num_pairs, dtype=torch.float32, device=self.device)
        return pairs * ranks / self.trainer.strategy.reduce(pairs.clone(), reduce_op="sum")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._shared_step(self.with_reference_kept(batch, batch_idx), "val")

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

    # ------------------------------------------------------------------ logging

    def on_train_start(self) -> None:
        """Marks the policy as trained, and the step that a run resumes from as logged."""
        unscale_before_clipping(self.trainer)
        self._untrained = False
        self._logged_step = self.global_step

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Counts the batch for `train/pairs_per_second`."""
        self.throughput.batch(batch.num_pairs * self.trainer.world_size)

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Logs the metrics of the pairs since the last time, every `log_every_n_steps` optimizer steps."""
        step = self.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            if (rate := self.trainer.optimizers[0].param_groups[0]["lr"]) is not None:  # Adafactor may have none
                self.log("train/learning_rate", float(rate))
            if gradient_scaler(self.trainer) is not None:
                self.log("train/skipped_steps", float(self.skipped.total))
            if self.grad_norm is not None:
                self.log("train/grad_norm", gathered(self.grad_norm))
            if self.router_loss is not None:
                self.log("train/router_loss", self.router_loss)
            if self.reference_point is not None:
                self.log("train/reference_point", self.reference_point)
            self.log("train/pairs_per_second", torch.tensor(self.throughput.read()), prog_bar=True)
            self._log_metrics("train")

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics of the validation split."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics of the test split."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        metrics: PairMetrics = getattr(self, f"{stage}_metrics")
        means = metrics.compute()
        if stage == "train" and means:  # to the host, since Lightning reads what is in the bar at every step
            means = dict(zip(means, torch.stack([*means.values()]).cpu(), strict=True))
        for name, value in means.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in IN_PROGRESS_BAR, sync_dist=stage != "train")
        metrics.reset()

    # ------------------------------------------------------------------ optimization

    def on_fit_start(self) -> None:
        """Checks the data's weights and margins, and adds reference log-probs to the data if they are to be cached.

        Raises:
            UserError: the loss cannot use these weights or margins.
        """
        data, self._validated = self.data, {}
        for pairs in data.datasets.values() if data else ():
            if "weight" in pairs.column_names:
                self.loss.check_columns(torch.tensor(pairs["weight"][:]), torch.tensor(pairs["margin"][:]))
        if self.reference_is_cached:
            assert data is not None
            first = range(min(len(data.datasets["train"]), data.hparams.batch_size))
            self.ensure_scoring(data.batch("train", first).to(self.device))
            add_reference_logps(self)
        self.policy.train()  # it is loaded in eval mode, in which gradient checkpointing is off

    @property
    def schedule_needs_length(self) -> bool:
        """Whether the learning rate depends on the length of the run."""
        h = self.hparams
        return self.make_scheduler is None and (h.lr_scheduler_type != "constant" or 0 < h.warmup_steps < 1)

    def configure_optimizers(self) -> dict[str, Any]:
        """The chosen optimizer and schedule; by default AdamW, with warm-up and decay over all steps of the run."""
        h, steps = self.hparams, self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.make_optimizer or AdamW, self.policy, h.learning_rate, h.weight_decay)
        scheduler = make_scheduler(self.make_scheduler, optimizer, h.lr_scheduler_type, h.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, frees the gradients, and updates a reference that follows the policy.

        A step that the gradient scaler skips counts for `max_steps` and for updates of the reference. Only the learning
        rate's schedule waits (`lr_scheduler_step`).
        """
        with self.skipped.counting(self.trainer):
            super().optimizer_step(*args, **kwargs)
        if self.skipped.in_a_row:
            self.grad_norm = None  # the gradients overflowed
        # Lightning would keep the gradients until after the next forward pass, beside all its activations.
        self.optimizers(use_pl_optimizer=False).zero_grad()
        # Not in on_train_batch_end, which comes after the checkpoint of this step.
        if self.hparams.sync_ref_model and (self.global_step + 1) % self.hparams.ref_model_sync_steps == 0:
            move(self.moving_reference, self.policy, self.hparams.ref_model_mixup_alpha)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0 and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the log is about to wait for these steps anyway
        self.throughput.step()

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer is set to, and keeps the gradient norm that clipping computes, for the log.

        Gradients have been unscaled before (`unscale_before_clipping`).
        """
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            self.grad_norm = clip_to_norm(optimizer, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Advances the schedule, unless the gradient scaler has skipped the step."""
        if not self.skipped.in_a_row:
            super().lr_scheduler_step(scheduler, metric)

    # ------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the prompt format, the skipped steps, and a reference that moves; `Resume` adds the rest."""
        if self.check_before_saving is not None:
            self.check_before_saving()
        if self.hparams.sync_ref_model:
            checkpoint["reference"] = weights_to_save(self.moving_reference)
        checkpoint["skipped_steps"] = self.skipped.total
        if prompt_format := prompt_format_of(self.trainer):
            checkpoint[PROMPT_FORMAT] = prompt_format._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads the number of skipped steps, and a reference that moves.

        Raises:
            UserError: the checkpoint has no such reference.
        """
        if self.hparams.sync_ref_model:
            if "reference" not in checkpoint:
                raise UserError("model.sync_ref_model is true, but in the checkpoint's run it was false: leave it out")
            self.configure_model()
            load_weights(self.moving_reference, checkpoint["reference"])
        if attached_trainer(self) is not None:
            self.skipped.total = checkpoint.get("skipped_steps", 0)
            check_amount(self.skipped.total, "skipped_steps")
