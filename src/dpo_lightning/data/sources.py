"""Name of a data set -> its rows: a .jsonl/.json/.csv/.parquet file, a folder written by `save_to_disk`, a hub id."""

import codecs
import csv
import json
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from dpo_lightning.data.formats import FORMATS
from dpo_lightning.data.pair import BadRow
from dpo_lightning.errors import UserError
from dpo_lightning.internals.datasets import fingerprint
from dpo_lightning.models.hub import first_line, from_hub_or_folder, local_path, looks_local
from dpo_lightning.storage.digests import file_digest
from dpo_lightning.visible import one_line

FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
READ_ROWS = 1000  # rows held in memory at a time
KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
SPLIT_NAMES = {
    "train": ("train",),
    "val": ("validation", "val", "valid", "dev", "test"),
    "test": ("test",),
    "predict": ("test", "predict"),
}
Row = dict[str, Any] | BadRow


class Source(NamedTuple):
    """The rows of a data set, and their names for messages."""

    name: str  # as the user wrote it, with the split, safe to print (see `one_line`)
    columns: Sequence[str]
    read: Callable[[Sequence[str]], Iterator[tuple[int, Row]]]  # see `rows`
    fingerprint: str  # changes with the data
    unit: str = "row"  # what row numbers count: rows, or lines of a file

    def rows(self, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
        """Each row with its number, counted from 1; a BadRow stands for one that cannot be read.

        Args:
            columns: that are needed; others may be left out, and missing ones are ignored. Empty: all.

        Raises:
            UserError: the rest of the file cannot be read.
        """
        return self.read([column for column in columns if column in self.columns])

    def location(self, number: int) -> str:
        """The name of a row in messages: "rows.jsonl, line 6"."""
        return f"{self.name}, {self.unit} {number}"


def open_source(name: str, stage: str) -> Source:
    """Opens a data set by name. `NAME:SPLIT` picks a split of a hub data set or of a saved DatasetDict.

    Args:
        stage: "train", "val", "test" or "predict", which decides the split if none is named.

    Raises:
        UserError: a missing, empty or unreadable file or folder, an unknown file type or split, or an unreachable hub.
    """
    path = local_path(name)
    if path.is_file():
        source = _open_file(one_line(name), path)
    else:
        base, _, split = name.partition(":")
        dataset, split = _pick_split(load_dataset_named(base), one_line(name), split, stage)
        source = _from_dataset(one_line(f"{base}:{split}" if split else name), dataset)
    if next(source.rows(source.columns[:1]), None) is None:
        raise UserError(f"data set '{source.name}' has no rows")
    return source


def load_dataset_named(name: str) -> Any:
    """The Dataset or DatasetDict of a folder written by `save_to_disk`, or of a hub id.

    Raises:
        UserError: a folder that is missing or cannot be loaded, an unknown hub id, or an unreachable hub.
    """
    from datasets import load_dataset, load_from_disk

    path = local_path(name)
    if path.exists() and not path.is_dir():
        kind = KINDS.get(stat.S_IFMT(path.stat().st_mode), "not a file")
        raise UserError(f"data set '{one_line(name)}' is {kind}, and only files and folders can be read")
    local = path.is_dir()
    if not local and (path.suffix in FILE_TYPES or looks_local(name)):
        raise UserError(f"data set '{one_line(name)}': there is no such file or folder")
    return from_hub_or_folder("dataset", name, load_from_disk if local else load_dataset)


def _open_file(name: str, path: Path) -> Source:
    """Opens a file; `name` is safe to print."""
    if path.suffix not in FILE_TYPES:
        raise UserError(f"data set '{name}': files of type {', '.join(FILE_TYPES)} can be read, not '{path.suffix}'")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"data set '{name}' is an empty file")
        return {".jsonl": _open_jsonl, ".json": _open_json, ".csv": _open_csv, ".parquet": _open_parquet}[path.suffix](
            name, path
        )
    except OSError as error:
        raise UserError(f"data set '{name}' cannot be read: {error.strerror or first_line(error)}") from error


def _open_jsonl(name: str, path: Path) -> Source:
    """A file with an object per line. Blank lines are not rows."""

    def read(_: Sequence[str]) -> Iterator[tuple[int, Row]]:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse_line(line, f"{name}, line {number}", first=number == 1)

    return Source(name, _columns(read([])), read, file_digest(path), "line")


def _parse_line(line: bytes, where: str, first: bool) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        return BadRow("not UTF-8", f"{where}: not UTF-8 (byte {error.start + 1} of the line); save it as UTF-8")
    except (ValueError, RecursionError) as error:
        return BadRow("not JSON", f"{where}: not valid JSON ({_json_fault(error)})")
    return _as_row(row, where)


def _json_fault(error: Exception) -> str:
    return f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else first_line(error)


def _as_row(row: Any, where: str) -> Row:
    if isinstance(row, dict):
        return row
    found = type(row).__name__
    return BadRow("not an object", f"{where}: found {found} where an object with named columns belongs")


def _columns(rows: Iterable[tuple[int, Row]]) -> list[str]:
    """The columns of the first 100 rows. Rows may differ: each is checked when it is read."""
    columns: dict[str, None] = {}
    bad = None
    for _, row in islice(rows, 100):
        if isinstance(row, BadRow):
            bad = bad or row
        else:
            columns |= dict.fromkeys(row)
    if bad and not columns:
        raise bad
    return list(columns)


def _open_json(name: str, path: Path) -> Source:
    """A file with a list of objects, bare or as in {"data": [...]}; or else with an object per line."""
    if _has_object_per_line(path):
        return _open_jsonl(name, path)
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"data set '{name}': not UTF-8 (byte {error.start + 1}); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"data set '{name}': not valid JSON ({_json_fault(error)})") from error
    if isinstance(values, dict):
        values = _wrapped_rows(name, values)

    def read(_: Sequence[str]) -> Iterator[tuple[int, Row]]:
        for number, value in enumerate(values, 1):
            yield number, _as_row(value, f"{name}, row {number}")

    return Source(name, _columns(read([])), read, file_digest(path))


def _has_object_per_line(path: Path) -> bool:
    """Whether a .json file is really .jsonl: its first line is more than the beginning of a value.

    A first line that was cut off looks like such a beginning, but then the second line is an object of its own.
    """
    with path.open("rb") as file:
        lines = (line for line in file if line.removeprefix(codecs.BOM_UTF8).strip())
        first, second = islice(chain(lines, [b"", b""]), 2)
    text = first.decode("utf-8-sig", errors="replace").strip()
    if text.startswith("["):
        return False
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.pos < len(text):
            return True
        return text.startswith("{") and _is_object(second)  # else the value continues there
    except (ValueError, RecursionError):
        return True
    return bool(second) or not isinstance(value, dict) or not _row_lists(value)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _row_lists(value: dict[str, Any]) -> list[str]:
    """The keys of an object that have rows; empty if the object itself is a row."""
    columns = {column for known in FORMATS.values() for column in known.prompt_columns + known.completion_columns}
    if not columns.isdisjoint(value):
        return []
    return [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]


def _wrapped_rows(name: str, value: dict[str, Any]) -> list[Any]:
    keys = _row_lists(value)
    if len(keys) == 1:
        return value[keys[0]]
    found = ", ".join(f"'{one_line(key)}'" for key in list(value)[:10])
    if keys:
        raise UserError(f"data set '{name}' is an object with several lists ({found}): put each into a file of its own")
    raise UserError(
        f"data set '{name}' is one object (with {found or 'nothing in it'}) where a list of objects, or one under a "
        "single key, belongs"
    )


def _open_csv(name: str, path: Path) -> Source:
    """A file of comma-separated texts under a line of column names. Blank lines are not rows; numbers stay text.

    Bytes that are not UTF-8 become lone surrogates, which `data.cells` refuses cell by cell.
    """
    csv.field_size_limit(2**31 - 1)  # a long cell is one bad row, not the end of reading

    def records() -> Iterator[tuple[int, list[str] | csv.Error]]:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            while True:
                line = reader.line_num + 1
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    if "unexpected end of data" in str(error):
                        raise UserError(f"{name}, line {line}: a quoted cell is never closed") from error
                    yield line, error
                    continue
                if cells:
                    yield line, cells

    line, header = next(records(), (1, []))
    if isinstance(header, csv.Error) or any("\udc80" <= character <= "\udcff" for cell in header for character in cell):
        raise UserError(f"{name}, line {line}: the column names are not CSV in UTF-8; save it as UTF-8")
    if twice := [column for column, count in Counter(header).items() if count > 1]:
        raise UserError(f"{name}, line {line}: two columns have the name '{one_line(twice[0])}'")

    def read(_: Sequence[str]) -> Iterator[tuple[int, Row]]:
        for line, cells in islice(records(), 1, None):
            where = f"{name}, line {line}"
            if isinstance(cells, csv.Error):
                yield line, BadRow("not CSV", f"{where}: not valid CSV ({cells})")
            elif len(cells) != len(header):
                yield line, BadRow("not CSV", f"{where}: found {len(cells)} cells where {len(header)} belong")
            else:
                yield line, dict(zip(header, cells, strict=True))

    return Source(name, header, read, file_digest(path), "line")


def _open_parquet(name: str, path: Path) -> Source:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"data set '{name}' cannot be read: {first_line(error)}") from error
    if twice := [column for column, count in Counter(columns).items() if count > 1]:
        raise UserError(f"data set '{name}': two columns have the name '{one_line(twice[0])}'")

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Row]]:
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(READ_ROWS, columns=list(wanted) or None):
                    for row in _batch_rows(batch, name, number):
                        number += 1
                        yield number, row
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{name}: damaged after row {number}: {first_line(error)}") from error

    return Source(name, columns, read, file_digest(path))


def _from_dataset(name: str, dataset: Any) -> Source:
    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Row]]:
        number = 0
        picked = dataset.select_columns(list(wanted)) if wanted else dataset
        for batch in picked.with_format("arrow").iter(READ_ROWS):
            for row in _batch_rows(batch, name, number):
                number += 1
                yield number, row

    return Source(name, dataset.column_names, read, fingerprint(dataset))


def _batch_rows(batch: Any, name: str, before: int) -> Iterable[Row]:
    """The rows of an Arrow table or batch as dicts; `before`: rows that were read before it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, a date beyond Python's
        rows: list[Row] = []
        for index in range(batch.num_rows):
            try:
                rows += batch.slice(index, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                kind = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "unreadable"
                rows.append(BadRow(kind, f"{name}, row {before + index + 1}: found a cell that is {kind}"))
        return rows


def _pick_split(dataset: Any, name: str, split: str, stage: str) -> tuple[Any, str]:
    """The Dataset of a split and the split's name, which is empty if there are no splits."""
    from datasets import DatasetDict

    if not isinstance(dataset, DatasetDict):
        return dataset, ""
    if not split:
        found = [candidate for candidate in SPLIT_NAMES[stage] if candidate in dataset] or list(dataset)[:2]
        if len(found) > 1 and found[0] not in SPLIT_NAMES[stage]:
            raise UserError(
                f"data set '{name}' has the splits {', '.join(dataset)}: name one, as in '{name}:{found[0]}'"
            )
        split = found[0]
    if split not in dataset:
        raise UserError(f"data set '{name}': there is no split '{split}', only {', '.join(dataset)}")
    return dataset[split], split
