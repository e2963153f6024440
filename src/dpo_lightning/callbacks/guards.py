"""A run -> one clear warning, with its remedy, for each thing that makes preference training fail quietly.

Checked before the first step (`preflight`), while the run goes on, and at every loss that is not a number.
"""

from collections.abc import Sequence
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
from dpo_lightning.data.batching import EncodedPair, PairBatch, collate, to_pairs
from dpo_lightning.dpo.gradient_scaler import MAX_SKIPS_IN_A_ROW
from dpo_lightning.dpo.logps import pair_logps
from dpo_lightning.errors import UserError

PROBED = 4  # pairs of the first batch that the preflight scores
TOLERANCE = 0.02  # nats per token; bfloat16 kernels of different batch shapes differ by about 0.006
DISPLACED = 0.5  # share of pairs whose chosen log-prob fell below the reference's
EOS_DROP = 0.3  # how far the share of replies that end may fall below its best
REPETITION, REPETITION_RISE = 0.3, 0.2  # how high repetition may be, and how far above its lowest


class Seen(NamedTuple):
    """What tells whether a batch went well; tensors stay on the device until they are looked at."""

    step: int
    pair_ids: Tensor
    loss: Tensor
    grad_norm: Tensor | None  # of the step that the batch ended, where gradients are clipped and it was not skipped


class GuardsCallback(Callback):
    """Warns, once each, of what `learning_checks`, `preflight`, displacement and `gone_wrong` tell; stops at NaN.

    No step waits for the device because of this: on one CPU process each loss is looked at after its step;
    elsewhere losses are collected on the device and looked at together, every `log_every_n_steps` and before each
    checkpoint, so that a bad policy never replaces a good checkpoint. Steps that a gradient scaler skips harm nothing:
    only where nothing else comes any more is the run stopped.
    """

    def __init__(self) -> None:
        self._first_batch: PairBatch | None = None
        self._step = 0  # that the batch under way belongs to
        self._unseen: list[Seen] = []
        self._warned_of: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that rows can be named, and mends settings that Lightning would refuse."""
        if stage == "fit":
            preference_data(trainer, self)
            fit_validation_to_epochs(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what will keep this run from teaching anything."""
        if not trainer.fast_dev_run:
            for warning in learning_checks.before_training(trainer):
                rank_zero_warn(warning)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says what kept it from that. Not when the training ends: the last replies are yet to be made then."""
        if not trainer.fast_dev_run:
            for warning in learning_checks.after_training(trainer):
                rank_zero_warn(warning)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Looks at what the steps since have logged."""
        self._step = trainer.global_step + 1
        self._first_batch = batch if self._step == 1 and batch_idx == 0 and trainer.ckpt_path is None else None
        self._look(trainer, pl_module)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the first batch, before it changes anything."""
        if self._first_batch is not None:
            for warning in preflight(trainer, pl_module, self._first_batch):
                rank_zero_warn(warning)
            self._first_batch = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Looks at the loss: at once where that is free, else where the run waits for the device anyway."""
        self._unseen.append(Seen(self._step, batch.pair_ids, outputs["loss"].detach(), pl_module.grad_norm))
        free = pl_module.device.type == "cpu" and trainer.world_size == 1
        too_often = pl_module.skipped.in_a_row >= MAX_SKIPS_IN_A_ROW
        if free or too_often or trainer.global_step % trainer.log_every_n_steps == 0:
            self._stop_at_nan(trainer)
        if too_often:
            raise UserError(
                f"the gradients of {MAX_SKIPS_IN_A_ROW} steps in a row, up to step {trainer.global_step}, overflowed "
                f"float16, so all were skipped and nothing is learned; {last_good(trainer)}; set trainer.precision: "
                "32-true (or bf16-mixed where the hardware has it), or lower model.learning_rate"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps a policy that has met NaN out of the checkpoints."""
        self._stop_at_nan(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what came after the last step."""
        self._stop_at_nan(trainer)
        self._look(trainer, pl_module)
        if skipped := pl_module.skipped.total:
            rank_zero_info(
                f"{skipped} of {trainer.global_step} steps were skipped because their gradients overflowed float16: a "
                "few are normal, since the gradient scaler finds its scale so"
            )

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step % trainer.log_every_n_steps == 0 and trainer.global_step > warmup_steps(trainer, module):
            share = trainer.callback_metrics.get("train/rewards/displaced")
            if share is not None and share > DISPLACED:
                self._warn_once(
                    "displaced",
                    f"step {trainer.global_step}: the chosen completion of {share:.0%} of the pairs has become less "
                    "likely than it was under the reference (likelihood displacement): lower model.learning_rate, "
                    "raise model.beta, or set model.loss_type: dpop or [sigmoid, sft]",
                )
        if replies := find_callback(trainer, RepliesCallback):
            for what, warning in gone_wrong([(showing.step, showing.shares) for showing in replies.showings]).items():
                self._warn_once(what, warning)

    def _warn_once(self, what: str, warning: str) -> None:
        if what not in self._warned_of:
            self._warned_of.add(what)
            rank_zero_warn(warning)

    def _stop_at_nan(self, trainer: Trainer) -> None:
        seen, self._unseen = self._unseen, []
        if not seen:
            return
        values = [value for batch in seen for value in (batch.loss, batch.grad_norm) if value is not None]
        # A sharded policy's norm is a DTensor, whole only when all ranks ask. The bool is the one wait for the device.
        finite = bool(torch.stack([getattr(v, "full_tensor", lambda v=v: v)() for v in values]).isfinite().all())
        if trainer.strategy.reduce_boolean_decision(finite, all=True):
            return
        good = last_good(trainer)
        remedy = "lower model.learning_rate, or set trainer.gradient_clip_val: 1.0 or trainer.precision: 32-true"
        if finite:
            raise UserError(f"another process met a loss or gradient that is not finite; {good}; {remedy}")
        data = trainer.datamodule
        for batch in seen:
            for name, value in {"loss": batch.loss, "gradient norm": batch.grad_norm}.items():
                if value is not None and not value.isfinite():
                    rows = "; ".join(data.locations("train", sorted(batch.pair_ids.tolist())))
                    raise UserError(
                        f"the {name} is {value.item()} at step {batch.step}, on these rows: {rows}; {good}; look at "
                        f"the rows, {remedy}"
                    )


def last_good(trainer: Trainer) -> str:
    """Which checkpoint a run that went wrong can go back to, as half a sentence."""
    path = newest_checkpoint(trainer)
    return f"the last good checkpoint is {path}" if path else "no checkpoint was written before"


def warmup_steps(trainer: Trainer, module: LightningModule) -> float:
    """Optimizer steps of warm-up."""
    steps = module.hparams.warmup_steps
    return steps if steps >= 1 else steps * trainer.estimated_stepping_batches


def preflight(trainer: Trainer, module: LightningModule, batch: PairBatch) -> list[str]:
    """What is wrong before the first step, when policy and reference should still be the same model.

    A few pairs of the first batch are scored as training scores them, in its mode and precision. Where the loss uses
    no reference, the policy is only compared with itself.
    """
    warnings = []
    if unended := untrained_eos(to_pairs(batch), trainer.datamodule.tokenizer.eos_token_id):
        warnings.append(
            f"{unended} of the {batch.num_pairs} pairs of the first batch have a completion that does not end in EOS, "
            "so replies are not taught to stop: encode them with PreferenceDataModule, which adds it"
        )
    probe = first_pairs(batch, PROBED)
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


def first_pairs(batch: PairBatch, count: int) -> PairBatch:
    """The first pairs of a batch, on its device."""
    probe = collate(to_pairs(batch)[:count], batch.pair_ids[:count].tolist()).to(batch.input_ids.device)
    known = batch.reference_logps
    return probe if known is None else probe._replace(reference_logps=known[batch.sequence < 2 * count])


def untrained_eos(pairs: Sequence[EncodedPair], eos: int) -> int:
    """How many pairs have a completion whose last trained token is not EOS."""
    return sum(pair.chosen_ids[-1] != eos or pair.rejected_ids[-1] != eos for pair in pairs)


def gone_wrong(history: Sequence[tuple[int, dict[str, float]]]) -> dict[str, str]:
    """Warnings by kind from the shares of all replies so far, (step, shares) each: no longer ending, repeating."""
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
