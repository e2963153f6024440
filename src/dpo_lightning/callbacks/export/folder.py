"""Folder to export to -> whether it may be written, and a way to write it in which nothing of the user's is lost.

A folder that is there already is replaced only where a previous export wrote all that is in it (`atomic_folder`).
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
        folder: where to.
        kept: folders that it must not be, hold or lie in, with what they are for the message.
        chosen: the user named it; else it is the run's own, which may lie in what the user keeps a run in.
    """

    folder: Path
    kept: tuple[tuple[str, Path], ...] = ()
    chosen: bool = True

    def check(self) -> None:
        """Raises:
        UserError: writing it would replace or mix with something that no export wrote.
        """
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
            return "it is the working directory or holds it"
        for what, kept in self.kept:
            kept = kept.expanduser().resolve()
            if _lies_in(kept, folder):
                return f"it is or holds {what} '{kept}'"
            if self.chosen and _lies_in(folder, kept) and not _lies_in(here, kept):
                return f"it lies in {what} '{kept}'"
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            return f"nothing can be written in '{parent}'"
        found = foreign(folder, MANIFEST) if folder.is_dir() else None
        return found and f"it holds '{found}', which is not as an export left it, and nothing is deleted"

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A fresh folder to write into, which becomes this one once all of it is written.

        Raises:
            UserError: as `check`, or the folder cannot be written.
        """
        self.check()
        try:
            with atomic_folder(self.folder.resolve(), MANIFEST) as partial:
                yield partial
        except (OSError, SafetensorError) as error:
            raise UserError(f"the model cannot be written to '{self.folder}': {reason_of(error)}") from error


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, also under another name of it (letters' case, a mount)."""
    exists = folder.exists()
    return any(one == folder or exists and one.exists() and one.samefile(folder) for one in (path, *path.parents))
