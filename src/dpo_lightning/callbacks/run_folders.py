"""A Lightning logger -> the same with a folder that is this run's alone, however many runs start or resume at once.

A new folder is claimed by making it: who comes second takes the next number. A folder that is given, that of a run
that is resumed or one with a version of the user's choice, is locked until the run ends, and refused to a second run.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from dpo_lightning.callbacks.checkpoint_files import version
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import ChoosesVersion, is_open, set_version, version_is_open
from dpo_lightning.storage.locks import hold, let_go

LOCK = "run.lock"  # in the run's folder


class _OwnFolder(ChoosesVersion):
    """Claims a logger's folder before anything is written to it: when the run's first process makes its writer.

    That is after the command line and the rows were found right, so a run that ends there leaves no folder.
    """

    numbered: bool  # its version is the next free one

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """As Lightning's.

        Raises:
            UserError: the folder cannot be made, or another run is in it.
        """
        if is_open(self) or "://" in str(self.save_dir):
            return super().experiment
        try:
            if self.numbered:
                os.makedirs(_expanded(self.root_dir), exist_ok=True)
                while not _made(self._folder()):
                    set_version(self, self.version + 1)
                made = super().experiment  # before the lock's file is there: CSVLogger wants an empty folder
            if hold(self._folder() / LOCK):
                return made if self.numbered else super().experiment
        except OSError as error:
            raise UserError(
                f"the run's folder '{self._folder()}' cannot be written: {error.strerror or error}; choose another "
                "with trainer.default_root_dir"
            ) from error
        raise UserError(
            f"'{self._folder()}' is in use by a run that still goes on: wait for its end or stop it, or start a run of "
            "its own without --ckpt_path"
        )

    def next_version(self, lightnings: Callable[[], int]) -> int:
        """Lightning's, which falls over folders such as `version_²`: then they are passed over."""
        try:
            return lightnings()
        except ValueError:
            return max(map(version, _expanded(self.root_dir).glob("version_*")), default=-1) + 1

    def _folder(self) -> Path:
        version = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return _expanded(os.path.join(self.root_dir, version))

    def finalize(self, status: str) -> None:
        """As Lightning's; then the folder is free."""
        super().finalize(status)
        let_go(self._folder() / LOCK)


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(os.path.expandvars(path)))


def _made(folder: Path) -> bool:
    """Makes a folder; False where it is there already."""
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


class OwnTensorBoardLogger(_OwnFolder, TensorBoardLogger):
    """Lightning's, with a folder of its own."""


class OwnCSVLogger(_OwnFolder, CSVLogger):
    """Lightning's, with a folder of its own."""


OWN = {TensorBoardLogger: OwnTensorBoardLogger, CSVLogger: OwnCSVLogger}


def with_own_folder(logger: Logger) -> Logger:
    """The same logger, made to claim its folder if it is one of those that number theirs."""
    kind = OWN.get(type(logger))
    if kind is None:
        return logger
    own: Any = kind.__new__(kind)
    vars(own).update(vars(logger), numbered=version_is_open(logger))
    return own
