"""Checks whether a folder may be written by an export, and writes it without loss of the user's files.

An existing folder is replaced only if a previous export wrote all its content (`atomic_folder`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import reason_of
from dpo_lightning.storage.atomic import atomic_folder, foreign

MANIFEST = "dpo_lightning_export.json"


class Target(NamedTuple):
    """A folder to write.

    Attributes:
        folder: its path.
        kept: folders that it must not equal, contain or lie in, each after its description for messages.
        chosen: the user named it; otherwise it is the run's own, which may lie in a folder of `kept`.
    """

    folder: Path
    kept: tuple[tuple[str, Path], ...] = ()
    chosen: bool = True

    def check(self) -> None:
        """Raises UserError if writing it would replace, or mix with, anything that no export wrote."""
        try:
            reason = self._refusal()
        except OSError as error:
            reason = reason_of(error)
        if reason:
            raise UserError(f"the model cannot be written to '{self.folder}': {reason}; choose another folder")

    def _refusal(self) -> str | None:
        if self.folder.is_symlink():
            return "it is a symbolic link"
        if self.folder.exists() and not self.folder.is_dir():
            return "it is a file"
        folder, here = self.folder.resolve(), Path.cwd()
        if _lies_in(here, folder):
            return "it is the working directory or contains it"
        for name, kept in self.kept:
            kept = kept.expanduser().resolve()
            if _lies_in(kept, folder):
                return f"it is or contains {name} '{kept}'"
            if self.chosen and _lies_in(folder, kept) and not _lies_in(here, kept):
                return f"it lies in {name} '{kept}'"
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            return f"nothing can be written in '{parent}'"
        found = foreign(folder, MANIFEST) if folder.is_dir() else None
        return found and f"it contains '{found}', which is not as an export left it, and nothing is deleted"

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A new folder to write into, which becomes this one when the block ends.

        Raises:
            UserError: as in `check`, or the folder cannot be written.
        """
        self.check()
        try:
            with atomic_folder(self.folder.resolve(), MANIFEST) as partial:
                yield partial
        except (OSError, SafetensorError) as error:
            raise UserError(f"the model cannot be written to '{self.folder}': {reason_of(error)}") from error


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, under whatever name (other case of letters, a mount)."""
    exists = folder.exists()
    return any(one == folder or exists and one.exists() and one.samefile(folder) for one in (path, *path.parents))
