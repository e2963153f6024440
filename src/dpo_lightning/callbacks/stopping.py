"""On SIGTERM or Ctrl-C a run finishes its step, saves and ends; SLURM's requeue waits for the step as well."""

import signal
import threading
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dpo_lightning.callbacks.agreement import Agreement
from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.context import find_callback
from dpo_lightning.errors import Stopped
from dpo_lightning.internals.lightning import cluster_environment, skip_sigterm_broadcast

ENDING: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class StoppingCallback(Callback):
    """Notes signals during training and acts on them between two steps, on all processes after the same step.

    With several processes that is a step later than with one (`Agreement`).

    SIGTERM and the first Ctrl-C save `last.ckpt` and end the run (`Stopped`); a second Ctrl-C ends it at once. SLURM's
    requeue signal, if Lightning handles it, saves and requeues as Lightning does, but never in the middle of a step.
    """

    def __init__(self) -> None:
        self._noted = self._announced = 0  # signal numbers
        self._agreed = Agreement()
        self._before: dict[int, Any] = {}  # the replaced handlers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replaces the signal handlers, Lightning's included, and spares the run its broadcast at each batch.

        Raises:
            SIGTERMException: a process has received SIGTERM before.
        """
        self._agreed = Agreement()
        if threading.current_thread() is not threading.main_thread():
            return  # only the main thread may set handlers
        signals = [*ENDING]
        environment = cluster_environment(trainer)
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            signals.append(environment.requeue_signal)
        self._before = {number: signal.signal(number, self._note) for number in signals}
        if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
            raise SIGTERMException
        skip_sigterm_broadcast(trainer)

    def _note(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self._noted == number:
            raise Stopped(number)
        self._noted = number

    def _announce(self, *args: Any, **kwargs: Any) -> None:
        """Announces a noted signal once. Not done in the handler, which could interrupt another print."""
        number = self._noted
        if number in ENDING and number != self._announced:
            self._announced = number
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            rank_zero_info(f"\n{ENDING[number]}: finishing this step{again}")

    # At a batch's end before replies are shown; a validation is finished before the signal is acted on.
    on_after_backward = on_train_batch_end = on_validation_batch_start = _announce

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Announces a noted signal and, if an optimizer step is complete, acts on it."""
        self._announce()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._act(trainer)

    def _act(self, trainer: Trainer) -> None:
        number = self._agreed(trainer, self._noted)
        if not number:
            return
        if number not in ENDING:
            self._noted, self._agreed = 0, Agreement()  # the word that is on its way is of the same signal
            self._before[number](number, None)
            return
        if last := find_callback(trainer, LastCheckpoint):
            last.save(trainer)
        raise Stopped(number, trainer.global_step)

    def on_train_end(self, *args: Any) -> None:
        """Restores the signal handlers, also after an error."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    on_exception = on_train_end
