"""16-mixed: the run's gradient scaler, and how many optimizer steps it skips because a gradient overflowed float16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from dpo_lightning.internals.torch import leave_unscaling_to_lightning

if TYPE_CHECKING:
    from torch.amp import GradScaler

# Each skip halves the scale, so that many lead from the first one (65,536) to 1: gradients overflow even unscaled.
MAX_SKIPS_IN_A_ROW = 16


def gradient_scaler(trainer: Trainer) -> "GradScaler | None":
    """The scaler of the run's precision, which multiplies the loss so that float16 gradients do not vanish."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscale_before_clipping(trainer: Trainer) -> None:
    """Lets Lightning unscale gradients right after the backward pass, before hooks, norm and clipping see them.

    A fused optimizer says of itself that it unscales in its own step, which is after clipping.
    """
    if gradient_scaler(trainer) is not None:
        for optimizer in trainer.optimizers:
            leave_unscaling_to_lightning(optimizer)


class SkippedSteps:
    """Counts optimizer steps that a gradient scaler skips: a few are normal while it looks for its scale."""

    def __init__(self) -> None:
        self.total = 0  # of the run, also of what it goes on from
        self.in_a_row = 0  # up to now

    @contextmanager
    def counting(self, trainer: Trainer) -> Iterator[None]:
        """Around one optimizer step: looks whether it was skipped, which is where the scaler lowers its scale.

        That waits for the device, as the scaler itself does in every step.
        """
        scaler = gradient_scaler(trainer)
        before = scaler.get_scale() if scaler else 0.0
        yield
        skipped = scaler is not None and scaler.get_scale() < before
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
