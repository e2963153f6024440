"""Name of a data set -> its rows: a .jsonl/.json/.csv/.parquet file, a folder written by `save_to_disk`, a hub id."""

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_lightning.errors import UserError
from dpo_lightning.hub import first_line, from_hub_or_folder, looks_local

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev", "test"),
    "test": ("test",),
    "predict": ("test", "predict"),
}


class Source(NamedTuple):
    """Rows of one data set, with what is needed to talk about them."""

    name: str  # as the user wrote it
    columns: Sequence[str]
    rows: Iterable[dict[str, Any]]
    fingerprint: str  # changes when the data changes

    def where(self, row: int) -> str:
        """How a row is named in messages: its number counted from 1."""
        return f"{self.name}, row {row + 1}"


class JSONLRows:
    """The objects of a .jsonl file, read anew at each iteration; blank lines are not rows.

    Raises (while iterating):
        UserError: a line that is not UTF-8, not JSON, or not an object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{self.path}, line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise UserError(
                        f"{where}: not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8"
                    ) from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not valid JSON ({first_line(error)})") from error
                if not isinstance(row, dict):
                    raise UserError(f"{where}: found {type(row).__name__} where an object with named columns belongs")
                yield row


def open_source(name: str, stage: str) -> Source:
    """Opens a data set by name. `NAME:SPLIT` picks a split of a hub data set or of a saved DatasetDict.

    Args:
        stage: "train", "val", "test" or "predict": which split is meant where several are there and none is named.

    Raises:
        UserError: a missing, empty or unreadable file or folder, an unknown file type or split, an unreachable hub.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _open_file(name, path)
    base, _, split = name.partition(":")
    return _from_dataset(name, _pick_split(load_dataset_named(base), name, split, stage))


def load_dataset_named(name: str) -> Any:
    """The Dataset or DatasetDict of a folder written by `save_to_disk`, or else of a hub id.

    Raises:
        UserError: a folder that is not there or cannot be loaded, an unknown hub id, an unreachable hub.
    """
    from datasets import load_dataset, load_from_disk

    if Path(name).suffix in FILE_TYPES or (looks_local(name) and not Path(name).expanduser().is_dir()):
        raise UserError(f"data set '{name}': there is no such file or folder")
    local = Path(name).expanduser().is_dir()
    return from_hub_or_folder("dataset", name, load_from_disk if local else load_dataset)


def _open_file(name: str, path: Path) -> Source:
    if path.stat().st_size == 0:
        raise UserError(f"data set '{name}' is an empty file")
    if path.suffix == ".jsonl":
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        # Columns may come and go between rows: the first rows tell the format, each row is checked when it is read.
        columns = dict.fromkeys(key for row in islice(JSONLRows(path), 100) for key in row)
        if not columns:
            raise UserError(f"data set '{name}' holds no rows")
        return Source(name, list(columns), JSONLRows(path), digest.hexdigest())
    if path.suffix not in FILE_TYPES:
        raise UserError(f"data set '{name}': files of type {', '.join(FILE_TYPES)} can be read, not '{path.suffix}'")
    from datasets import Features, Value, load_dataset

    try:
        options: dict[str, Any] = {}
        if path.suffix == ".csv":  # read as text, so that an all-digits answer stays an answer
            with path.open(encoding="utf-8-sig", newline="") as file:
                header = next(csv.reader(file))
            options = {"features": Features(dict.fromkeys(header, Value("string"))), "keep_default_na": False}
        dataset = load_dataset(path.suffix[1:], data_files=str(path), split="train", **options)
    except Exception as error:  # csv's, pyarrow's and pandas' own errors, wrapped by datasets
        raise UserError(f"data set '{name}' cannot be read: {first_line(error.__cause__ or error)}") from error
    return _from_dataset(name, dataset)


def _from_dataset(name: str, dataset: Any) -> Source:
    if len(dataset) == 0:
        raise UserError(f"data set '{name}' holds no rows")
    return Source(name, dataset.column_names, dataset, dataset._fingerprint)


def _pick_split(dataset: Any, name: str, split: str, stage: str) -> Any:
    from datasets import DatasetDict

    if not isinstance(dataset, DatasetDict):
        return dataset
    if not split:
        found = [candidate for candidate in SPLIT_NAMES[stage] if candidate in dataset] or list(dataset)[:2]
        if len(found) > 1 and found[0] not in SPLIT_NAMES[stage]:
            raise UserError(
                f"data set '{name}' has the splits {', '.join(dataset)}: name one, as in '{name}:{found[0]}'"
            )
        split = found[0]
    if split not in dataset:
        raise UserError(f"data set '{name}': there is no split '{split}', only {', '.join(dataset)}")
    return dataset[split]
