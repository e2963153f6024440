"""DPOModule: PairBatch -> loss, with the policy's optimizer, schedule and checkpoint.

The step is the same in training, validation and testing: log-probs of policy and reference, their loss, metrics.
"""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from dpo_lightning.batching import PairBatch, PromptBatch
from dpo_lightning.errors import UserError
from dpo_lightning.logps import Scoring, choose_scoring, pair_logps
from dpo_lightning.losses import PreferenceLoss
from dpo_lightning.metrics import PairMetrics
from dpo_lightning.policy import assert_no_dropout, load_policy
from dpo_lightning.reference import AdapterOff, FrozenCopy, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dpo_lightning.replies import Reply

SCHEDULES = ("linear", "cosine", "constant")
IN_PROGRESS_BAR = {"loss", "rewards/margins", "rewards/accuracies"}


class DPOModule(LightningModule):
    """Direct Preference Optimization of a causal LM against a frozen reference.

    Args:
        name_or_path: model to train, a hub id or a local folder.
        beta: strength of the KL constraint; smaller lets the policy go further from the reference.
        loss_type: a loss of `dpo_lightning.losses` or several.
        loss_weights: a weight for each loss; left out, 1 each.
        label_smoothing: of the sigmoid loss (conservative DPO), the share of pairs taken to be labelled wrongly.
        learning_rate: peak learning rate of AdamW.
        weight_decay: AdamW's, on matrices only (not on biases, norms).
        warmup_steps: optimizer steps of linear warm-up; below 1, a share of all steps.
        lr_scheduler_type: after the warm-up, `linear` or `cosine` down to 0, or `constant`.
        lora: arguments of `peft.LoraConfig` (r, lora_alpha, target_modules, ...); left out, all weights train.
        gradient_checkpointing: less memory for about a third more time.
        attn_implementation: `eager` or `sdpa`; left out, what is faster here.
        dtype: of the weights in memory; float32 is right for mixed precision.
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
        learning_rate: float = 1e-5,
        weight_decay: float = 0.0,
        warmup_steps: float = 0.1,
        lr_scheduler_type: str = "linear",
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        attn_implementation: str | None = None,
        dtype: str = "float32",
        max_new_tokens: int = 64,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss = PreferenceLoss(loss_type, loss_weights, beta, label_smoothing)
        if lr_scheduler_type not in SCHEDULES:
            raise UserError(f"model.lr_scheduler_type '{lr_scheduler_type}' is unknown: one of {', '.join(SCHEDULES)}")
        for name, value in {
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
        }.items():
            if not value >= 0:
                raise UserError(f"model.{name} is {value}: it must be 0 or more")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"model.dtype '{dtype}' is unknown: one of float32, bfloat16, float16")
        if attn_implementation not in (None, "eager", "sdpa"):
            raise UserError(f"model.attn_implementation '{attn_implementation}' cannot be used: one of eager, sdpa")
        self.train_metrics, self.val_metrics = PairMetrics(beta), PairMetrics(beta, keep_margins=True)
        self.test_metrics = PairMetrics(beta)
        self.policy: nn.Module | None = None
        self.reference: Reference | None = None
        self.scoring: Scoring | None = None
        self.strict_loading = False  # a LoRA checkpoint holds the adapter alone; load_state_dict checks instead
        self.grad_norm: Tensor | None = None
        self._logged_step = 0
        self._step_began: float | None = None
        self._seconds, self._pairs = 0.0, 0  # of optimizer steps since the last log

    # ------------------------------------------------------------------ models

    def configure_model(self) -> None:
        """Loads the policy and makes the reference from it, before any training and any checkpoint.

        Raises:
            UserError: the model cannot be loaded, still has dropout, or has fewer positions than `data.max_length`.
        """
        if self.policy is not None:
            return
        h = self.hparams
        self.policy = load_policy(
            h.name_or_path, h.lora, h.gradient_checkpointing, h.attn_implementation, h.dtype, h.trust_remote_code
        )
        assert_no_dropout(self.policy)
        self.reference = FrozenCopy(self.policy) if h.lora is None else AdapterOff(self.policy)
        self._check_max_length()

    def _check_max_length(self) -> None:
        data = self._trainer and self._trainer.datamodule
        longest = getattr(data, "max_length", 0)
        positions = getattr(self.causal_lm.config, "max_position_embeddings", None)
        if positions and longest > positions:
            raise UserError(f"data.max_length is {longest}, but this model has {positions} positions: lower it to that")

    @property
    def causal_lm(self) -> "PreTrainedModel":
        """The policy as a plain causal LM of transformers, adapters injected."""
        return self.policy if self.hparams.lora is None else self.policy.get_base_model()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DPOModule":
        # The reference is no submodule (so that it is in no checkpoint), but it must follow to the device.
        if self.reference is not None:
            self.reference.apply(fn)
        return super()._apply(fn, *args, **kwargs)

    # ------------------------------------------------------------------ the step

    def _shared_step(self, batch: PairBatch, stage: str) -> Tensor:
        if self.scoring is None:
            self.scoring = self._choose_scoring(batch)
        reference = self.reference.logps(batch, self.scoring)
        policy = pair_logps(self.causal_lm, batch, self.scoring)
        losses = self.loss(policy, reference)
        getattr(self, f"{stage}_metrics").update(losses.detach(), policy, reference)
        return losses.mean()

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        """Mean loss of a batch."""
        return self._shared_step(batch, "train")

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._shared_step(batch, "val")

    def test_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Adds a batch to the test metrics."""
        self._shared_step(batch, "test")

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> "list[Reply]":
        """Greedy replies to a batch of prompts."""
        from dpo_lightning.replies import generate

        return generate(self.causal_lm, batch, self.trainer.datamodule.tokenizer, self.hparams.max_new_tokens)

    def _choose_scoring(self, batch: PairBatch) -> Scoring:
        scoring = self.trainer.strategy.broadcast(choose_scoring(self.causal_lm, batch))
        if not scoring.shared:
            rank_zero_warn(f"prompts are read twice per pair, which is slower: {scoring.reason}")
        if not scoring.gathered:
            rank_zero_warn(
                "the LM head runs on every position, which is slower: this model's logits are made in its own way"
            )
        return scoring

    # ------------------------------------------------------------------ logging

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        """Starts the clock of an optimizer step at its first batch."""
        self._pairs += batch.num_pairs * self.trainer.world_size
        if self._step_began is None:
            self._step_began = time.perf_counter()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Steps, and stops the clock: validation and replies, which come between steps, are not counted."""
        super().optimizer_step(*args, **kwargs)
        self._seconds += time.perf_counter() - self._step_began
        self._step_began = None

    def on_train_batch_end(self, outputs: Any, batch: PairBatch, batch_idx: int) -> None:
        """Logs the metrics of the pairs since the last time, every `log_every_n_steps` optimizer steps."""
        step = self.global_step
        if step % self.trainer.log_every_n_steps == 0 and step != self._logged_step:
            self._logged_step = step
            self.log("train/learning_rate", self.lr_schedulers().get_last_lr()[0])
            if self.grad_norm is not None:
                self.log("train/grad_norm", self.grad_norm)
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
        """Puts the policy into train mode: it is loaded in eval mode, where gradient checkpointing is off."""
        self.policy.train()

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with linear warm-up and the chosen schedule over all steps of the run."""
        from transformers import get_scheduler

        h = self.hparams
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        if not trainable:
            raise UserError("nothing is trainable: the policy's weights are frozen; unfreeze some, or set model.lora")
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
        name = "constant_with_warmup" if h.lr_scheduler_type == "constant" else h.lr_scheduler_type
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer says; the norm that clipping computes anyway is kept for the log."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # ------------------------------------------------------------------ checkpoint

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What training changes: all weights, or with LoRA the adapter alone."""
        state = super().state_dict(*args, **kwargs)
        for name, parameter in self.named_parameters(remove_duplicate=False):  # a tied head has its weight's name too
            if not parameter.requires_grad:
                state.pop(name, None)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` gave.

        Raises:
            UserError: a trained weight that the checkpoint lacks, or one that this model does not have.
        """
        self.configure_model()
        expected = set(self.state_dict())
        for what, names in {"lacks": expected - set(state_dict), "has an unknown": set(state_dict) - expected}.items():
            if names:
                raise UserError(
                    f"the checkpoint {what} weight {sorted(names)[0]} ({len(names)} in all): it is of another model or "
                    "with other model.lora settings than these"
                )
        return super().load_state_dict(state_dict, strict=False, assign=assign)
