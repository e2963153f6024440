"""A folder of runs -> each run's title, state and files, from what it left or still writes.

A run's folder may be a stranger's: its files are read with limits, links out of it are not followed, and all that comes
from it is text.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from dpo_lightning.callbacks.report.saved import LARGEST, title_and_outcome
from dpo_lightning.callbacks.run_folders import LOCK
from dpo_lightning.parsing import setting
from dpo_lightning.storage.locks import is_held
from dpo_lightning.visible import one_line

DEEPEST = 6  # levels of folders that are searched
MOST_FOLDERS = 20_000  # that are searched
HEAD = 65_536  # bytes of a report.json in which its title and outcome are looked for
LARGEST_SETTINGS = 100_000  # bytes of a config.yaml
LARGEST_REPORT = 100_000_000  # bytes of a report.html
LATER = 10.0  # seconds after its report in which a run may still write its curves
LONGEST = 300  # characters of a title, or of an outcome
INNER = {"checkpoints", "huggingface"}  # folders of a run in which there are no runs
EVENTS = "tfevents"  # in the names of TensorBoard's files
REPORT, CONTENTS, SETTINGS = "report.html", "report.json", "config.yaml"
State = Literal["running", "finished", "stopped", "failed", "ended"]  # ended: without a report, so it was killed


class Run(NamedTuple):
    """What the list shows of a run."""

    id: str
    folder: Path
    name: str  # the folder's, within the folder of runs
    title: str
    state: State
    outcome: str  # the report's sentence; "" without one
    changed: float  # seconds since 1970
    has_report: bool


def run_at(folder: Path, root: Path) -> Run:
    """The run of a folder, somewhere in `root`, as it is now."""
    within = folder.relative_to(root)
    name = one_line(str(within) if within.parts else root.resolve().name)
    head = title_and_outcome(content(folder / CONTENTS, LARGEST, HEAD) or b"")
    title, outcome = (one_line(" ".join(text.split())[:LONGEST]) for text in head)
    return Run(
        id=sha256(os.fsencode(folder)).hexdigest()[:16],
        folder=folder,
        name=name,
        title=title or _configured_title(folder) or name,
        state=_state(folder, outcome),
        outcome=outcome,
        changed=last_change(folder),
        has_report=content(folder / REPORT, LARGEST_REPORT, 0) is not None,
    )


def run_folders(folder: Path) -> Iterator[Path]:
    """The folder itself and those below it that have a report or TensorBoard files."""
    folders = 0
    for path, inner, names in os.walk(folder):
        folders += 1
        depth = len(Path(path).relative_to(folder).parts)
        inner[:] = [name for name in inner if name not in INNER] if depth < DEEPEST and folders < MOST_FOLDERS else []
        if REPORT in names or any(EVENTS in name for name in names):
            yield Path(path)


def event_files(folder: Path) -> list[Path]:
    """The TensorBoard files of a run; none if one of them is no plain file."""
    files = [path for path in _files(folder) if EVENTS in path.name]
    return files if all(map(_is_plain, files)) else []


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):
        return sorted(folder.iterdir())
    return []


def last_change(folder: Path, *names: str) -> float:
    """When the files with these words in their names, by default its report and curves, were last written."""
    times = [0.0]
    for path in _files(folder):
        if any(name in path.name for name in names or (REPORT, EVENTS)):
            with suppress(OSError):
                times.append(path.lstat().st_mtime)
    return max(times)


def _is_plain(path: Path) -> bool:
    """Whether it is a file, and no link to one: a pipe would be waited for, and a link can lead anywhere."""
    return path.is_file() and not path.is_symlink()


def content(path: Path, largest: int, bytes: int = -1) -> bytes | None:
    """The first bytes of a plain file, all of them by default; None if there is none, or it is larger than allowed."""
    with suppress(OSError):
        if _is_plain(path) and path.stat().st_size <= largest:
            with path.open("rb") as file:
                return file.read(bytes)
    return None


def _state(folder: Path, outcome: str) -> State:
    """As the report tells, unless the run goes on since."""
    if is_held(folder / LOCK):
        return "running"
    if last_change(folder, EVENTS) > last_change(folder, REPORT) + LATER:
        return "ended"
    beginnings: dict[str, State] = {"Finished": "finished", "Stopped by hand": "stopped", "Stopped by": "failed"}
    return next((state for start, state in beginnings.items() if outcome.startswith(start)), "ended")


def _configured_title(folder: Path) -> str:
    """The model and the training data in a run's settings, as a report is called; "" if they do not tell."""
    try:  # only composed: a hostile file's merge keys could fill the memory when its values are made
        settings = yaml.compose(content(folder / SETTINGS, LARGEST_SETTINGS) or b"", Loader=yaml.SafeLoader)
        model, data = (setting(key, settings) for key in ("model.name_or_path", "data.train_dataset"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    if not model or not data:
        return ""
    weighted = isinstance(data[1], yaml.MappingNode)
    nodes = [key for key, _ in data[1].value] if weighted else data[1].value
    names = [str(node.value) for node in nodes] if isinstance(nodes, list) else [nodes]
    return one_line(f"{model[1].value} on {' + '.join(names)}"[:LONGEST])
