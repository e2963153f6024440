"""The shared pass: results of rows, computed once by all processes together, whatever kills it in between."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from dpo_lightning.errors import UserError
from dpo_lightning.storage.shared_pass import SharedPass, run_shared_pass

SCHEMA = pa.schema([("square", pa.int64())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "dpo_lightning"


def squares(compute, sizes=(1, 3, 2, 5, 4)):
    task = SharedPass(
        fingerprint="key",
        sizes=np.array(sizes),
        schema=SCHEMA,
        compute=compute,
        columns=lambda results: {"square": [result["square"] for result in results]},
        note=lambda results: {"sum": sum(result["square"] for result in results)},
        what="squares",
        unknown="row {row} has no square",
        setting="data.squares is true",
    )
    return run_shared_pass(task, 2, "Squares", SingleDeviceStrategy(torch.device("cpu")))


def test_the_longest_rows_come_first_and_the_data_set_has_their_own_order():
    seen = []

    def compute(batches):
        for positions in batches:
            seen.append(positions)
            yield [{"pair": i, "square": i * i} for i in positions]

    data, note = squares(compute)
    assert seen == [[3, 4], [1, 2], [0]] and data["square"][:] == [0, 1, 4, 9, 16] and note == {"sum": 30}
    assert squares(None)[1] == {"sum": 30}, "nothing is computed again"


@pytest.mark.parametrize("left", [b"", b'{"pair": 1, "squ', b"\x00\x00 no lines\n"])
def test_a_pass_that_was_stopped_continues_with_what_is_missing(cache, left):
    seen = []

    def compute(batches):
        for positions in batches:
            if len(seen) == 1:
                raise KeyboardInterrupt
            seen.append(positions)
            yield [{"pair": i, "square": i * i} for i in positions]

    with pytest.raises(KeyboardInterrupt):
        squares(compute)
    (cache / "key.partial" / "of-another-process.jsonl").write_bytes(left)
    rest = []

    def going_on(batches):
        for positions in batches:
            rest.extend(positions)
            yield [{"pair": i, "square": i * i} for i in positions]

    data, _ = squares(going_on)
    assert seen == [[3, 4]] and rest == [1, 2, 0] and data["square"][:] == [0, 1, 4, 9, 16]
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_a_row_without_a_result_is_named_and_the_others_are_kept(cache):
    def compute(batches):
        for positions in batches:
            yield [{"pair": i, "square": i * i} for i in positions if i != 2]

    with pytest.raises(UserError, match="row 3 has no square"):
        squares(compute)
    data, _ = squares(lambda batches: ([{"pair": i, "square": -1} for i in positions] for positions in batches))
    assert data["square"][:] == [0, 1, -1, 9, 16]
