"""What makes a resumed run the same run: its position in the data, its random state, and unchanged settings.

The position follows from the number of optimizer steps alone. A checkpoint's weights are those after its last optimizer
step, whenever it was written (by a validation amid an accumulation, or by SLURM's requeue signal), so Lightning's
counters of batches and epochs are set to what that number says (`set_fit_counters`).
"""

import copy
import math
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import batches_processed, run_seed, set_fit_counters, total_batch_index
from dpo_lightning.storage.states import check_amount, check_state, check_type

if TYPE_CHECKING:
    from dpo_lightning.data.batching import PairBatch
    from dpo_lightning.dpo.module import DPOModule

KEY = "dpo_lightning"  # in a checkpoint
STATE = {"run": dict, "batches": int | float, "metrics": {str: torch.Tensor}}
LENGTH = {"trainer.max_epochs", "trainer.max_steps"}
MAY_CHANGE = LENGTH | {"trainer.precision", "trainer.gradient_clip_val"}
SPEED = {"fused", "foreach", "capturable", "differentiable"}  # an optimizer's settings that do not change its steps


class Resume(Callback):
    """Makes each batch's random state reproducible, and checks and corrects the checkpoint that a run resumes from.

    `DPOModule` adds it to its runs. Lightning restores callbacks before loops, optimizers and schedules, so these only
    see what has been checked here.
    """

    def setup(self, trainer: Trainer, pl_module: "DPOModule", stage: str) -> None:
        """Starts without anything of an earlier run."""
        self._metrics_at_step: dict[str, torch.Tensor] = {}  # the training metrics when the current step began
        self._batches: float | None = None  # per epoch of the run that is resumed
        self._optimization: dict[str, Any] | None = None  # of this run, before anything is restored
        self._loaded: dict[str, Any] | None = None  # parts of the checkpoint that is resumed

    def on_fit_start(self, trainer: Trainer, pl_module: "DPOModule") -> None:
        """Records optimizer and schedule before their states are restored."""
        self._optimization = optimization(trainer, with_settings=pl_module.make_optimizer is not None)
        self._check_optimization(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: "DPOModule") -> None:
        """Raises UserError if the parts that were restored do not belong together, or not to this run's data."""
        if trainer.ckpt_path and self._loaded is None:
            raise UserError(f"--ckpt_path '{trainer.ckpt_path}' has no states of callbacks: it was edited")
        if trainer.ckpt_path:
            check_restored(trainer, pl_module.skipped.total, self._batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: "DPOModule", batch: "PairBatch", batch_idx: int
    ) -> None:
        """Seeds the batch; at the start of an optimizer step keeps the metrics, for a checkpoint amid the step."""
        seed_batch(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._metrics_at_step = {name: value.clone() for name, value in _metrics(pl_module).items()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: "DPOModule", checkpoint: dict[str, Any]) -> None:
        """Adds what `on_load_checkpoint` reads: settings, digest of the start, and the metrics since the last log."""
        batches, done = trainer.num_training_batches, batches_processed(trainer)
        metrics = _metrics(pl_module)
        if batches != float("inf"):
            between_steps = position(trainer.global_step, batches, trainer.accumulate_grad_batches)[1] == done % batches
            metrics = metrics if between_steps else self._metrics_at_step
        checkpoint[KEY] = {
            "run": settings(trainer, pl_module),
            "start": pl_module.start_digest,
            "batches": batches,
            "metrics": {name: pl_module.all_gather(value) for name, value in metrics.items()},  # of all ranks
            "optimization": self._optimization,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: "DPOModule", checkpoint: dict[str, Any]) -> None:
        """Checks the checkpoint that a fit resumes from, and corrects its counters.

        Raises:
            UserError: this run's settings, start or optimizer differ from the checkpoint's.
            ValueError: the checkpoint's part is not what `on_save_checkpoint` writes.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if KEY not in checkpoint:
            raise ValueError(f"it has no {KEY}")
        saved, loop = checkpoint[KEY], checkpoint["loops"]["fit_loop"]
        check_state(saved, STATE, "the resumed run's state")
        # Earlier versions wrote neither.
        check_type(saved.get("start"), str | None, "the digest of its start")
        check_type(saved.get("optimization"), dict | None, "its optimization")
        if saved["batches"] < 1:
            raise ValueError(f"its batches are {saved['batches']}")
        for schedule in checkpoint["lr_schedulers"]:
            check_schedule(schedule)
        check_same_run(saved["run"], settings(trainer, pl_module), pl_module.schedule_needs_length)
        check_same_start(saved.get("start"), pl_module.start_digest, pl_module.hparams.name_or_path)
        for name, progress in loop.items():
            if name.endswith("progress"):
                check_counts(progress, name)
        self._batches, self._loaded = saved["batches"], {name: checkpoint[name] for name in (KEY, "lr_schedulers")}
        self._check_optimization(trainer)
        if "optimizer_states" in checkpoint:  # the optimizer would keep the file open from which they are mapped
            checkpoint["optimizer_states"] = copy.deepcopy(checkpoint["optimizer_states"])
        if math.isfinite(saved["batches"]):
            step, batches = checkpoint["global_step"], int(saved["batches"])
            epoch, done = position(step, batches, trainer.accumulate_grad_batches)
            set_fit_counters(loop, step, epoch, done, batches, by_steps=trainer.max_steps != -1)
        ours = _metrics(pl_module)
        # Of an earlier version, which counted pairs instead, the next log leaves out what had not been logged.
        for name, value in () if "pairs" in saved["metrics"] else saved["metrics"].items():
            own = value[trainer.global_rank] if trainer.world_size > 1 else value
            if name not in ours or own.shape != ours[name].shape or not own.isfinite().all():
                raise ValueError(f"the metric {name!r} is not one that is kept")
            setattr(pl_module.train_metrics, name, own.to(pl_module.device, torch.float32))

    def _check_optimization(self, trainer: Trainer) -> None:
        """Compares optimizer and schedule with the checkpoint's.

        Called by two hooks, since only sharded runs make their optimizer before they load the checkpoint.
        """
        if self._loaded is None or self._optimization is None:
            return
        saved = self._loaded[KEY].get("optimization") or BEFORE_RECORDED
        common = {name: value for name, value in self._optimization.items() if name in saved}
        check_same_run(saved, common, scheduled=False)
        try:
            for schedule, config in zip(self._loaded["lr_schedulers"], trainer.lr_scheduler_configs, strict=False):
                check_kinds(schedule, config.scheduler.state_dict())
        except ValueError as error:
            raise UserError(
                f"--ckpt_path '{trainer.ckpt_path}': {error}: it was edited; resume from another one"
            ) from error


def seed_batch(trainer: Trainer) -> None:
    """Makes the random state of a batch a function of the run's seed, the batch's number and the rank.

    So checkpoints need no random state, and what happens between two batches does not change what follows.
    """
    seed = int(run_seed() or 0)
    batch, rank = total_batch_index(trainer), trainer.global_rank
    state = int(np.random.SeedSequence((seed, batch, rank)).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def position(step: int, batches: int, accumulated: int) -> tuple[int, int]:
    """Complete epochs, and batches of the next one, that `step` optimizer steps have trained on.

    The last step of an epoch takes the batches that remain: with 5 batches, 2 per step, 3 steps are one epoch, (1, 0).
    """
    epoch, steps = divmod(step, math.ceil(batches / accumulated))
    return epoch, steps * accumulated


def check_restored(trainer: Trainer, skipped: int, batches: float | None) -> None:
    """Refuses a checkpoint whose parts do not belong together.

    Args:
        skipped: optimizer steps that the gradient scaler skipped, which no schedule has counted.
        batches: per epoch of the checkpoint's run.

    Raises:
        UserError: they are of different steps, or of other data than this run's.
    """
    steps, wrong = trainer.global_step - skipped, None
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, LRScheduler) and config.interval == "step" and config.frequency == 1:
            if schedule.last_epoch != steps:
                wrong = f"is of step {steps}, but its learning rate of step {schedule.last_epoch}"
        if isinstance(schedule, LambdaLR):
            if schedule.base_lrs != [group["initial_lr"] for group in schedule.optimizer.param_groups]:
                wrong = "has two learning rates, the optimizer's and the schedule's"
    if batches not in (None, trainer.num_training_batches):
        wrong = f"has {batches} batches in an epoch, these data have {trainer.num_training_batches}"
    if wrong:
        raise UserError(f"--ckpt_path '{trainer.ckpt_path}' {wrong}: it was edited; resume from another one")


def check_counts(progress: Any, name: str) -> None:
    """Raises ValueError if one of a loop's counters, at any depth, is not a number of 0 or more."""
    if isinstance(progress, dict):
        for key, part in progress.items():
            check_counts(part, f"{name} {key}")
    elif not isinstance(progress, bool):
        check_amount(progress, name)


def check_schedule(schedule: Any) -> None:
    """Raises ValueError if a schedule's state is malformed: PyTorch makes every entry an attribute of the schedule."""
    check_type(schedule, dict, "the schedule")
    for name, kind in {"base_lrs": [float], "last_epoch": int, "_last_lr": [float], "_schedulers": [dict]}.items():
        if name in schedule:
            check_state(schedule[name], kind, f"the schedule's {name}")
    for rate in (*schedule.get("base_lrs", ()), *schedule.get("_last_lr", ()), schedule.get("last_epoch", 0)):
        check_amount(rate, "a number of the schedule")
    if taken := [name for name in schedule if callable(getattr(LRScheduler, name, None)) or name == "optimizer"]:
        raise ValueError(f"the schedule has a state for {taken[0]!r}")
    for part in schedule.get("_schedulers", ()):
        check_schedule(part)


def check_kinds(saved: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Raises ValueError if a value of a schedule's state has another type than in a schedule that was just made."""
    for name, value in fresh.items():
        if name in saved and value is not None:
            kind = int | float if type(value) in (int, float) else type(value)
            check_type(saved[name], list | tuple if kind in (list, tuple) else kind, f"the schedule's {name}")


def _metrics(module: "DPOModule") -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.train_metrics.metric_state.items() if torch.is_tensor(value)}


# ---------------------------------------------------------------------- settings and start of the two runs


def settings(trainer: Trainer, module: "DPOModule") -> dict[str, Any]:
    """The settings that a resumed run depends on, by the name under which they are configured."""
    return (module.data.identity() if module.data else {}) | {
        "seed_everything": run_seed(),
        "number of processes": trainer.world_size,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
    }


def optimization(trainer: Trainer, with_settings: bool) -> dict[str, Any]:
    """The optimizer and schedule of a run before its first step: their classes and their plain settings.

    Args:
        with_settings: include the optimizer's settings; those of the default AdamW are hyperparameters already.
    """
    result: dict[str, Any] = {"optimizer": None, "lr_scheduler": None}
    for part, instance, values in (
        *(("optimizer", o, o.defaults if with_settings else {}) for o in trainer.optimizers),
        *(("lr_scheduler", c.scheduler, c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs),
    ):
        result[part] = _class_name(type(instance))
        for name, value in values.items():
            if isinstance(value, bool | int | float | str) and name not in SPEED and not name.startswith("_"):
                result[f"{part}.{name}"] = value
    return result


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


BEFORE_RECORDED = {"optimizer": _class_name(AdamW), "lr_scheduler": _class_name(LambdaLR)}  # in earlier versions


def check_same_start(saved: str | None, now: str | None, name: str) -> None:
    """Refuses a base model whose weights have changed since the checkpoint's run started from them.

    Args:
        saved: digest of its weights then; None in checkpoints of earlier versions.
        now: digest of its weights now; None if the module was given other weights before this run.

    Raises:
        UserError: they differ.
    """
    if None not in (saved, now) and saved != now:
        raise UserError(
            f"cannot resume: the weights of the model '{name}' have changed since the checkpoint's run began, so its "
            "reference would change too; put the former weights back, or start anew without --ckpt_path"
        )


def check_same_run(saved: dict[str, Any], now: dict[str, Any], scheduled: bool) -> None:
    """Refuses settings that would make the rest of the run differ, and warns of changes that are allowed.

    Args:
        saved: `settings` of the checkpoint's run.
        now: `settings` of this run.
        scheduled: the learning rate depends on the length of the run.

    Raises:
        UserError: a setting that must not change has changed.
    """
    changed = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    texts = {name: f"{name} was {was}, now it is {value}" for name, (was, value) in changed.items()}
    if refused := [text for name, text in texts.items() if name not in MAY_CHANGE]:
        raise UserError(
            f"cannot resume: this run's settings differ from the checkpoint's: {'; '.join(refused)}; set them back, or "
            "start anew without --ckpt_path"
        )
    if texts:
        stretched = scheduled and LENGTH & set(texts)
        note = "; the learning rate's schedule is laid over the new length" if stretched else ""
        rank_zero_warn(f"resuming with settings that differ from the checkpoint's: {'; '.join(texts.values())}{note}")
