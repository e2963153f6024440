"""Folder to export to -> whether it may be written, and a way to write it in which nothing of the user's is lost.

What stands in a folder is replaced only where a previous export wrote all of it. A manifest says so, which is written
with each export: the SHA-256 of each of its files.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line
from dpo_lightning.storage.digests import file_digest

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
            reason = error.strerror or first_line(error)
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
        parent = next(place for place in folder.parents if place.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            return f"nothing can be written in '{parent}'"
        found = foreign(folder) if folder.is_dir() else None
        return found and f"it holds '{found}', which is not as an export left it, and nothing is deleted"

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """A fresh folder to write into, beside this one, whose place it takes once all of it is written.

        Raises:
            UserError: as `check`, or the folder cannot be written.
        """
        self.check()
        folder = self.folder.resolve()
        partial = _beside(folder, "partial")
        try:
            partial.mkdir(parents=True)
            yield partial
            _write_manifest(partial)
            self._take_place(partial, folder)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"the model cannot be written to '{self.folder}': {reason}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _take_place(self, partial: Path, folder: Path) -> None:
        """Looks once more when the old folder is out of the way, so that what came since the check is seen too."""
        self.check()
        if not folder.exists():
            partial.rename(folder)
            return
        old = _beside(folder, "old")
        folder.rename(old)
        try:
            if found := foreign(old):
                raise UserError(f"'{folder / found}' came while the model was written: nothing is replaced")
            partial.rename(folder)
        except BaseException:
            old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def foreign(folder: Path) -> str | None:
    """The first thing in a folder that is not as an export left it, None where there is nothing such."""
    files = _listed(folder)
    if not files:
        return min((path.name for path in folder.iterdir()), default=None)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return name
        if path.is_dir():
            ours = any(file.startswith(f"{name}/") for file in files)
        else:
            ours = name == MANIFEST or path.is_file() and files.get(name) == file_digest(path)
        if not ours:
            return name
    return None


def _listed(folder: Path) -> dict[str, str]:
    """The files that a folder's manifest lists, with their SHA-256; none where it has no manifest that can be read."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _write_manifest(folder: Path) -> None:
    files = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    text = json.dumps({"written by": "dpo-lightning", "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _beside(folder: Path, what: str) -> Path:
    """A name beside a folder that nobody else has."""
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.{what}")


def _lies_in(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies in it, also under another name of it (letters' case, a mount)."""
    there = folder.exists()
    return any(
        place == folder or there and place.exists() and place.samefile(folder) for place in (path, *path.parents)
    )
