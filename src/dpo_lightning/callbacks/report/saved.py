"""`report.json`: the contents of a report -> JSON, and back."""

import json
import re
from pathlib import Path
from typing import Any

from dpo_lightning.callbacks.replies import SHOWING, Showing
from dpo_lightning.callbacks.report.page import Run
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.storage.states import check_amount, check_state

LARGEST = 200_000_000  # bytes of the file
HEAD = re.compile(rb'\{"title": ("(?:[^"\\]|\\.)*"), "outcome": ("(?:[^"\\]|\\.)*")')  # what `as_json` begins with
TEXTS = {str: str}
KINDS: dict[str, Any] = {
    **dict.fromkeys(("title", "outcome"), str),
    **dict.fromkeys(("facts", "costs", "again"), TEXTS),
    "settings": {str: str | int | float | bool},
    "curves": {str: [(int, int | float)]},
    "margins": {str: [int | float]},
    "pairs": [(str, str, str, str, int | float, int | float, bool, bool | None)],
    "showings": [SHOWING],
    "warnings": [str],
    "val_pairs": int,
}


def as_json(run: Run) -> str:
    """The text of `report.json`."""
    return json.dumps(run._asdict() | {"showings": [_filled(showing) for showing in run.showings]}) + "\n"


def _filled(showing: Showing) -> Showing:
    return showing._replace(counts=showing.counts or {})


def title_and_outcome(head: bytes) -> tuple[str, str]:
    """Of a report, from the first bytes of its `report.json`; "" for both if they are something else."""
    try:
        title, outcome = (json.loads(text) for text in HEAD.match(head).groups())  # type: ignore[union-attr]
    except (AttributeError, ValueError):
        return "", ""
    return title, outcome


def read_run(folder: Path) -> Run:
    """The contents of a run's report, from the run's folder.

    Raises:
        UserError: there is no report, or it is not what `as_json` writes.
    """
    path = folder / "report.json"
    try:
        if not path.is_file():
            hint = "it is written with report.html when a run ends" if folder.is_dir() else "there is no such folder"
            raise UserError(f"'{folder}' has no report.json: {hint}")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        values = json.loads(path.read_bytes())
        check_state(values, dict, "it")
        check_state(values, KINDS, "it")
        check_amount(values["val_pairs"], "its val_pairs")
        values = {name: values[name] for name in KINDS}
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' is not a report of a run: {error}") from error
    values["pairs"] = [PreferencePair(*fields) for fields in values["pairs"]]
    values["showings"] = [Showing(*fields) for fields in values["showings"]]
    return Run(**values)
