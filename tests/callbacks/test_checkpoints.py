"""Checkpoints are written whole or not at all, checked before they are loaded, and found again."""

import errno
import logging
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from dpo_lightning.callbacks.checkpoint_files import (
    AtomicCheckpointIO,
    check_checkpoint,
    checkpoint_folders,
    damage,
    newest_undamaged,
    read_checkpoint,
)
from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.cli.download import path_below
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import UserError

IO = AtomicCheckpointIO()


def content(step):
    return {"global_step": step, "state_dict": {"w": torch.full((300,), float(step))}, "hyper_parameters": {}}


def write(path, step, age=0):
    IO.save_checkpoint(content(step), path)
    os.utime(path, (1_000_000 - age, 1_000_000 - age))
    return Path(path)


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "a" / "last.ckpt"
    IO.save_checkpoint(content(1), path)
    IO.save_checkpoint(content(2), path)
    assert torch.equal(IO.load_checkpoint(path)["state_dict"]["w"], content(2)["state_dict"]["w"])
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch, at):
    path = write(tmp_path / "last.ckpt", 1)

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if at == "fsync" else Path, at, fail)
        with pytest.raises(UserError, match=r"last.ckpt' cannot be written \(the one before it is kept\): No space"):
            IO.save_checkpoint(content(2), path)
    assert IO.load_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_limit_on_file_sizes_is_one_line(tmp_path):
    path = write(tmp_path / "last.ckpt", 1)
    big = content(2) | {"state_dict": {"w": torch.zeros(100_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written.*File too large"):
            IO.save_checkpoint(big, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert IO.load_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        IO.save_checkpoint(content(1), tmp_path / "file" / "last.ckpt")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_python_objects_in_a_checkpoint_are_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(1) | {"loops": Evil()}, "evil.ckpt")
    for load in (IO.load_checkpoint, read_checkpoint):
        with pytest.raises(UserError, match="'evil.ckpt' contains Python objects"):
            load("evil.ckpt")
    assert not Path("hacked").exists()


@pytest.mark.parametrize("name", ["..", "a/..", "../../etc/cron", "/etc/passwd", "owner/../../x", "owner/name", "gpt2"])
def test_a_name_cannot_lead_download_out_of_its_folder(name, tmp_path):
    folder = (tmp_path / path_below(name)).resolve()
    assert tmp_path in folder.parents


@pytest.mark.parametrize("how", ["truncated", "emptied", "changed", "text", "another archive"])
def test_a_damaged_file_is_refused_and_the_newest_whole_one_named(tmp_path, how):
    path, older = write(tmp_path / "last.ckpt", 3), write(tmp_path / "step2.ckpt", 2, age=10)
    write(tmp_path / "step1.ckpt", 1, age=20)
    data = bytearray(path.read_bytes())
    data = {
        "truncated": data[: len(data) // 2],
        "emptied": b"",
        "changed": bytes(data[:700]) + bytes([data[700] ^ 1]) + bytes(data[701:]),
        "text": b"not a checkpoint",
        "another archive": data,
    }[how]
    path.write_bytes(data)
    if how == "another archive":
        torch.save([1, 2], path)
        with pytest.raises(UserError, match="is not a checkpoint of dpo-lightning"):
            read_checkpoint(path)
        return
    assert damage(path)
    with pytest.raises(UserError, match=f"last.ckpt' is not a readable checkpoint: .*newest undamaged one.*'{older}'"):
        check_checkpoint(path)
    with pytest.warns(UserWarning, match="skipping the checkpoint '.*last.ckpt', which is damaged"):
        assert newest_undamaged([tmp_path]) == older


def test_every_flipped_bit_of_a_tensor_is_seen(tmp_path):
    path = write(tmp_path / "last.ckpt", 3)
    data = path.read_bytes()
    start = data.index(torch.full((4,), 3.0).numpy().tobytes())
    for bit in range(64):
        changed = bytearray(data)
        changed[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert damage(path)


def test_the_newest_runs_newest_whole_checkpoint_is_last(tmp_path):
    logs = tmp_path / "lightning_logs"
    for version, name, age in ((2, "step1", 30), (2, "last", 20), (10, "last", 10), (9, "last", 0)):
        write(logs / f"version_{version}" / "checkpoints" / f"{name}.ckpt", version, age)
    (logs / "version_11" / "checkpoints").mkdir(parents=True)  # killed before its first checkpoint
    (logs / "version_12").mkdir()
    (logs / "version_10" / "checkpoints" / "last.ckpt.partial").write_bytes(b"half")
    assert newest_undamaged(checkpoint_folders(tmp_path)) == logs / "version_10" / "checkpoints" / "last.ckpt"
    assert newest_undamaged(checkpoint_folders(tmp_path / "nowhere")) is None
    (logs / "version_10" / "checkpoints" / "last.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="all 1 checkpoints in .*version_10.* are damaged"):
        newest_undamaged(checkpoint_folders(tmp_path))  # an older run is another run


def test_a_sharded_checkpoint_is_whole_when_its_last_file_is_there(tmp_path):
    folder = tmp_path / "last.ckpt"
    folder.mkdir()
    assert damage(folder) == "its meta.pt is missing"
    torch.save({"global_step": 4, "hyper_parameters": {}}, folder / "meta.pt")
    check_checkpoint(folder)
    assert read_checkpoint(folder)["global_step"] == 4
    assert newest_undamaged([tmp_path]) == folder


# ---------------------------------------------------------------------- when


@pytest.fixture
def train(quiet_trainer, model_folder, rows_file, tmp_path):
    """Trains on batches of 4 with a LastCheckpoint; gives the steps in last.ckpt and previous.ckpt."""

    def run(steps, ckpt_path=None, **options):
        trainer = quiet_trainer(
            callbacks=[LastCheckpoint(**options)],
            enable_checkpointing=True,
            max_steps=steps,
            plugins=[AtomicCheckpointIO()],
        )
        trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "ModelCheckpoint"]
        module = DPOModule(str(model_folder), warmup_steps=0, lr_scheduler_type="constant")
        data = PreferenceDataModule(str(model_folder), rows_file, batch_size=4, max_length=128, val_size=0, test_size=0)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        folder = tmp_path / "checkpoints"
        return [read_checkpoint(p)["global_step"] if p.exists() else None for p in
                (folder / "last.ckpt", folder / "previous.ckpt")]  # fmt: skip

    return run


def test_last_and_previous_are_kept(train, tmp_path):
    assert train(5, every_n_minutes=0, every_n_steps=2) == [5, 4]
    with pytest.raises(UserError, match="last.ckpt' is another run's"):
        train(5)
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.write_bytes(b"")  # goes on from the previous one, which must not be replaced by this
    assert train(6, ckpt_path=str(tmp_path / "checkpoints" / "previous.ckpt"), every_n_minutes=0) == [6, 4]
    assert last.with_suffix(".damaged").exists()


def test_minutes_alone_save_the_end(train):
    assert train(3) == [3, None]


def test_lightning_adds_no_remark_to_what_is_saved(train, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    monkeypatch.setattr(caplog.handler, "filters", [])  # of commands that ran in this process before
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        train(1)
    assert "Trainer.fit" in caplog.text and "weights_only" not in caplog.text


def test_settings_below_zero_are_refused():
    with pytest.raises(UserError, match="every_n_minutes"):
        LastCheckpoint(every_n_minutes=-1)
