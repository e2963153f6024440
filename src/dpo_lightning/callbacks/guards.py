"""One clear warning, with its remedy, for each known way in which preference training fails quietly.

Checked before the first step (`preflight`), at logging steps, and at every loss that is not finite.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from dpo_lightning.callbacks import learning_checks
from dpo_lightning.callbacks.checkpoints import newest_checkpoint
from dpo_lightning.callbacks.context import find_callback, preference_data
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.validations import fit_validation_to_epochs
from dpo_lightning.data.batching import PairBatch, collate, to_pairs
from dpo_lightning.dpo.gradient_scaler import MAX_SKIPS_IN_A_ROW
from dpo_lightning.dpo.logps import pair_logps
from dpo_lightning.errors import UserError
from dpo_lightning.parsing import check_settings
from dpo_lightning.storage.states import check_amount, check_state

PROBED = 4  # pairs of the first batch that the preflight scores
TOLERANCE = 0.02  # nats per token; bfloat16 kernels of different batch shapes differ by about 0.006
DISPLACED = 0.5  # share of pairs whose chosen log-prob fell below the reference's
FIRST_DISPLACED = 0.3  # share of pairs whose first chosen token is `metrics.FIRST_FALL` less likely than then
# The gradient weight, as a share of the first step's, under which a loss has ceased to teach, and for how many steps.
LITTLE_PULL, QUIET_STEPS = 0.01, 10
STATE = {"first_pull": int | float | None, "last_pull": int, "learned": int | None}
EOS_DROP = 0.3  # how far the share of replies that end may fall below its best
REPETITION, REPETITION_RISE = 0.3, 0.2  # how high repetition may be, and how far above its lowest


class BatchResult(NamedTuple):
    """What shows whether a batch went well. The tensors stay on the device until they are checked."""

    step: int
    pair_ids: Tensor
    loss: Tensor
    grad_norm: Tensor | None  # None within accumulation, without gradient clipping, and for a skipped step


class GuardsCallback(Callback):
    """Warns once of each problem that `learning_checks`, `preflight` and the steps show; stops the run at NaN.

    No step waits for the device because of these checks. On one CPU process, each loss is checked after its step;
    elsewhere losses are collected on the device and checked together, every `log_every_n_steps` and before each
    checkpoint, so that a bad policy never replaces a good checkpoint. A step that a gradient scaler skips does no harm:
    the run is stopped only when all steps are skipped.

    Args:
        stop_when_learned: end the run, as early stopping does, once the loss has nothing left to teach.
    """

    def __init__(self, stop_when_learned: bool = False) -> None:
        check_settings(GuardsCallback.__init__, locals(), "guards.")
        self.stop_when_learned = stop_when_learned
        self._first_pull: float | None = None  # gradient weight of the first step; unknown in older checkpoints
        self._last_pull = 0  # the last step by which the loss still had a gradient worth the name
        self._learned: int | None = None  # the step at which nothing was left to learn
        self._first_batch: PairBatch | None = None
        self._step = 0  # the optimizer step that the current batch is part of
        self._unchecked: list[BatchResult] = []
        self._warned_of: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that the data can name their rows, and adapts settings that Lightning would refuse."""
        if stage == "fit":
            preference_data(trainer, self)
            self._first_pull, self._last_pull, self._learned = None, 0, None
            fit_validation_to_epochs(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns of what would keep this run from teaching anything, and stops before a policy with NaN is saved."""
        pl_module.check_before_saving = functools.partial(self._stop_at_nan, trainer)
        if not trainer.fast_dev_run:
            for warning in learning_checks.before_training(trainer):
                rank_zero_warn(warning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a resumed run in which nothing was left to learn."""
        if self.stop_when_learned and self._learned is not None:
            trainer.should_stop = True
            rank_zero_info(
                f"this run is finished: at step {self._learned} nothing was left to learn; "
                "guards.stop_when_learned: false trains on"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if nothing was learnt; `on_train_end` would be too early, before the last replies."""
        pl_module.check_before_saving = None
        if not trainer.fast_dev_run:
            for warning in learning_checks.after_training(trainer):
                rank_zero_warn(warning)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Checks what the steps before have logged."""
        self._step = trainer.global_step + 1
        self._first_batch = batch if self._step == 1 and batch_idx == 0 and trainer.ckpt_path is None else None
        self._warn(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Checks the first batch, before any weight changes."""
        if self._first_batch is not None:
            for warning in preflight(trainer, pl_module, self._first_batch):
                rank_zero_warn(warning)
            self._first_batch = None
            self._first_pull = float(pl_module.train_metrics.compute()["gradient_weight"])  # of all ranks' pairs

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Checks the loss: at once where that is free, otherwise where the run waits for the device anyway."""
        if self.stop_when_learned and self._learned is not None and trainer.global_step == self._step:
            trainer.should_stop = True
        self._unchecked.append(BatchResult(self._step, batch.pair_ids, outputs["loss"].detach(), pl_module.grad_norm))
        free = pl_module.device.type == "cpu" and trainer.world_size == 1
        too_often = pl_module.skipped.in_a_row >= MAX_SKIPS_IN_A_ROW
        logged = trainer.global_step == self._step and self._step % trainer.log_every_n_steps == 0
        if free or too_often or logged:
            self._stop_at_nan(trainer)
        if too_often:
            raise UserError(
                f"the gradients of {MAX_SKIPS_IN_A_ROW} steps in a row, up to step {trainer.global_step}, overflowed "
                f"float16, so all were skipped and nothing is learned; {last_good(trainer)}; set trainer.precision: "
                "32-true (or bf16-mixed where the hardware has it), or lower model.learning_rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """What tells a resumed run whether there is something left to learn."""
        return {"first_pull": self._first_pull, "last_pull": self._last_pull, "learned": self._learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state has another structure.
        """
        check_state(state_dict, STATE, "the guards")
        for name, value in state_dict.items():
            if value is not None:
                check_amount(value, f"the guards' {name}")
        self._first_pull, self._last_pull, self._learned = (state_dict[name] for name in STATE)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks the last steps."""
        self._stop_at_nan(trainer)
        self._warn(trainer, pl_module)
        if skipped := pl_module.skipped.total:
            rank_zero_info(
                f"{skipped} of {trainer.global_step} steps were skipped because their gradients overflowed float16: a "
                "few are normal, since the gradient scaler finds its scale so"
            )

    def _warn(self, trainer: Trainer, module: LightningModule) -> None:
        """Warns of what training metrics and replies show, once of each kind."""
        found: dict[str, str] = {}
        metrics, step = trainer.callback_metrics, trainer.global_step
        if step and step % trainer.log_every_n_steps == 0 and "train/loss" in metrics:
            if step > warmup_steps(trainer, module):
                losses = "[kto, sft]" if module.loss.needs_kl else "dpop or [sigmoid, sft]"
                found |= displacement_warnings(step, metrics, losses)
            if warning := self._nothing_left(trainer):
                found["learned"] = warning
        if replies := find_callback(trainer, RepliesCallback):
            found |= reply_warnings([(showing.step, showing.shares) for showing in replies.showings])
        for kind, warning in found.items():
            if kind not in self._warned_of:
                rank_zero_warn(warning)
        self._warned_of.update(found)

    def _nothing_left(self, trainer: Trainer) -> str | None:
        """Looks at the gradient weight since the last log; a warning once it has been small for `QUIET_STEPS` steps.

        All ranks see the same mean, so they agree without asking each other.
        """
        step, metrics = trainer.global_step, trainer.callback_metrics
        if not self._first_pull or self._learned is not None:
            return None
        pull = float(metrics["train/gradient_weight"]) / self._first_pull
        if not pull < LITTLE_PULL:
            self._last_pull = step
        if step - self._last_pull < QUIET_STEPS:
            return None
        self._learned = step
        steps, loss = trainer.estimated_stepping_batches, float(metrics["train/loss"])
        return learning_checks.nothing_left(step, pull, loss, steps, self.stop_when_learned)

    def _stop_at_nan(self, trainer: Trainer) -> None:
        results, self._unchecked = self._unchecked, []
        if not results:
            return
        values = [value for result in results for value in (result.loss, result.grad_norm) if value is not None]
        # A sharded policy's norm is a DTensor, gathered only if all ranks ask. The bool is the one wait for the device.
        finite = bool(torch.stack([getattr(v, "full_tensor", lambda v=v: v)() for v in values]).isfinite().all())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        good = last_good(trainer)
        remedy = "lower model.learning_rate, or set trainer.gradient_clip_val: 1.0 or trainer.precision: 32-true"
        if finite:
            raise UserError(f"another process met a loss or gradient that is not finite; {good}; {remedy}")
        for result in results:
            for name, value in {"loss": result.loss, "gradient norm": result.grad_norm}.items():
                if value is not None and not value.isfinite():
                    rows = "; ".join(trainer.datamodule.locations("train", sorted(result.pair_ids.tolist())))
                    raise UserError(
                        f"the {name} is {value.item()} at step {result.step}, on these rows: {rows}; {good}; look at "
                        f"the rows, {remedy}"
                    )


def last_good(trainer: Trainer) -> str:
    """Which checkpoint a failed run can go back to, as part of a message."""
    path = newest_checkpoint(trainer)
    return f"the last good checkpoint is {path}" if path else "no checkpoint was written before"


def warmup_steps(trainer: Trainer, module: LightningModule) -> float:
    """Optimizer steps of warm-up; 0 with a schedule of the user's own, of which it is not known."""
    if module.make_scheduler is not None:
        return 0
    steps = module.hparams.warmup_steps
    return steps if steps >= 1 else steps * trainer.estimated_stepping_batches


def preflight(trainer: Trainer, module: LightningModule, batch: PairBatch) -> list[str]:
    """Problems that show before the first step, when policy and reference should still be the same model.

    Scores a few pairs of the first batch in the mode and precision of training. If the loss uses no reference, the
    policy is compared with itself alone.
    """
    warnings = []
    pairs, eos = to_pairs(batch), trainer.datamodule.tokenizer.eos_token_id
    if unended := sum(any(ids and ids[-1] != eos for ids in pair[1:3]) for pair in pairs):
        warnings.append(
            f"{unended} of the {batch.num_pairs} pairs of the first batch have a completion that does not end in EOS, "
            "so replies are not taught to stop: encode them with PreferenceDataModule, which adds it"
        )
    probe = collate(pairs[:PROBED], batch.pair_ids[:PROBED].tolist()).to(batch.input_ids.device)
    if (known := batch.reference_logps) is not None:
        probe = probe._replace(reference_logps=known[batch.sequence < 2 * PROBED])
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        policy, again = (
            pair_logps(module.causal_lm, probe, module.scoring, sum_squares=module.loss.use_weighting) for _ in range(2)
        )
        reference = module.reference_logps(probe) or policy
        equal = policy._replace(token_logps=reference.token_logps)
        loss, expected = (
            module.loss(logps, reference, probe.weight, probe.margin).mean().item() for logps in (policy, equal)
        )
    noise = (policy.token_logps - again.token_logps).abs().mean().item()
    distance = (policy.token_logps - reference.token_logps).abs().mean().item()
    if noise > TOLERANCE:
        warnings.append(
            f"scoring the same pairs twice gives log-probs that differ by {noise:.2g} nats per token: the model drops "
            "something at random (dropout), and the loss would see it as a preference; set it to 0 in its config"
        )
    elif distance > TOLERANCE:
        margin = module.loss.rewards(policy, reference).diff(dim=1).abs().mean().item()
        warnings.append(
            f"before the first step the loss is {loss:.4f} where equal models give {expected:.4f}, the margins are "
            f"{margin:.2g} where they should be 0: policy and reference are not the same model; "
            "load both from the same weights"
        )
    return warnings


def displacement_warnings(step: int, metrics: Mapping[str, Tensor], losses: str) -> dict[str, str]:
    """Warnings by kind where chosen completions have become less likely than under the reference.

    Args:
        losses: those to suggest.
    """
    found: dict[str, str] = {}
    share = metrics.get("train/rewards/displaced")
    if share is not None and share > DISPLACED:
        found["displaced"] = (
            f"step {step}: the chosen completion of {share:.0%} of the pairs has become less likely than it was under "
            f"the reference (likelihood displacement): lower model.learning_rate, raise model.beta, or set "
            f"model.loss_type: {losses}"
        )
    share = metrics.get("train/rewards/first_displaced")
    if share is not None and share > FIRST_DISPLACED and metrics["train/rewards/margins"] > 0:
        found["first_token"] = learning_checks.first_token_displaced(step, float(share))
    return found


def reply_warnings(history: Sequence[tuple[int, dict[str, float]]]) -> dict[str, str]:
    """Warnings by kind where replies have become worse: they no longer end ("eos"), or repeat themselves.

    Args:
        history: the step and the means of the verdicts at each round of replies.
    """
    found: dict[str, str] = {}
    if len(history) < 2:
        return found
    remedy = "lower model.learning_rate, raise model.beta, or stop the run earlier"
    (step, now), before = history[-1], [shares for _, shares in history[:-1]]
    best = max(shares["reply/eos_rate"] for shares in before)
    if now["reply/eos_rate"] < best - EOS_DROP:
        found["eos"] = (
            f"step {step}: only {now['reply/eos_rate']:.0%} of the replies end by themselves, after {best:.0%} before: "
            f"the policy forgets to stop; {remedy}"
        )
    lowest = min(shares["reply/repetition"] for shares in before)
    if now["reply/repetition"] > max(REPETITION, lowest + REPETITION_RISE):
        found["repetition"] = (
            f"step {step}: replies repeat themselves, {now['reply/repetition']:.0%} of their 4-grams came before "
            f"(lowest so far: {lowest:.0%}): the policy has gone too far; {remedy}"
        )
    return found
