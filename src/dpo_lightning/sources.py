"""Name of a data set -> its rows: a .jsonl/.json/.csv/.parquet file, a folder written by `save_to_disk`, a hub id."""

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
    if Path(base).expanduser().is_dir():
        dataset = from_hub_or_folder("dataset", base, _load_from_disk)
    elif path.suffix in FILE_TYPES or looks_local(name):
        raise UserError(f"data set '{name}': there is no such file or folder")
    else:
        dataset = from_hub_or_folder("dataset", base, _load_from_hub, split=split if "[" in split else None)
    return _from_dataset(name, _pick_split(dataset, name, split, stage))


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
    from datasets import load_dataset

    # Read as text, an all-digits answer stays an answer.
    options = {"dtype": str, "keep_default_na": False} if path.suffix == ".csv" else {}
    try:
        dataset = load_dataset(path.suffix[1:], data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow's and pandas' own errors, wrapped by datasets
        raise UserError(f"data set '{name}' cannot be read: {first_line(error.__cause__ or error)}") from error
    return _from_dataset(name, dataset)


def _from_dataset(name: str, dataset: Any) -> Source:
    if len(dataset) == 0:
        raise UserError(f"data set '{name}' holds no rows")
    return Source(name, dataset.column_names, dataset, dataset._fingerprint)


def _load_from_disk(folder: str) -> Any:
    from datasets import load_from_disk

    return load_from_disk(folder)


def _load_from_hub(name: str, split: str | None) -> Any:
    from datasets import load_dataset

    return load_dataset(name, split=split)


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
