"""What people clicked: a journal of all clicks, and the file of labels that follows from it.

`labels.clicks.jsonl` gets a line for every click, also for ties, skips and clicks that are taken back, and no line of
it is ever changed. `labels.jsonl` has a row for every click that says something to train on, and nothing else, so that
it is a data set at any time. A click is in both, on disk, before the page moves on. Taking one back appends a line to
the journal and writes the labels anew, in one step (`atomic_file`). After a kill between the two, or within a line, the
labels are completed from the journal.
"""

import os
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line, reason_of
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.jsonl import append_lines, as_line, could_be_half, keep_lines, read_lines
from dpo_lightning.visible import one_line

Record = dict[str, Any]


def row_of(record: Record) -> dict[str, Any] | None:
    """What a click says to train on: a row in the format `preference` or `unpaired`; None for ties and skips."""
    choice, replies, edited = record["choice"], record["replies"], record["edited"]
    row: dict[str, Any] = {"prompt": record["prompt"]}
    if choice in ("good", "bad"):
        reply = replies[0] if edited is None else {"text": record["text"], "model": ""}
        row |= {"completion": reply["text"], "label": choice == "good", "model": reply["model"]}
    elif choice in ("first", "second", "edit"):
        chosen, rejected = replies[::-1] if choice == "second" else replies
        if edited is not None:
            chosen, rejected = {"text": record["text"], "model": ""}, replies[edited]
        row |= {"chosen": chosen["text"], "rejected": rejected["text"]}
        row |= {"chosen_model": chosen["model"], "rejected_model": rejected["model"]}
        row |= {"rejected_side": "left" if rejected is replies[0] else "right"}
    else:
        return None
    optional = {name: record[name] for name in ("chat", "context") if record[name] not in (None, "")}
    told = {name: record[name] for name in ("seed", "labeller", "time", "click")}
    return row | optional | {"edited": edited is not None} | record["sampling"] | told


class Clicks:
    """The clicks so far, of one output file; any thread may use it.

    Args:
        path: of the labels, such as labels.jsonl; made at the first click.

    Attributes:
        decided: the click that counts for each prompt, by the prompt's key, the latest last.
        counts: of the choices among them.
        torn: whether the journal ended in half a line, which is removed: a click that was never confirmed.

    Raises:
        UserError: a file cannot be read, or has got other content than what was written here.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.journal = path, path.with_name(f"{path.stem}.clicks{path.suffix}")
        self.decided: dict[str, Record] = {}
        self.counts: Counter[str] = Counter()
        self.torn = False
        self._seen: dict[str, Record] = {}  # by the click's own name: what is sent twice counts once
        self._lock = threading.Lock()
        self._behind = False  # whether the labels lack something that the journal has
        try:
            self._read()
        except OSError as error:
            raise UserError(f"'{one_line(str(path))}' cannot be used for labels: {reason_of(error)}") from error

    def add(self, record: Record) -> bool:
        """Keeps a click, on disk when this returns.

        Returns:
            False if another click has decided on the same prompt, so that this one is not kept.

        Raises:
            UserError: it cannot be written; then nothing is.
        """
        with self._lock:
            if record["click"] in self._seen:
                return True
            if record["key"] in self.decided:
                return False
            self._keep(record)
            return True

    def undo(self, tab: str, click: str, **told: Any) -> Record | None:
        """Takes the latest click of a tab back, and returns it; None if it has none. Errors as of `add`."""
        with self._lock:
            if click in self._seen:
                return self._seen.get(self._seen[click].get("undo", ""))
            records = [record for record in self.decided.values() if record["tab"] == tab]
            if not records:
                return None
            undone = records[-1]
            self._keep({"click": click, "undo": undone["click"], "tab": tab, **told})
            return undone

    def _take_in(self, record: Record) -> None:
        if "undo" in record:
            undone = self.decided.pop(self._seen[record["undo"]]["key"])
            self.counts[undone["choice"]] -= 1
        else:
            self.decided[record["key"]] = record
            self.counts[record["choice"]] += 1
        self._seen[record["click"]] = record

    def _keep(self, record: Record) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self.journal.stat().st_size if self.journal.exists() else 0
            append_lines(self.journal, [record], to_disk=True)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.journal, size)
            name = one_line(str(self.journal))
            raise UserError(f"the click is not saved: '{name}' cannot be written: {reason_of(error)}") from error
        self._take_in(record)
        try:
            if self._behind or "undo" in record:
                self._write_labels()
            elif row := row_of(record):
                append_lines(self.path, [row], to_disk=True)
            self._behind = False
        except OSError:  # the journal has it: the labels are completed at the next click or start
            self._behind = True

    def _labels(self) -> str:
        return "".join(as_line(row) for record in self.decided.values() if (row := row_of(record)))

    def _write_labels(self) -> None:
        with atomic_file(self.path) as partial:
            partial.write_text(self._labels(), encoding="utf-8")

    def _read(self) -> None:
        lines = self._journal_lines()
        labels = self.path.read_bytes() if self.path.exists() else b""
        before = ""
        for number, record in enumerate(lines.objects, 1):
            if number == len(lines.objects):
                before = self._labels()
            try:
                if "undo" not in record:
                    row_of(record)
                self._take_in(record)
            except (LookupError, TypeError, AttributeError) as error:
                raise self._foreign(self.journal, f"line {number} is not a click") from error
        wanted = self._labels().encode()
        if labels == wanted:
            return
        if not lines.objects and labels:
            raise self._foreign(self.path, f"there is no {self.journal.name} beside it")
        if labels != before.encode() and not wanted.startswith(labels):
            raise self._foreign(self.path, f"it is not what follows from {self.journal.name}")
        self._write_labels()

    def _journal_lines(self) -> Any:
        try:
            lines = read_lines(self.journal)
        except (ValueError, RecursionError) as error:
            raise self._foreign(self.journal, first_line(error)) from error
        if lines.rest:
            if not could_be_half(lines.rest, {"click": ""}):
                raise self._foreign(self.journal, "it ends in half a line that is no click")
            keep_lines(self.journal, lines, len(lines.objects))
            self.torn = True
        return lines

    @staticmethod
    def _foreign(path: Path, why: str) -> UserError:
        name = one_line(str(path))
        return UserError(f"'{name}' has other content than this page writes ({why}): move it away, or set --output")
