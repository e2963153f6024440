"""A long computation over the rows of a data set that all processes share, with its results in the cache.

Until it is complete, each process appends its results as JSON lines to its own file in a folder that ends in
`.partial`, so that a killed pass continues where it stopped and loses at most one batch.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import reason_of
from dpo_lightning.storage.arrow_cache import Columns, cached_dataset, dataset_folder, find_dataset, lock_file
from dpo_lightning.storage.jsonl import append_lines, read_lines
from dpo_lightning.storage.locks import exclusive
from dpo_lightning.storage.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch.strategies import Strategy

Result = dict[str, Any]  # of a row: plain JSON, with its position in the data set as "pair"
WRITTEN_ROWS = 1000  # rows of results that are written to the cache at a time


class SharedPass(NamedTuple):
    """What is computed, and in which form it is kept."""

    fingerprint: str  # of everything on which the results depend
    sizes: np.ndarray  # [n], length of each row: the longest are computed first
    schema: pa.Schema  # of the data set of the results
    compute: Callable[[Iterator[list[int]]], Iterator[list[Result]]]  # batches of positions -> their results
    columns: Callable[[list[Result]], Columns]  # results of successive rows -> columns of `schema`
    note: Callable[[list[Result]], dict[str, Any]]  # all results -> the note that is kept with the data set
    what: str  # what is computed, for messages: "the rejected completions of rows.jsonl"
    unknown: str  # the error for a row without a result, {row}, counted from 1
    setting: str  # the reason for the pass, for messages: "data.rejected is generated"
    remedy: str = ""  # besides sharing the folder: ", or set model.reference: online"


def run_shared_pass(
    task: SharedPass, batch_size: int, description: str, strategy: "Strategy"
) -> tuple["Dataset", dict[str, Any]]:
    """The results of a pass and their note, computed first if the cache does not have them. Call it on all processes.

    Args:
        batch_size: number of rows that are computed at a time.
        description: of the progress bar.

    Raises:
        UserError: a row has no result, the folder cannot be written, or the processes do not share it.
    """
    if found := find_results(task.fingerprint, strategy):
        return found
    folder = dataset_folder(task.fingerprint)
    partial = folder.with_name(folder.name + ".partial")
    with exclusive(lock_file(partial), task.what, strategy):
        if found := find_results(task.fingerprint, strategy):  # another run has computed them meanwhile
            return found
        _make_shared(partial, task, strategy)
        missing = _missing(task, _results(partial))  # read by all before any writes, so that they divide the same rows
        strategy.barrier("results read")
        longest_first = missing[np.argsort(-task.sizes[missing].astype(np.int64), kind="stable")]
        if len(share := longest_first[strategy.global_rank :: strategy.world_size]):
            with tempfile.NamedTemporaryFile(dir=partial, suffix=".jsonl", delete=False) as file:
                batches = (share[start : start + batch_size].tolist() for start in range(0, len(share), batch_size))
                for results in task.compute(progress(batches, description, len(share), "pairs")):
                    append_lines(Path(file.name), results)
        strategy.barrier("results computed")
        known = _results(partial)
        if len(missing := _missing(task, known)):
            raise UserError(task.unknown.format(row=missing[0] + 1))
        strategy.barrier("results checked")
        if strategy.is_global_zero:
            _complete(task, known)
            shutil.rmtree(partial, ignore_errors=True)
        strategy.barrier("results complete")
        found = find_dataset(task.fingerprint)
        assert found is not None  # it was just written
        return found


def find_results(fingerprint: str, strategy: "Strategy") -> tuple["Dataset", dict[str, Any]] | None:
    """The results and note of a complete pass, if all processes find them: else all compute, so that none waits."""
    found = find_dataset(fingerprint)
    return found if strategy.reduce_boolean_decision(found is not None, all=True) else None


def _make_shared(partial: Path, task: SharedPass, strategy: "Strategy") -> None:
    """Creates the folder of partial results, which all processes must see."""
    if strategy.is_global_zero:
        try:
            partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{task.what} cannot be kept in {partial}: {reason_of(error)}") from error
    strategy.barrier("results prepared")
    if not strategy.reduce_boolean_decision(partial.is_dir(), all=True):
        raise UserError(
            f"{task.setting}, but not all processes see the folder {partial.parent}: share the folder that "
            f"HF_DATASETS_CACHE names between the machines{task.remedy}"
        )


def _results(partial: Path) -> dict[int, Result]:
    """The results so far by the positions of their rows."""
    known: dict[int, Result] = {}
    for path in sorted(partial.glob("*.jsonl")):
        try:
            known |= {line["pair"]: line for line in read_lines(path).objects}
        except (ValueError, KeyError):
            continue  # damaged on disk: those rows are computed again
    return known


def _missing(task: SharedPass, known: dict[int, Result]) -> np.ndarray:
    """Positions of the rows without a result, ascending, int64."""
    return np.setdiff1d(np.arange(len(task.sizes)), np.fromiter(known, np.int64))


def _complete(task: SharedPass, known: dict[int, Result]) -> None:
    """Writes all results, in the order of the rows, to the cache."""
    results = [known[position] for position in range(len(task.sizes))]
    batches = (results[start : start + WRITTEN_ROWS] for start in range(0, len(results), WRITTEN_ROWS))
    cached_dataset(task.fingerprint, task.schema, lambda: map(task.columns, batches), lambda: task.note(results))
