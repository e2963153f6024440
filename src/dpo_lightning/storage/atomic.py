"""A file or a folder that is written as a whole or not at all: beside its place first, then renamed.

A crash, a full disk or a kill while it is written leaves what was there before. A folder's manifest, the SHA-256 of
each of its files, tells what we wrote from what is the user's, which is never replaced.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.storage.digests import file_digest

PARTIAL = ".partial"  # how names end of what is being written, or was when its process was killed


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path`: the file that the block makes there takes the place of `path`, flushed to the disk.

    Raises:
        OSError: it cannot be written; a file that was there before is as it was.
    """
    partial = beside(path, PARTIAL)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # so that the rename survives a power cut, too
    finally:
        with suppress(OSError):  # of a folder that cannot be written: then there is no such file
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, manifest: str | None = None) -> Iterator[Path]:
    """A fresh folder beside `folder`, whose place it takes once the block has ended.

    Args:
        manifest: a file of the folder that lists the others. A folder that is there already is replaced if its own
            manifest lists all that is in it, unchanged (`foreign`). Without a manifest none is replaced.

    Raises:
        UserError: something came into the folder that is not in its manifest.
        OSError: it cannot be written. As after any error in the block, what was there before is as it was.
    """
    partial, old = beside(folder, PARTIAL), beside(folder, ".old")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if manifest:
            _write_manifest(partial, manifest)
            if os.path.lexists(folder):
                folder.rename(old)  # before it is looked at, so that nothing can come in between
                if found := foreign(old, manifest):
                    raise UserError(f"'{folder / found}' came while '{folder}' was written: nothing is replaced")
        partial.rename(folder)
    except BaseException:
        if os.path.lexists(old):
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the first one that others have put something into
            for parent in made:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def foreign(folder: Path, manifest: str) -> str | None:
    """The first thing in a folder that is not as its manifest lists it, "." where it is no folder, else None."""
    if folder.is_symlink() or not folder.is_dir():
        return "."
    files = _listed(folder / manifest)
    if not files:
        return min((path.name for path in folder.iterdir()), default=None)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            return name
        if path.is_dir():
            ours = any(file.startswith(f"{name}/") for file in files)
        else:
            ours = name == manifest or path.is_file() and files.get(name) == file_digest(path)
        if not ours:
            return name
    return None


def beside(path: Path, ending: str) -> Path:
    """A name beside a path that nobody else has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{ending}")


def _flush(path: Path) -> None:
    """Makes the disk hold what a file or folder holds, where the system can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _listed(manifest: Path) -> dict[str, str]:
    """Files and their SHA-256, as a manifest lists them; none where it cannot be read."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _write_manifest(folder: Path, name: str) -> None:
    files = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    text = json.dumps({"written by": "dpo-lightning", "files": files}, indent=2)
    (folder / name).write_text(text + "\n", encoding="utf-8")
