"""16-mixed: the run's gradient scaler, and the optimizer steps that it skips because gradients overflowed float16."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer

from dpo_lightning.internals.torch import leave_unscaling_to_lightning

if TYPE_CHECKING:
    from torch.amp import GradScaler

# Each skip halves the scale, so this many lead from its first value (65,536) to 1, where it no longer scales at all.
MAX_SKIPS_IN_A_ROW = 16


def gradient_scaler(trainer: Trainer) -> "GradScaler | None":
    """The scaler that multiplies the loss so that float16 gradients do not vanish; None in other precisions."""
    return getattr(trainer.precision_plugin, "scaler", None)


def unscale_before_clipping(trainer: Trainer) -> None:
    """Makes Lightning unscale gradients right after the backward pass, before hooks and clipping.

    Otherwise a fused optimizer would unscale them in its own step, after clipping.
    """
    if gradient_scaler(trainer) is not None:
        for optimizer in trainer.optimizers:
            leave_unscaling_to_lightning(optimizer)


class SkippedSteps:
    """Counts the optimizer steps that a gradient scaler skips. A few are normal while it finds its scale."""

    def __init__(self) -> None:
        self.total = 0  # of the run, including the part before it was resumed
        self.in_a_row = 0

    @contextmanager
    def counting(self, trainer: Trainer) -> Iterator[None]:
        """Encloses one optimizer step, and counts it if the scaler lowers its scale, which it does when it skips one.

        Reading the scale waits for the device, as the scaler itself does in every step.
        """
        scaler = gradient_scaler(trainer)
        before = scaler.get_scale() if scaler else 0.0
        yield
        skipped = scaler is not None and scaler.get_scale() < before
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
