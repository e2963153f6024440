"""SIGTERM and Ctrl-C -> the step is finished and saved, then the run ends; SLURM's requeue waits for the step too."""

import signal
import threading
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.context import find_callback
from dpo_lightning.errors import Stopped
from dpo_lightning.internals.lightning import cluster_environment

ENDING = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppingCallback(Callback):
    """While it trains, a signal only takes a note; it is acted on between two steps, by all processes at the same one.

    SIGTERM and the first Ctrl-C save `last.ckpt` and end the run (`Stopped`). A second Ctrl-C ends it at once. SLURM's
    requeue signal, if Lightning handles it, saves and requeues in Lightning's way, but no longer within a step.
    """

    def __init__(self) -> None:
        self._noted = self._announced = 0  # the number of a signal
        self._before: dict[int, Any] = {}  # handlers that were replaced

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes over the signals, after Lightning has."""
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may
        signals = [*ENDING]
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signals.append(environment.requeue_signal)
        self._before = {number: signal.signal(number, self._note) for number in signals}

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._noted == number:
            raise Stopped(number)
        self._noted = number

    def _announce(self) -> None:
        """Announces once what was noted. Not in the handler: printing in the midst of a print would spoil both."""
        number = self._noted
        if number in ENDING and number != self._announced:
            self._announced = number
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            rank_zero_info(f"\n{ENDING[number]}: finishing this step{again}")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Announces what was noted."""
        self._announce()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Announces what was noted, before others show replies or validate."""
        self._announce()

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Announces what was noted: a validation is finished first."""
        self._announce()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Announces what was noted and, where an optimizer step is complete, acts on it."""
        self._announce()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._act(trainer)

    def _act(self, trainer: Trainer) -> None:
        number = self._noted
        if trainer.world_size > 1:
            noted = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(noted, reduce_op="max"))
        if not number:
            return
        if number not in ENDING:
            self._noted = 0
            self._before[number](number, None)
            return
        if last := find_callback(trainer, LastCheckpoint):
            last.save(trainer)
        raise Stopped(number, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
