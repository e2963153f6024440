"""Files and folders that are written completely or not at all: under another name first, then renamed.

After a crash, a full disk or a kill the former content is still there. A folder's manifest, with the SHA-256 of each
file, tells what we have written from the user's files, which are never replaced.
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

PARTIAL = ".partial"  # ending of names until all is written


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`: the file that the block writes there is flushed to disk and replaces `path`.

    Raises:
        OSError: it cannot be written; an existing file is unchanged.
    """
    partial = beside(path, PARTIAL)
    try:
        yield partial
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)  # so that the rename survives a power cut
    finally:
        with suppress(OSError):  # in a folder that cannot be written, where there is no such file
            partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, manifest: str | None = None) -> Iterator[Path]:
    """A new folder beside `folder`, which replaces it when the block ends.

    Args:
        manifest: name of a file in the folder that lists the others. An existing folder is replaced only if its
            manifest lists all its content, unchanged (`foreign`); without `manifest` none is replaced.

    Raises:
        UserError: the folder has got content that is not in its manifest.
        OSError: it cannot be written. After this and any other error in the block the folder is unchanged.
    """
    partial, old = beside(folder, PARTIAL), beside(folder, ".old")
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        partial.mkdir(parents=True)
        yield partial
        if manifest:
            _write_manifest(partial, manifest)
            if os.path.lexists(folder):
                folder.rename(old)  # before the check, so that nothing can be added in between
                if found := foreign(old, manifest):
                    raise UserError(f"'{folder / found}' appeared while '{folder}' was written: nothing is replaced")
        partial.rename(folder)
    except BaseException:
        if os.path.lexists(old):
            old.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # a folder in which others have put something stays
            for parent in created:
                parent.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def foreign(folder: Path, manifest: str) -> str | None:
    """The first file or folder that is not as the manifest lists it, or None; "." if `folder` is not a folder."""
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
    """A unique name beside a path."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{ending}")


def _flush(path: Path) -> None:
    """Flushes a file or folder to disk, on systems that can."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _listed(manifest: Path) -> dict[str, str]:
    """The files in a manifest with their SHA-256; empty if it cannot be read."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {str(name): str(digest) for name, digest in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _write_manifest(folder: Path, name: str) -> None:
    files = {p.relative_to(folder).as_posix(): file_digest(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    text = json.dumps({"written by": "dpo-lightning", "files": files}, indent=2)
    (folder / name).write_text(text + "\n", encoding="utf-8")
