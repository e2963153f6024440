"""Batches of columns -> a data set on disk that is written once and memory-mapped afterwards, with a note beside it."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dpo_lightning.errors import UserError
from dpo_lightning.hub import first_line

if TYPE_CHECKING:
    from datasets import Dataset

Columns = dict[str, list]
ABANDONED_SECONDS = 86_400


def cached_dataset(
    fingerprint: str, schema: pa.Schema, batches: Callable[[], Iterator[Columns]], note: Callable[[], dict[str, Any]]
) -> tuple["Dataset", dict[str, Any]]:
    """The data set of this fingerprint from the cache, written first where it is not there or is damaged.

    It is written beside its place and then renamed, so that a killed run leaves nothing half, and processes that
    write the same one at the same time do not meet.

    Args:
        fingerprint: tells the data set from all others.
        batches: gives its rows, a few at a time: memory does not grow with their number.
        note: called after the last batch; what it returns, plain JSON, is kept with the data.

    Raises:
        UserError: the cache folder cannot be written.
    """
    if found := find_dataset(fingerprint):
        return found
    folder = dataset_folder(fingerprint)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder.parent)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix="writing-"))
        try:
            with pa.OSFile(str(partial / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                for columns in batches():
                    writer.write_batch(pa.RecordBatch.from_pydict(columns, schema))
            (partial / "note.json").write_text(json.dumps(note()), encoding="utf-8")
            os.rename(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        if not folder.is_dir():  # else another process was first
            raise UserError(
                f"the cache folder '{folder.parent}' cannot be written: {error.strerror or first_line(error)}; set "
                "HF_DATASETS_CACHE to a folder that can"
            ) from error
    return _open(folder, fingerprint)


def find_dataset(fingerprint: str) -> tuple["Dataset", dict[str, Any]] | None:
    """The data set of this fingerprint and its note, where the cache has them undamaged."""
    folder = dataset_folder(fingerprint)
    try:
        return _open(folder, fingerprint) if folder.is_dir() else None
    except (pa.ArrowException, OSError, ValueError):  # a disk's fault: to be made anew
        shutil.rmtree(folder, ignore_errors=True)
        return None


def dataset_folder(fingerprint: str) -> Path:
    """Where the data set of a fingerprint is, or is to be."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / "dpo_lightning" / fingerprint


def _remove_abandoned(cache: Path) -> None:
    """Removes what killed runs left half written: folders that nobody has written to for a day."""
    for partial in cache.glob("writing-*"):
        try:
            if time.time() - max(path.stat().st_mtime for path in (partial, *partial.iterdir())) > ABANDONED_SECONDS:
                shutil.rmtree(partial)
        except OSError:
            continue  # another process removes it


def _open(folder: Path, fingerprint: str) -> tuple["Dataset", dict[str, Any]]:
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    note = json.loads((folder / "note.json").read_text(encoding="utf-8"))
    return Dataset(MemoryMappedTable.from_file(str(folder / "rows.arrow")), fingerprint=fingerprint), note
