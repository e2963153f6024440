"""What we use of datasets, and of the hub's client under it, beyond their documented interface."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset


def fingerprint(data: "Dataset") -> str:
    """What changes when a data set's content changes.

    Uses `_fingerprint`, which `map`'s cache files are named by: there is no public name for it.
    """
    return data._fingerprint


def selected(data: "Dataset", values: np.ndarray) -> np.ndarray:
    """Values for all rows of the table under a data set -> those of its own rows, which may be a selection.

    Uses `_indices`: `select` keeps the table, and to read a column through it makes a Python object of every cell.
    """
    return values if data._indices is None else values[data._indices.column(0).to_numpy()]


def memory_mapped(file: Path, fingerprint: str) -> "Dataset":
    """The data set in a file of Arrow's stream format, read when it is used.

    Uses `MemoryMappedTable` and `Dataset`'s `fingerprint`: `Dataset.from_file` makes a new fingerprint of the path.
    """
    from datasets import Dataset
    from datasets.table import MemoryMappedTable

    return Dataset(MemoryMappedTable.from_file(str(file)), fingerprint=fingerprint)


def cache_folder() -> Path:
    """Where datasets keeps its caches. Uses `datasets.config`: there is no public way to ask."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE)


def hub_endpoint() -> str | None:
    """The address of the hub, None in offline mode. Uses `huggingface_hub.constants`, read when it was imported."""
    from huggingface_hub import constants

    return None if constants.HF_HUB_OFFLINE else constants.ENDPOINT


def go_offline() -> None:
    """Switches the hub's client and datasets to offline mode, in this process and those that it starts.

    Uses their constants: they read the documented variable HF_HUB_OFFLINE only when they are imported.
    """
    import datasets.config
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"  # for child processes
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
