"""The optimizer and the learning-rate schedule of a run: AdamW with a warm-up, or what the user gives in their place.

An optimizer is given as a class, as `functools.partial` of one, or as any function of parameter groups. A class gets
the run's own learning rate and weight decay wherever it is not given others: its defaults suit other tasks.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from dpo_lightning.dpo.half_precision import check_trained_dtype
from dpo_lightning.dpo.schedules import rate_at
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.models.hub import first_line

MakeOptimizer = Callable[[Iterable], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def make_optimizer(
    given: MakeOptimizer | None, policy: nn.Module, learning_rate: float, weight_decay: float
) -> Optimizer:
    """The optimizer of all weights that train; weights in one dimension (biases, norms) do not decay.

    Args:
        given: what makes it; None stands for AdamW.

    Raises:
        UserError: nothing is trainable, weights would be trained in 16 bits, or the optimizer refuses its settings.
    """
    trainable = [p for p in policy.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("nothing is trainable: the policy's weights are frozen; unfreeze some, or set model.lora")
    check_trained_dtype(p.dtype for p in trainable)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = AdamW if given is None else given
    kind, arguments = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
    if isinstance(kind, type):
        make = functools.partial(make, **missing_arguments(kind, arguments, learning_rate, weight_decay))
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the optimizer cannot be made: {first_line(error)}") from error


def missing_arguments(
    kind: type[Optimizer], given: Mapping[str, Any], learning_rate: float, weight_decay: float
) -> dict[str, Any]:
    """What an optimizer's constructor still needs to train as `model.*` says, where `given` does not say otherwise.

    Raises:
        UserError: the weights are to decay, but this optimizer knows no decay.
    """
    accepted = inspect.signature(kind).parameters
    if weight_decay and "weight_decay" not in accepted:
        raise UserError(f"model.weight_decay is {weight_decay}, but {kind.__name__} has no weight decay: set it to 0")
    wanted: dict[str, Any] = {"weight_decay": weight_decay}
    if not given.get("relative_step"):  # of transformers' Adafactor, which then has a learning rate of its own
        wanted |= {"lr": learning_rate, "relative_step": False}
    if not given.get("foreach") and not given.get("differentiable"):
        wanted["fused"] = True
    return {name: value for name, value in wanted.items() if name in accepted and name not in given}


def make_scheduler(
    given: MakeScheduler | None, optimizer: Optimizer, schedule: str, warmup_steps: float, steps: float
) -> dict[str, Any]:
    """The learning rate's schedule as Lightning's `lr_scheduler` table; it moves at every optimizer step.

    ReduceLROnPlateau moves after every validation instead (`PlateauSchedule`).

    Args:
        given: what makes it; None stands for a warm-up and then `schedule`, a name in `SCHEDULES`.
        warmup_steps: optimizer steps; below 1, a share of `steps`.
        steps: of the whole run, infinite where it has no end.

    Raises:
        UserError: the scheduler refuses its settings, or the schedule needs a run that ends.
    """
    if given is not None:
        try:
            scheduler = given(optimizer)
        except (TypeError, ValueError) as error:
            raise UserError(f"the lr_scheduler cannot be made: {first_line(error)}") from error
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {"scheduler": scheduler, "interval": "step"}
        monitor = getattr(scheduler, "monitor", "val/loss")  # torch's own class has none
        return {"scheduler": scheduler, "monitor": monitor, "frequency": sys.maxsize}  # never moved by Lightning
    if steps == float("inf"):
        if schedule != "constant" or 0 < warmup_steps < 1:
            raise UserError(
                "the run has no end (trainer.max_epochs and max_steps are -1), so no schedule can be laid over it: "
                "set one of them, or lr_scheduler_type: constant with a number of warmup_steps"
            )
        steps = 0
    warmup = round(warmup_steps * steps) if warmup_steps < 1 else int(warmup_steps)
    rate = functools.partial(rate_at, schedule=schedule, warmup_steps=warmup, steps=int(steps))
    return {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}


class PlateauSchedule(Callback):
    """Moves ReduceLROnPlateau after each validation, before a checkpoint of it is written.

    Lightning would do so at the end of an epoch, or at every step with the metric of an old validation.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError where such a schedule would wait for ever."""
        if not sum(trainer.num_val_batches) and any(
            config.reduce_on_plateau for config in trainer.lr_scheduler_configs
        ):
            raise UserError(
                "lr_scheduler is ReduceLROnPlateau, which follows validations, but this run has none: give "
                "data.val_size or data.val_dataset, or choose another lr_scheduler"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands the schedule its metric.

        Raises:
            UserError: no metric of that name is logged.
        """
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau:
                metrics = trainer.callback_metrics
                if config.monitor not in metrics:
                    known = ", ".join(sorted(metrics)) + did_you_mean(config.monitor, metrics)
                    raise UserError(f"lr_scheduler.monitor is '{config.monitor}': it must be one of {known}")
                config.scheduler.step(metrics[config.monitor].item())
