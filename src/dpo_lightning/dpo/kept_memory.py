"""A callback that lets a fit on a CPU use the same memory in every step."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lightning.internals.libc import keep_freed, release_freed


class KeepMemory(Callback):
    """Keeps the memory that a step frees for the next one, until the fit ends, on Linux with glibc.

    The system would otherwise clear the same pages in every step (benchmarks/NOTES.md). `DPOModule` adds it to its
    runs. It changes nothing if the environment sets the allocator, as with `MALLOC_TRIM_THRESHOLD_`.
    """

    def __init__(self) -> None:
        self.keeps = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to keep memory, unless the tensors are on a GPU."""
        self.keeps = trainer.strategy.root_device.type == "cpu" and keep_freed()

    def on_fit_end(self, *args: Any) -> None:
        """Gives it back."""
        if self.keeps:
            release_freed()
        self.keeps = False

    on_exception = on_fit_end
