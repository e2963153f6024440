"""A cache of data sets on disk: written once in batches of columns, then memory-mapped, with a note beside each.

The note has a checksum of both, so that a data set which has changed on disk is recomputed.
"""

import json
import mmap
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from lightning.pytorch.utilities import rank_zero_warn

from dpo_lightning.errors import UserError
from dpo_lightning.internals.datasets import cache_folder, memory_mapped
from dpo_lightning.models.hub import first_line, reason_of
from dpo_lightning.storage.atomic import PARTIAL, atomic_folder
from dpo_lightning.storage.locks import exclusive

if TYPE_CHECKING:
    from datasets import Dataset

Columns = dict[str, list]
ABANDONED_SECONDS = 86_400
ROWS, NOTE = "rows.arrow", "note.json"
CHECK = "crc32"  # key in the note: of the rows' bytes and of the rest of the note
# Keys of the notes that were written before there was a checksum.
UNCHECKED = ({"account", "chat"}, {"largest_id"}, {"model", "key", "cut", "same"})


def cached_dataset(
    fingerprint: str, schema: pa.Schema, batches: Callable[[], Iterator[Columns]], note: Callable[[], dict[str, Any]]
) -> tuple["Dataset", dict[str, Any]]:
    """The data set with this fingerprint from the cache, and its note; written first if it is missing or damaged.

    If several processes want the same one at the same time, one writes it and the others wait.

    Args:
        fingerprint: identifies the data set.
        batches: yields its rows, a few at a time, so that memory does not grow with their number.
        note: called after the last batch; its result, plain JSON, is kept with the data.

    Raises:
        UserError: the cache folder cannot be written.
    """
    if found := find_dataset(fingerprint):
        return found
    folder = dataset_folder(fingerprint)
    try:
        with exclusive(lock_file(folder), f"the data set {fingerprint}"):
            if found := find_dataset(fingerprint):
                return found
            shutil.rmtree(folder, ignore_errors=True)  # a damaged one
            _write(folder, schema, batches, note)
            return _open(folder, fingerprint)
    except OSError as error:
        raise UserError(
            f"the cache folder '{folder.parent}' cannot be written: {reason_of(error)}; set HF_DATASETS_CACHE to a "
            "folder that can"
        ) from error


def find_dataset(fingerprint: str) -> tuple["Dataset", dict[str, Any]] | None:
    """The data set with this fingerprint and its note, if the cache has them undamaged."""
    folder = dataset_folder(fingerprint)
    if not folder.is_dir():
        return None
    try:
        return _open(folder, fingerprint)
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:  # a disk's fault
        rank_zero_warn(f"the cached data in '{folder}' are damaged ({first_line(error)}): they are made anew")
        return None


def dataset_folder(fingerprint: str) -> Path:
    """The folder of the data set with a fingerprint."""
    return cache_folder() / "dpo_lightning" / fingerprint


def lock_file(folder: Path) -> Path:
    """The lock for creating a folder of the cache; it is outside of the cache, so that it outlives the folder."""
    return folder.parent.parent / "dpo_lightning_locks" / f"{folder.name}.lock"


def _write(
    folder: Path, schema: pa.Schema, batches: Callable[[], Iterator[Columns]], note: Callable[[], dict[str, Any]]
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with atomic_folder(folder) as partial:
        with pa.OSFile(str(partial / ROWS), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for columns in batches():
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
        content = json.loads(json.dumps(note()))  # as it is read
        content |= {CHECK: _check(partial / ROWS, content)}
        (partial / NOTE).write_text(json.dumps(content), encoding="utf-8")


def _remove_abandoned(cache: Path) -> None:
    """Removes partial folders of killed runs, to which nothing was written for a day.

    A shared pass's folder, which is resumed, is not one of them: its name has no random part.
    """
    for partial in (*cache.glob(f"*.????????{PARTIAL}"), *cache.glob("writing-*")):  # the latter of earlier versions
        try:
            if time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > ABANDONED_SECONDS:
                shutil.rmtree(partial)
        except OSError:
            continue  # another process removes it


def _open(folder: Path, fingerprint: str) -> tuple["Dataset", dict[str, Any]]:
    note = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    check = note.pop(CHECK, None) if isinstance(note, dict) else None
    if check is None and (not isinstance(note, dict) or set(note) not in UNCHECKED):
        raise ValueError(f"{NOTE} is not a note of ours")
    if check is not None and check != _check(folder / ROWS, note):
        raise ValueError("they do not match their checksum")
    return memory_mapped(folder / ROWS, fingerprint), note


def _check(rows: Path, note: dict[str, Any]) -> int:
    """The checksum of a file's bytes and a note; it takes about 0.05 s per 100 MB."""
    with rows.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return zlib.crc32(json.dumps(note, sort_keys=True).encode(), zlib.crc32(content))
