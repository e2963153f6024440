"""What makes a resumed run the very same run: where it stands in the data, its random state, and its own settings.

Where a run stands follows from its number of optimizer steps alone. A checkpoint's weights are those after its last
optimizer step, whenever it was written (also by a validation in the midst of an accumulation, or by SLURM's requeue
signal), so Lightning's counters of batches and epochs are set to what that number says (`set_counters`). Lightning's
way of restoring them depends on the hook that saved, and loses count where several resumes follow each other.
"""

import math
import os
import random
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dpo_lightning.errors import UserError
from dpo_lightning.storage.states import check_amount, check_state, check_type

if TYPE_CHECKING:
    from dpo_lightning.data.batching import PairBatch
    from dpo_lightning.dpo.module import DPOModule

KEY = "dpo_lightning"  # in a checkpoint
STATE = {"run": dict, "batches": int | float, "metrics": {str: torch.Tensor}}
LENGTH = {"trainer.max_epochs", "trainer.max_steps"}
MAY_CHANGE = LENGTH | {"trainer.precision", "trainer.gradient_clip_val"}
SPEED = {"fused", "foreach", "capturable", "differentiable"}  # an optimizer's settings that change no step it makes


class Resume(Callback):
    """Makes each batch's random state reproducible, and puts a run that is resumed where its checkpoint stood.

    `DPOModule` brings it along. Lightning restores callbacks before it restores loops, optimizers and schedules, so
    what these would take from the checkpoint is checked and corrected here first.
    """

    def __init__(self) -> None:
        self._metrics_at_step: dict[str, torch.Tensor] = {}  # the training metrics where the present step began
        self._batches: float | None = None  # in an epoch of the run that is resumed
        self._optimization: dict[str, Any] | None = None  # of this run, before anything is restored
        self._loaded: dict[str, Any] | None = None  # the checkpoint that is resumed

    def setup(self, trainer: Trainer, pl_module: "DPOModule", stage: str) -> None:
        """Forgets the run before."""
        self.__init__()

    def on_fit_start(self, trainer: Trainer, pl_module: "DPOModule") -> None:
        """Notes how this run optimizes, before the checkpoint's states replace its own."""
        self._optimization = optimization(trainer, with_settings=pl_module.make_optimizer is not None)
        self._check_optimization(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: "DPOModule") -> None:
        """Raises UserError where what was restored is not of one step, or not of this run's data."""
        if trainer.ckpt_path and self._loaded is None:
            raise UserError(f"--ckpt_path '{trainer.ckpt_path}' has no states of callbacks: it was edited")
        if trainer.ckpt_path:
            check_restored(trainer, pl_module.skipped.total, self._batches)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: "DPOModule", batch: "PairBatch", batch_idx: int
    ) -> None:
        """Seeds the batch; where an optimizer step begins, keeps the metrics for a checkpoint in the midst of it."""
        seed_batch(trainer)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._metrics_at_step = {name: value.clone() for name, value in _metrics(pl_module).items()}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: "DPOModule", checkpoint: dict[str, Any]) -> None:
        """Adds what `on_load_checkpoint` needs: the run's settings, its start, and its metrics since the last log."""
        batches, done = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.processed
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
        """Checks what a training run is to be resumed from, and sets its counters right. Else does nothing.

        Raises:
            UserError: this run differs from the checkpoint's in what its rest would depend on.
            ValueError: the checkpoint's part is not as `on_save_checkpoint` made it.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if KEY not in checkpoint:
            raise ValueError(f"it has no {KEY}")
        saved, loop = checkpoint[KEY], checkpoint["loops"]["fit_loop"]
        check_state(saved, STATE, "what the run is resumed from")
        check_type(saved.get("start"), str | None, "the digest of its start")  # of earlier versions there is none
        check_type(saved.get("optimization"), dict | None, "its optimization")  # the same
        if saved["batches"] < 1:
            raise ValueError(f"its batches are {saved['batches']}")
        for schedule in checkpoint["lr_schedulers"]:
            check_schedule(schedule)
        check_same_run(saved["run"], settings(trainer, pl_module), pl_module.schedule_needs_length)
        check_same_start(saved.get("start"), pl_module.start_digest, pl_module.hparams.name_or_path)
        for name, progress in loop.items():
            if name.endswith("progress"):
                check_counts(progress, name)
        self._batches, self._loaded = saved["batches"], checkpoint
        self._check_optimization(trainer)
        if self._batches != float("inf"):
            step, accumulated = checkpoint["global_step"], trainer.accumulate_grad_batches
            set_counters(loop, step, self._batches, accumulated, by_steps=trainer.max_steps != -1)
        ours = _metrics(pl_module)
        for name, value in saved["metrics"].items():
            own = value[trainer.global_rank] if trainer.world_size > 1 else value
            if name not in ours or own.shape != ours[name].shape or not own.isfinite().all():
                raise ValueError(f"the metric {name!r} is not one that is kept")
            setattr(pl_module.train_metrics, name, own.to(pl_module.device, torch.float32))

    def _check_optimization(self, trainer: Trainer) -> None:
        """Once both are known: sharded runs restore after their optimizer is made, all others before."""
        if self._loaded is None or self._optimization is None:
            return
        saved = self._loaded[KEY].get("optimization") or EARLIER
        common = {name: value for name, value in self._optimization.items() if name in saved}
        check_same_run(saved, common, scheduled=False)
        try:
            for schedule, config in zip(self._loaded["lr_schedulers"], trainer.lr_scheduler_configs, strict=False):
                check_kinds(schedule, config.scheduler.state_dict())
        except ValueError as error:
            raise UserError(
                f"--ckpt_path '{trainer.ckpt_path}': {error}: it was edited; go on from another one"
            ) from error


def seed_batch(trainer: Trainer) -> None:
    """Makes the random state of a batch a function of the run's seed, the batch's number and the rank.

    No random state is in a checkpoint then, and nothing that happened between two batches changes what follows.
    """
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    batch, rank = trainer.fit_loop.total_batch_idx, trainer.global_rank
    state = int(np.random.SeedSequence((seed, batch, rank)).generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


def position(step: int, batches: int, accumulated: int) -> tuple[int, int]:
    """Whole epochs and batches of the next one that `step` optimizer steps have trained on.

    The last step of an epoch takes the batches that are left: 3 steps of 5 batches by 2 are one whole epoch (1, 0).
    """
    epoch, steps = divmod(step, math.ceil(batches / accumulated))
    return epoch, steps * accumulated


def check_restored(trainer: Trainer, skipped: int, batches: float | None) -> None:
    """Refuses a checkpoint whose parts do not belong together.

    Args:
        skipped: optimizer steps that the gradient scaler left out, which no schedule has counted.
        batches: in an epoch of the checkpoint's run.

    Raises:
        UserError: what was restored is not of one step, or not of this run's data.
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
    """Raises ValueError where one of a loop's counters, however deep, is no number of 0 or more."""
    if isinstance(progress, dict):
        for key, part in progress.items():
            check_counts(part, f"{name} {key}")
    elif not isinstance(progress, bool):
        check_amount(progress, name)


def check_schedule(schedule: Any) -> None:
    """Raises ValueError where a schedule's state is not one: PyTorch puts all names in it into the schedule itself."""
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
    """Raises ValueError where a schedule's state has a value of another type than in one that was just made."""
    for name, value in fresh.items():
        if name in saved and value is not None:
            kind = int | float if type(value) in (int, float) else type(value)
            check_type(saved[name], list | tuple if kind in (list, tuple) else kind, f"the schedule's {name}")


def _metrics(module: "DPOModule") -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.train_metrics.metric_state.items() if torch.is_tensor(value)}


def set_counters(loop: dict[str, Any], step: int, batches: int, accumulated: int, by_steps: bool) -> None:
    """Sets the counters in a checkpoint of Lightning's fit loop to what the number of optimizer steps says.

    In the midst of an epoch they are as Lightning has them in `on_train_batch_end` of the last batch. Between two
    epochs they are as before the next one begins; a run that is limited by steps (`by_steps`) always counts as
    restarted in Lightning, so there the last batch's counters are those of its `on_train_batch_end` too.
    """
    epoch, done = position(step, batches, accumulated)
    total, in_batch = epoch * batches + done, done > 0 or by_steps and step > 0
    _count(loop["epoch_progress"], (epoch, epoch), begun=done > 0)
    progress = loop["epoch_loop.batch_progress"]
    _count(progress, (total, done or (batches if in_batch else 0)))
    progress["is_last_batch"] = False
    for part in ("total", "current") if in_batch else ():
        progress[part]["completed"] -= 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - in_batch
    _count(loop["epoch_loop.val_loop.batch_progress"], (0, 0))
    loop["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False


def _count(progress: dict[str, Any], counts: tuple[int, int], begun: bool = False) -> None:
    for part, count in zip(("total", "current"), counts, strict=True):
        progress[part] |= {"ready": count + begun, "started": count + begun, "processed": count, "completed": count}


# ---------------------------------------------------------------------- the same run?


def settings(trainer: Trainer, module: "DPOModule") -> dict[str, Any]:
    """What decides how a run goes on, by the name under which it is configured."""
    return (module.data.identity() if module.data else {}) | {
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        "number of processes": trainer.world_size,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
    }


def optimization(trainer: Trainer, with_settings: bool) -> dict[str, Any]:
    """The optimizer and schedule of a run that has not begun: their classes and their plain settings.

    Args:
        with_settings: the optimizer's too; where it is the module's own, they follow from hyperparameters.
    """
    return {"optimizer": None, "lr_scheduler": None} | dict(
        entry
        for what, made, values in (
            *(("optimizer", o, o.defaults if with_settings else {}) for o in trainer.optimizers),
            *(("lr_scheduler", c.scheduler, c.scheduler.state_dict()) for c in trainer.lr_scheduler_configs),
        )
        for entry in _described(what, made, values)
    )


def _described(what: str, made: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield what, _class_name(type(made))
    for name, value in values.items():
        if isinstance(value, bool | int | float | str) and name not in SPEED and not name.startswith("_"):
            yield f"{what}.{name}", value


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


EARLIER = {"optimizer": _class_name(AdamW), "lr_scheduler": _class_name(LambdaLR)}  # of checkpoints that do not say it


def check_same_start(saved: str | None, now: str | None, name: str) -> None:
    """Refuses a model whose weights are others than those that the checkpoint's run started from.

    Args:
        saved: the digest of those; None in a checkpoint that was written before there was one.
        now: of the model as it was loaded for this run; None where the module had been given other weights first.

    Raises:
        UserError: they differ.
    """
    if None not in (saved, now) and saved != now:
        raise UserError(
            f"cannot resume: the weights of the model '{name}' have changed since the checkpoint's run began, so its "
            "reference would be another one; put the former weights back, or start anew without --ckpt_path"
        )


def check_same_run(saved: dict[str, Any], now: dict[str, Any], scheduled: bool) -> None:
    """Refuses what would make the rest of the run another one, and says what differs without that.

    Args:
        saved: `settings` of the checkpoint's run.
        now: of this one.
        scheduled: the learning rate depends on the length of the run.

    Raises:
        UserError: a difference that matters.
    """
    changed = {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}
    texts = {name: f"{name} was {was}, now it is {value}" for name, (was, value) in changed.items()}
    if matters := [text for name, text in texts.items() if name not in MAY_CHANGE]:
        raise UserError(
            f"cannot resume: this run's settings differ from the checkpoint's: {'; '.join(matters)}; set them back, or "
            "start anew without --ckpt_path"
        )
    if texts:
        relaid = (
            "; the learning rate's schedule is laid over the new length" if scheduled and LENGTH & set(texts) else ""
        )
        rank_zero_warn(f"resuming with settings that differ from the checkpoint's: {'; '.join(texts.values())}{relaid}")
