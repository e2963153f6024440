"""Lightning's loggers with a folder that only this run uses, however many runs start or resume at once.

A new folder is claimed by creating it: the second run takes the next number. An existing folder (of a resumed run, or
with a version chosen by the user) is locked until the run ends, and a second run that wants it is refused.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dpo_lightning.callbacks.checkpoint_files import version
from dpo_lightning.callbacks.context import NUMBERING, run_folder
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import ChoosesVersion, is_open, set_version, version_is_open
from dpo_lightning.models.hub import reason_of
from dpo_lightning.storage.locks import hold, in_use, let_go

LOCK = "run.lock"  # in the run's folder


class _OwnFolder(ChoosesVersion):
    """Claims a logger's folder before anything is written to it: when the run's first process creates its writer.

    By then the settings and the rows have been checked, so a run that fails those checks leaves no folder.
    """

    numbered: bool  # the version is chosen here: the next free one

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """As Lightning's.

        Raises:
            UserError: the folder cannot be created, or another run uses it.
        """
        if is_open(self) or "://" in str(self.save_dir):
            return super().experiment
        try:
            if self.numbered:
                os.makedirs(_expanded(self.root_dir), exist_ok=True)
                while not _created(self._folder()):
                    set_version(self, self.version + 1)
                super().experiment  # noqa: B018  # before the lock's file exists: CSVLogger wants an empty folder
            if hold(self._folder() / LOCK):
                return super().experiment
        except OSError as error:
            raise UserError(
                f"the run's folder '{self._folder()}' cannot be written: {reason_of(error)}; choose another with "
                "trainer.default_root_dir"
            ) from error
        raise in_use(str(self._folder()), "start a new run without --ckpt_path")

    def next_version(self, lightnings: Callable[[], int]) -> int:
        """Lightning's, which fails on folders such as `version_²`: those are ignored."""
        try:
            return lightnings()
        except ValueError:
            return max(map(version, _expanded(self.root_dir).glob("version_*")), default=-1) + 1

    def _folder(self) -> Path:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return _expanded(os.path.join(self.root_dir, version))

    def finalize(self, status: str) -> None:
        """As Lightning's, then unlocks the folder."""
        super().finalize(status)
        let_go(self._folder() / LOCK)


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _created(folder: Path) -> bool:
    """Creates a folder; False if it already exists."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


class OwnTensorBoardLogger(_OwnFolder, TensorBoardLogger):
    """A TensorBoardLogger that claims its folder."""


class OwnCSVLogger(_OwnFolder, CSVLogger):
    """A CSVLogger that claims its folder."""


OWN = {TensorBoardLogger: OwnTensorBoardLogger, CSVLogger: OwnCSVLogger}


def with_own_folder(logger: Logger) -> Logger:
    """The same logger, which claims its folder if it is of a class that numbers its folders."""
    kind = OWN.get(type(logger))
    if kind is None:
        return logger
    own: Any = kind.__new__(kind)
    vars(own).update(vars(logger), numbered=version_is_open(logger))
    return own


class SavedConfig(SaveConfigCallback):
    """Writes the configuration into the run's folder (`run_folder`), also where the logger has none for each run."""

    already_saved: bool

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As Lightning's, which would replace the configuration of an earlier run, or fail without any folder."""
        if trainer.logger is None or isinstance(trainer.logger, NUMBERING):
            super().setup(trainer, pl_module, stage)
            return
        folder = run_folder(trainer)  # a collective call
        if folder is not None and trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, folder / self.config_filename, skip_none=False, overwrite=True)
