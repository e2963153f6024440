"""DPOModule: PairBatch -> loss, with the policy's optimizer, schedule and checkpoint.

The step is the same in training, validation and testing: log-probs of policy and reference, their loss, metrics.
"""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dpo_lightning.data.batching import PairBatch, PromptBatch
from dpo_lightning.data.prompt_format import KEY as PROMPT_FORMAT
from dpo_lightning.data.prompt_format import prompt_format_of
from dpo_lightning.dpo.cached_reference import add_reference_logps
from dpo_lightning.dpo.gradient_scaler import SkippedSteps, gradient_scaler, unscale_before_clipping
from dpo_lightning.dpo.half_precision import CONVERTED, check_trained_dtype, keep_inputs
from dpo_lightning.dpo.logps import pair_logps
from dpo_lightning.dpo.losses import NotNegative
from dpo_lightning.dpo.metrics import PairMetrics
from dpo_lightning.dpo.optimization import PlateauSchedule, make_optimizer, make_scheduler
from dpo_lightning.dpo.policy_module import PolicyModule
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.dpo.reference import check_reference, load_weights, move, weights_to_save
from dpo_lightning.dpo.resume import Resume
from dpo_lightning.dpo.throughput import Throughput
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import base_model_name
from dpo_lightning.models.sharding import check_strategy, gathered
from dpo_lightning.parsing import Range, check_settings
from dpo_lightning.storage.states import check_amount

if TYPE_CHECKING:
    from dpo_lightning.models.generate import Reply

AtLeast1 = Annotated[int, Range("at least 1", lambda number: number >= 1)]
MovedShare = Annotated[float, Range("above 0 and at most 1", lambda share: 0 < share <= 1)]
IN_PROGRESS_BAR = {"loss", "rewards/margins", "rewards/accuracies"}
NOT_SAVED = ("optimizer", "lr_scheduler")  # settings that are functions: no file names one
BROUGHT = (Resume, PlateauSchedule)  # callbacks


class DPOModule(PolicyModule):
    """Direct Preference Optimization of a causal LM against a frozen reference, or none where the loss uses none.

    Args:
        name_or_path: model to train, a hub id or a local folder.
        beta: strength of the KL constraint; smaller lets the policy go further from the reference.
        loss_type: a loss of `dpo_lightning.dpo.losses` or several.
        loss_weights: a weight for each loss; left out, 1 each.
        label_smoothing: share of pairs taken to be labelled wrongly, of the losses that have it (docs/losses.md).
        loss_options: parameters of the chosen losses and f-divergence, LD-DPO, WPO (see `PreferenceLoss`).
        learning_rate: peak learning rate.
        weight_decay: on matrices only (not on biases, norms).
        warmup_steps: optimizer steps of linear warm-up; below 1, a share of all steps.
        lr_scheduler_type: after the warm-up, `linear` or `cosine` down to 0, or `constant`.
        reference: `online` scores every batch with the reference too, `cached` scores all pairs once before training
            and keeps the log-probs on disk for later epochs and runs; left out, cached if there is more than one epoch.
            Or another kind of `dpo_lightning.dpo.reference`.
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
        optimizer: what makes the optimizer of parameter groups, a class or a function; left out, AdamW. No checkpoint
            holds it: give it again to resume.
        lr_scheduler: what makes a schedule of the optimizer, in place of `warmup_steps` and `lr_scheduler_type`.
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
        attn_implementation: Literal["eager", "sdpa"] | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        quantization: Literal["4bit", "8bit"] | None = None,
        router_aux_loss_coef: float | None = None,
        sync_ref_model: bool = False,
        ref_model_mixup_alpha: MovedShare = 0.6,
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
        alone = not self.loss.needs_reference
        self.train_metrics, self.val_metrics = PairMetrics(alone), PairMetrics(alone, keep_margins=True)
        self.test_metrics = PairMetrics(alone)
        self.grad_norm: Tensor | None = None
        self.router_loss: Tensor | None = None
        self.skipped, self.throughput = SkippedSteps(), Throughput()
        self._logged_step = 0

    def configure_callbacks(self) -> list[Callback]:
        """What the module needs of Lightning. The first of all hooks: what cannot work is refused before data are read.

        Raises:
            UserError: a strategy that is not supported, or weights that would be trained in 16 bits.
        """
        check_strategy(self.trainer.strategy)
        keep_inputs(self.trainer)
        h = self.hparams
        adapter = h.lora is not None or base_model_name(h.name_or_path) != h.name_or_path
        if self.trainer.state.fn == TrainerFn.FITTING and not adapter:
            check_trained_dtype([CONVERTED.get(self.trainer.precision, torch.float32), getattr(torch, h.dtype)])
        return [kind() for kind in BROUGHT if not any(isinstance(there, kind) for there in self.trainer.callbacks)]

    # ------------------------------------------------------------------ the step

    def _shared_step(self, batch: PairBatch, stage: str) -> Tensor:
        self.ensure_scoring(batch)
        reference = self.reference_logps(batch)
        policy = pair_logps(self.causal_lm, batch, self.scoring, sum_squares=self.loss.use_weighting)
        losses = self.loss(policy, reference, batch.weight, batch.margin)
        rewards = self.loss.rewards(policy, reference)
        getattr(self, f"{stage}_metrics").update(losses.detach(), rewards, policy, reference)
        if policy.router_loss is None:
            return losses.mean()
        self.router_loss = policy.router_loss.detach().float()
        return losses.mean() + policy.router_loss

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

    # ------------------------------------------------------------------ logging

    def on_train_start(self) -> None:
        """From here on the policy is not its reference. A resumed run has logged the step that it goes on from."""
        unscale_before_clipping(self.trainer)
        self._untrained = False
        self._logged_step = self.global_step

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Starts the clock of an optimizer step at its first batch."""
        self.throughput.batch(batch.num_pairs * self.trainer.world_size)

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Logs the metrics of the pairs since the last time, every `log_every_n_steps` optimizer steps."""
        step = self.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            if (rate := self.trainer.optimizers[0].param_groups[0]["lr"]) is not None:  # Adafactor can go without
                self.log("train/learning_rate", float(rate))
            if gradient_scaler(self.trainer) is not None:
                self.log("train/skipped_steps", float(self.skipped.total))
            if self.grad_norm is not None:
                self.log("train/grad_norm", gathered(self.grad_norm))
            if self.router_loss is not None:
                self.log("train/router_loss", self.router_loss)
            self.log("train/pairs_per_second", self.throughput.read(), prog_bar=True)
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
        data = self.data
        for pairs in data.datasets.values() if data else ():
            if "weight" in pairs.column_names:
                self.loss.check_columns(torch.tensor(pairs["weight"][:]), torch.tensor(pairs["margin"][:]))
        if self.reference_is_cached:
            first = range(min(len(data.datasets["train"]), data.hparams.batch_size))
            self.ensure_scoring(data.batch("train", first).to(self.device))
            start = {"model": self.hparams.name_or_path, "weights": self.start_digest}
            add_reference_logps(
                self.trainer, self.causal_lm, self.scoring, start, lambda: self.reference or self.make_reference()
            )
        self.policy.train()

    @property
    def schedule_needs_length(self) -> bool:
        """Whether the learning rate depends on how long the run is."""
        h = self.hparams
        return self.make_scheduler is None and (h.lr_scheduler_type != "constant" or 0 < h.warmup_steps < 1)

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer and schedule that are set: left out, AdamW, and warm-up and decay over all steps of the run."""
        h, steps = self.hparams, self.trainer.estimated_stepping_batches
        optimizer = make_optimizer(self.make_optimizer, self.policy, h.learning_rate, h.weight_decay)
        scheduler = make_scheduler(self.make_scheduler, optimizer, h.lr_scheduler_type, h.warmup_steps, steps)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

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
        self.throughput.step()

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
        """Adds how to ask the model, and the reference where it moves; `Resume` adds the rest."""
        if self.hparams.sync_ref_model:
            checkpoint["reference"] = weights_to_save(self.reference)
        checkpoint["skipped_steps"] = self.skipped.total
        if prompt_format := prompt_format_of(self.trainer):
            checkpoint[PROMPT_FORMAT] = prompt_format._asdict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Loads a reference that moves, and how many steps were skipped.

        Raises:
            UserError: the checkpoint has no such reference.
        """
        if self.hparams.sync_ref_model:
            if "reference" not in checkpoint:
                raise UserError("model.sync_ref_model is true, but in the checkpoint's run it was false: leave it out")
            self.configure_model()
            load_weights(self.reference, checkpoint["reference"])
        if self._trainer is not None:
            self.skipped.total = checkpoint.get("skipped_steps", 0)
            check_amount(self.skipped.total, "skipped_steps")
