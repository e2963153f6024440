"""What makes a resumed run the very same run: its place in the data, its random state, and its own settings.

Where a run stands follows from its number of optimizer steps alone. A checkpoint's weights are those after its last
optimizer step, whenever it was written (also by a validation in the midst of an accumulation, or by SLURM's requeue
signal), so Lightning's counters of batches and epochs are set to what that number says (`settle`). Lightning's way of
restoring them depends on the hook that saved, and loses count where several resumes follow each other.
"""

import math
import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dpo_lightning.errors import UserError
from dpo_lightning.storage.states import check_amount, check_state, check_type

KEY = "dpo_lightning"  # in a checkpoint
STATE = {"run": dict, "batches": int | float, "metrics": {str: torch.Tensor}}
LENGTH = {"trainer.max_epochs", "trainer.max_steps"}
MAY_CHANGE = LENGTH | {"trainer.precision", "trainer.gradient_clip_val"}


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


def place(step: int, batches: int, accumulated: int) -> tuple[int, int]:
    """Whole epochs and batches of the next one that `step` optimizer steps have trained on.

    The last step of an epoch takes the batches that are left: 3 steps of 5 batches by 2 are one whole epoch (1, 0).
    """
    epoch, steps = divmod(step, math.ceil(batches / accumulated))
    return epoch, steps * accumulated


def note_step(trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
    """Keeps the training metrics as they are where an optimizer step begins, for `save` in the midst of it."""
    if batch_idx % trainer.accumulate_grad_batches == 0:
        module.metrics_at_step = {name: value.clone() for name, value in _metrics(module).items()}


def save(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Adds to a checkpoint what `load` needs: the run's settings, its start, and its metrics since the last log."""
    batches, done = trainer.num_training_batches, trainer.fit_loop.epoch_loop.batch_progress.current.processed
    metrics = _metrics(module)
    if batches != float("inf"):
        whole = place(trainer.global_step, batches, trainer.accumulate_grad_batches)[1] == done % batches
        metrics = metrics if whole else module.metrics_at_step
    of_all_ranks = {name: module.all_gather(value) for name, value in metrics.items()}
    checkpoint[KEY] = {
        "run": settings(trainer),
        "start": module.start_digest,
        "batches": batches,
        "metrics": of_all_ranks,
    }


def load(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Puts trainer and module where the checkpoint's run stood. Does nothing where nothing is trained.

    Raises:
        UserError: this run differs from the checkpoint's in what its rest would depend on.
        ValueError: the checkpoint's part is not as `save` made it.
    """
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if KEY not in checkpoint:
        raise ValueError(f"it has no {KEY}")
    saved, step = checkpoint[KEY], checkpoint["global_step"]
    check_state(saved, STATE, "the state to resume from")
    check_type(saved.get("start"), str | None, "the digest of its start")  # of earlier versions there is none
    if saved["batches"] < 1:
        raise ValueError(f"its batches are {saved['batches']}")
    for schedule in checkpoint.get("lr_schedulers", ()):
        check_schedule(schedule)
    check_same_run(saved["run"], settings(trainer), _scheduled(module))
    check_same_start(saved.get("start"), module.start_digest, module.hparams.name_or_path)
    module.batches_before = saved["batches"]
    for name, progress in checkpoint["loops"]["fit_loop"].items():
        if name.endswith("progress"):
            check_counts(progress, name)
    if saved["batches"] != float("inf"):
        settle(
            checkpoint["loops"]["fit_loop"],
            step,
            saved["batches"],
            trainer.accumulate_grad_batches,
            by_steps=trainer.max_steps != -1,
        )
    ours = _metrics(module)
    for name, value in saved["metrics"].items():
        own = value[trainer.global_rank] if trainer.world_size > 1 else value
        if name not in ours or own.shape != ours[name].shape or not own.isfinite().all():
            raise ValueError(f"the metric {name!r} is not one that is kept")
        setattr(module.train_metrics, name, own.to(module.device, torch.float32))


def check_restored(trainer: Trainer, module: LightningModule) -> None:
    """Raises UserError where what was restored is not of one step, skipped ones aside, or not of this run's data."""
    steps, wrong = trainer.global_step - module.skipped.total, None
    for schedule in (config.scheduler for config in trainer.lr_scheduler_configs):
        if isinstance(schedule, LambdaLR):
            if schedule.last_epoch != steps:
                wrong = f"is of step {steps}, but its learning rate of step {schedule.last_epoch}"
            elif schedule.base_lrs != [group["initial_lr"] for group in schedule.optimizer.param_groups]:
                wrong = "has two learning rates, the optimizer's and the schedule's"
    if module.batches_before not in (None, trainer.num_training_batches):
        wrong = f"has {module.batches_before} batches in an epoch, these data have {trainer.num_training_batches}"
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
    check_state(schedule, {"base_lrs": [float], "last_epoch": int, "_last_lr": [float]}, "the schedule")
    for rate in (*schedule["base_lrs"], *schedule["_last_lr"], schedule["last_epoch"]):
        check_amount(rate, "a number of the schedule")
    if taken := [name for name in schedule if callable(getattr(LRScheduler, name, None)) or name == "optimizer"]:
        raise ValueError(f"the schedule has a state for {taken[0]!r}")


def _metrics(module: LightningModule) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.train_metrics.metric_state.items() if torch.is_tensor(value)}


def settle(loop: dict[str, Any], step: int, batches: int, accumulated: int, by_steps: bool) -> None:
    """Sets the counters in a checkpoint of Lightning's fit loop to what the number of optimizer steps says.

    In the midst of an epoch they are as Lightning has them in `on_train_batch_end` of the last batch. Between two
    epochs they are as before the next one begins; a run that is limited by steps (`by_steps`) always counts as
    restarted in Lightning, so there the last batch's counters are those of its `on_train_batch_end` too.
    """
    epoch, done = place(step, batches, accumulated)
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


def settings(trainer: Trainer) -> dict[str, Any]:
    """What decides how a run goes on, by the name under which it is configured."""
    data = getattr(trainer.datamodule, "identity", dict)()
    return data | {
        "seed_everything": os.environ.get("PL_GLOBAL_SEED"),
        "number of processes": trainer.world_size,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.max_steps": trainer.max_steps,
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
    }


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


def _scheduled(module: LightningModule) -> bool:
    """Whether the learning rate depends on how long the run is."""
    h = module.hparams
    return h.lr_scheduler_type != "constant" or 0 < h.warmup_steps < 1


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
