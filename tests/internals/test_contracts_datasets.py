"""What `internals/datasets.py` uses is as it was, in the installed versions of datasets and of the hub's client."""

import functools
import os

import datasets.config
import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from contracts import contract
from datasets import Dataset, load_dataset
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled

from dpo_lightning.internals import datasets as internals

holds = functools.partial(contract, "datasets")


@pytest.fixture
def rows(tmp_path) -> Dataset:
    """Four rows in a file of Arrow's stream format."""
    table = pa.table({"x": [10, 11, 12, 13]})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return internals.memory_mapped(tmp_path / "rows.arrow", "abc")


def test_memory_mapped_and_fingerprint(rows):
    with holds("Dataset's fingerprint or MemoryMappedTable", "the caches of checked and encoded rows"):
        assert rows["x"][:] == [10, 11, 12, 13]
        assert internals.fingerprint(rows) == "abc"
        assert internals.fingerprint(rows.select([0, 2])) != "abc"


@pytest.mark.parametrize("chosen", [[3, 1], range(1, 3), range(4)])
def test_selected(rows, chosen):
    with holds("Dataset._indices", "lengths, weights and splits of a selection of rows"):
        data = rows.select(chosen)
        column = internals.selected(data, data.data.column("x").to_numpy())
        assert np.array_equal(column, data["x"][:])


def test_cache_folder(monkeypatch, tmp_path):
    with holds("datasets.config.HF_DATASETS_CACHE", "where our caches lie, beside those of datasets"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        assert internals.cache_folder() == tmp_path
        file = tmp_path / "rows.csv"
        file.write_text("x\n1\n")
        made = load_dataset("csv", data_files=str(file), split="train").cache_files[0]["filename"]
        assert made.startswith(str(tmp_path))


def test_offline_mode(monkeypatch):
    with contract("huggingface_hub", "constants.HF_HUB_OFFLINE or ENDPOINT", "no minute of waiting without a network"):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        assert internals.hub_endpoint() == constants.ENDPOINT
        internals.go_offline()
        assert internals.hub_endpoint() is None and os.environ["HF_HUB_OFFLINE"] == "1"
        with pytest.raises(OfflineModeIsEnabled):
            huggingface_hub.model_info("nobody/nothing")
    with holds("datasets.config.HF_HUB_OFFLINE", "no minute of waiting without a network"):
        with pytest.raises(ConnectionError):
            load_dataset("nobody/nothing")
