"""What we use of Lightning beyond its documented interface."""

import os
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningCLI
    from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
else:
    Logger = object

SEED_VARIABLE = "PL_GLOBAL_SEED"  # where `seed_everything` leaves the seed for other processes
RESTORING = {"_restore_modules_and_callbacks", "restore_training_state"}  # methods of Lightning's checkpoint connector

# ---------------------------------------------------------------------- trainer and module


def attached_trainer(module: "LightningModule") -> "Trainer | None":
    """The trainer of a module, None without one.

    Uses `LightningModule._trainer`: the public property `trainer` raises where there is none.
    """
    return module._trainer


def run_seed() -> str | None:
    """The seed of the run, None without one.

    Uses the environment variable that `seed_everything` sets: the trainer does not know its seed.
    """
    return os.environ.get(SEED_VARIABLE)


def cluster_environment(trainer: "Trainer") -> "ClusterEnvironment":
    """Where the run's processes were started from: SLURM, torchrun, one machine.

    Uses `Trainer._accelerator_connector`: strategies of one process do not tell.
    """
    return trainer._accelerator_connector.cluster_environment


def failed_restoring(error: BaseException) -> bool:
    """Whether an error was raised while Lightning restored a run from a checkpoint.

    Uses the names of two methods of its checkpoint connector, looked for in the traceback: no hook encloses them.
    """
    return any(frame.f_code.co_name in RESTORING for frame, _ in traceback.walk_tb(error.__traceback__))


def last_save(callback: "ModelCheckpoint") -> tuple[int, str]:
    """The optimizer step at which ModelCheckpoint last saved, and the file; (0, "") before.

    Uses `_last_global_step_saved` and `_last_checkpoint_saved`: `last_model_path` is of `save_last` alone.
    """
    return callback._last_global_step_saved, callback._last_checkpoint_saved


def skip_sigterm_broadcast(trainer: "Trainer") -> None:
    """Keeps Lightning from telling all ranks at each batch whether the first has received SIGTERM, which they wait for.

    Replaces `_broadcast_sigterm_tensor` of the batch loop: there is no setting. For a run with signal handlers of its
    own, under which Lightning receives none.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


# ---------------------------------------------------------------------- the fit loop's counters


def batch_index(trainer: "Trainer") -> int:
    """The number, within its epoch, of the training batch that was begun last; -1 before the first.

    Uses `fit_loop.batch_idx`: outside of a batch's own hooks the trainer does not tell.
    """
    return trainer.fit_loop.batch_idx


def total_batch_index(trainer: "Trainer") -> int:
    """As `batch_index`, counted over all epochs. Uses `fit_loop.total_batch_idx`."""
    return trainer.fit_loop.total_batch_idx


def batches_processed(trainer: "Trainer") -> int:
    """Training batches of this epoch that are done, but for `on_train_batch_end`.

    Uses the batch loop's progress: `batch_index` does not tell a batch that is done from one that is being trained on.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.current.processed


def set_fit_counters(loop: dict[str, Any], step: int, epoch: int, done: int, batches: int, by_steps: bool) -> None:
    """Sets the counters in a checkpoint's `loops.fit_loop`, so that a run resumes where its optimizer steps say.

    In the midst of an epoch they become what Lightning has in `on_train_batch_end` of the last batch; between two
    epochs, what it has before the next one begins. A run that is limited by steps always counts as restarted in
    Lightning, so there the last batch's counters are those of its `on_train_batch_end` too.

    Uses the layout of the loops' state: Lightning's own way of restoring it depends on the hook that saved, and loses
    count where several resumes follow each other.

    Args:
        loop: the state, changed in place.
        step: optimizer steps that are done.
        epoch: epochs that are complete.
        done: batches of the next epoch that are done.
        batches: in an epoch.
        by_steps: the run is limited by `max_steps`.
    """
    in_batch = done > 0 or by_steps and step > 0
    _set_counts(loop["epoch_progress"], (epoch, epoch), begun=done > 0)
    progress = loop["epoch_loop.batch_progress"]
    _set_counts(progress, (epoch * batches + done, done or (batches if in_batch else 0)))
    progress["is_last_batch"] = False
    for part in ("total", "current") if in_batch else ():
        progress[part]["completed"] -= 1
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step - in_batch
    _set_counts(loop["epoch_loop.val_loop.batch_progress"], (0, 0))
    loop["epoch_loop.val_loop.batch_progress"]["is_last_batch"] = False


def _set_counts(progress: dict[str, Any], counts: tuple[int, int], begun: bool = False) -> None:
    for part, count in zip(("total", "current"), counts, strict=True):
        progress[part] |= {"ready": count + begun, "started": count + begun, "processed": count, "completed": count}


# ---------------------------------------------------------------------- loggers with numbered folders


def is_open(logger: "TensorBoardLogger | CSVLogger") -> bool:
    """Whether a logger has made its writer. Uses `_experiment`: to ask for `experiment` makes it."""
    return logger._experiment is not None


def version_is_open(logger: "TensorBoardLogger | CSVLogger") -> bool:
    """Whether a logger is still to choose its version. Uses `_version`: to ask for `version` chooses it."""
    return logger._version is None


def set_version(logger: "TensorBoardLogger | CSVLogger", version: int) -> None:
    """Gives a logger a version other than the one it chose. Uses `_version`: it has no setter."""
    logger._version = version


class ChoosesVersion(Logger):
    """Base, before Lightning's, of a logger class that chooses its own next version.

    Overrides `_get_next_version`, which `version` of both loggers asks: there is no hook.
    """

    def _get_next_version(self) -> int:
        return self.next_version(super()._get_next_version)

    def next_version(self, lightnings: Callable[[], int]) -> int:
        """The version to take; `lightnings` gives Lightning's choice."""
        return lightnings()


# ---------------------------------------------------------------------- the command line


def configured_section(cli: "LightningCLI", name: str) -> Any:
    """A section of the parsed configuration, such as "trainer", of the subcommand where there is one.

    Uses `LightningCLI._get` and `config_init`: `config` has it as it was before classes were made.
    """
    return cli._get(cli.config_init, name)


def leave_callbacks_out(cli: "LightningCLI", names: set[str]) -> None:
    """Takes callbacks that have a section of their own in the configuration out of the run.

    Uses `LightningCLI._parser` and `callback_keys`: what `add_lightning_class_args` has added cannot be taken back.
    """
    keys = cli._parser(cli.subcommand).callback_keys
    keys[:] = [key for key in keys if key not in names]
