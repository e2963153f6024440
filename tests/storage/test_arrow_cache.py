import os
import time

import pyarrow as pa
import pytest

from dpo_lightning.storage.arrow_cache import cached_dataset
from side_by_side import at_once

SCHEMA = pa.schema([("n", pa.int64())])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "dpo_lightning"


def batches():
    yield {"n": [1, 2]}
    yield {"n": [3]}


def test_what_was_written_is_read_and_not_made_again():
    data, note = cached_dataset("key", SCHEMA, batches, lambda: {"a": 1})
    again, same = cached_dataset("key", SCHEMA, None, None)
    assert data["n"][:] == again["n"][:] == [1, 2, 3] and note == same == {"a": 1}
    assert data._fingerprint == again._fingerprint == "key"


def test_a_process_that_comes_second_takes_what_the_first_one_wrote(cache, tmp_path):
    def write():
        def slowly():
            for columns in batches():
                time.sleep(0.1)
                yield columns

        return [cached_dataset("key", SCHEMA, slowly, lambda: {"by": os.getpid()}) for _ in range(2)][0][1]

    one, other = at_once(write, write)
    assert one == other and one["by"] != os.getpid()
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_a_failure_leaves_nothing_behind(cache):
    def failing():
        yield {"n": [1]}
        raise KeyError("x")

    with pytest.raises(KeyError):
        cached_dataset("key", SCHEMA, failing, dict)
    assert not list(cache.iterdir())


def test_what_a_killed_run_left_is_removed_after_a_day(cache):
    abandoned = ("writing-old", "old.0123abcd.partial")  # the first one as earlier versions named it
    kept = ("now.0123abcd.partial", "resumed.partial")  # a shared pass's folder has no random part
    for name, seconds in (*((name, 1_000_000) for name in abandoned), (kept[0], None), (kept[1], 1_000_000)):
        (cache / name).mkdir(parents=True)
        if seconds:
            os.utime(cache / name, (seconds, seconds))
    cached_dataset("key", SCHEMA, batches, dict)
    assert sorted(path.name for path in cache.iterdir()) == ["key", *kept]
