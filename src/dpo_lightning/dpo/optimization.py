"""The optimizer and the learning-rate schedule of a run: AdamW with a warm-up, or what the user chooses instead.

An optimizer is set as a class, as `functools.partial` of one, or as any function of parameter groups. A class gets the
run's own learning rate and weight decay unless it is given others, because its defaults suit other tasks.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from dpo_lightning.dpo.half_precision import check_trained_dtype
from dpo_lightning.dpo.schedules import rate_at
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.models.hub import first_line

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import LRSchedulerConfig

MakeOptimizer = Callable[[Iterable], Optimizer]
MakeScheduler = Callable[[Optimizer], LRScheduler]


def make_optimizer(make: MakeOptimizer, policy: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """The optimizer of all weights that train; weights with one dimension (biases, norms) do not decay.

    Raises:
        UserError: nothing is trainable, weights would be trained in 16 bits, or the optimizer refuses its settings.
    """
    trainable = [p for p in policy.parameters() if p.requires_grad]
    if not trainable:
        raise UserError("nothing is trainable: the policy's weights are frozen; unfreeze some, or set model.lora")
    check_trained_dtype(p.dtype for p in trainable)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim >= 2]},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    kind, arguments = (make.func, make.keywords) if isinstance(make, functools.partial) else (make, {})
    if isinstance(kind, type):
        make = functools.partial(make, **missing_arguments(kind, arguments, learning_rate, weight_decay))
    try:
        return make([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise UserError(f"the optimizer cannot be made: {first_line(error)}") from error


def missing_arguments(
    kind: type[Optimizer], given: Mapping[str, Any], learning_rate: float, weight_decay: float
) -> dict[str, Any]:
    """Arguments that make an optimizer train as `model.*` says, without those that are `given`.

    Raises:
        UserError: the weights are to decay, but this optimizer has no weight decay.
    """
    accepted = inspect.signature(kind).parameters
    if weight_decay and "weight_decay" not in accepted:
        raise UserError(f"model.weight_decay is {weight_decay}, but {kind.__name__} has no weight decay: set it to 0")
    arguments: dict[str, Any] = {"weight_decay": weight_decay}
    if not given.get("relative_step"):  # with which transformers' Adafactor finds its own learning rate
        arguments |= {"lr": learning_rate, "relative_step": False}
    if not given.get("foreach") and not given.get("differentiable"):
        arguments["fused"] = True
    return {name: value for name, value in arguments.items() if name in accepted and name not in given}


def clip_to_norm(optimizer: Optimizer, limit: float) -> Tensor:
    """Clips all gradients to a common norm, and returns the norm that they had, a scalar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
    # Saves a pass over all gradients where they stay as they are. A GPU would have to wait to find out.
    if norm.device.type != "cpu" or isinstance(norm, DTensor) or not norm <= limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def make_scheduler(
    make: MakeScheduler | None, optimizer: Optimizer, decay: str, warmup_steps: float, steps: float
) -> dict[str, Any]:
    """The learning rate's schedule as Lightning's `lr_scheduler` table; it advances at every optimizer step.

    ReduceLROnPlateau advances after every validation instead (`PlateauSchedule`).

    Args:
        make: the user's own schedule; None stands for a warm-up and then `decay`, a name in `DECAYS`.
        warmup_steps: optimizer steps; below 1, a share of `steps`.
        steps: of the whole run, infinite if it has no end.

    Raises:
        UserError: the scheduler refuses its settings, or the schedule needs a run that ends.
    """
    if make is not None:
        try:
            scheduler = make(optimizer)
        except (TypeError, ValueError) as error:
            raise UserError(f"the lr_scheduler cannot be made: {first_line(error)}") from error
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {"scheduler": scheduler, "interval": "step"}
        monitor = getattr(scheduler, "monitor", "val/loss")  # LightningCLI's class has it, torch's own does not
        return {"scheduler": scheduler, "monitor": monitor, "frequency": sys.maxsize}  # Lightning never advances it
    if steps == float("inf"):
        if decay != "constant" or 0 < warmup_steps < 1:
            raise UserError(
                "the run has no end (trainer.max_epochs and max_steps are -1), so no schedule can be laid over it: "
                "set one of them, or lr_scheduler_type: constant with a number of warmup_steps"
            )
        steps = 0
    warmup = round(warmup_steps * steps) if warmup_steps < 1 else int(warmup_steps)
    rate = functools.partial(rate_at, decay=decay, warmup_steps=warmup, steps=int(steps))
    return {"scheduler": LambdaLR(optimizer, rate), "interval": "step"}


class PlateauSchedule(Callback):
    """Advances ReduceLROnPlateau after each validation, before a checkpoint of it is written.

    Lightning would do so at the end of an epoch, or at every step with the metric of an old validation.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError for a misspelt `val/...` metric, before training starts."""
        for config in plateau_schedules(trainer):
            if trainer.callback_metrics and config.monitor.startswith("val/"):
                monitored(config.monitor, trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises UserError if such a schedule would never advance."""
        if plateau_schedules(trainer) and not sum(trainer.num_val_batches):
            raise UserError(
                "lr_scheduler is ReduceLROnPlateau, which follows validations, but this run has none: give "
                "data.val_size or data.val_dataset, or choose another lr_scheduler"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Advances the schedule. Raises UserError if its metric is not logged."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            for config in plateau_schedules(trainer):
                config.scheduler.step(monitored(config.monitor, trainer.callback_metrics))


def plateau_schedules(trainer: Trainer) -> list["LRSchedulerConfig"]:
    """The schedules of a run that follow a metric."""
    return [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]


def monitored(name: str, metrics: Mapping[str, Tensor]) -> float:
    """The value of the metric that `lr_scheduler.monitor` names.

    Raises:
        UserError: no such metric has been logged.
    """
    if name not in metrics:
        known = ", ".join(sorted(metrics)) + did_you_mean(name, metrics)
        raise UserError(f"lr_scheduler.monitor is '{name}': it must be one of {known}")
    return metrics[name].item()
