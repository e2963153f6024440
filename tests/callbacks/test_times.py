"""Where a fit's time went, by a clock that the test turns."""

import pytest

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.checkpoint_files import AtomicCheckpointIO
from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.export import callback as export
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.callbacks.times import RunTimes, duration


def test_durations_are_short():
    assert [duration(v) for v in (12.34, 754, 7500)] == ["12.3 s", "12 min 34 s", "2 h 5 min"]


def slower(function, seconds, now):
    def slow(*args, **kwargs):
        now[0] += seconds
        return function(*args, **kwargs)

    return slow


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves on when one of these is called, by so many seconds."""
    now = [0.0]
    for owner, name, seconds in (
        (DPOModule, "configure_optimizers", 50),
        (DPOModule, "training_step", 3),
        (DPOModule, "validation_step", 100),
        (DPOModule, "predict_step", 1000),
        (AtomicCheckpointIO, "save_checkpoint", 10_000),
        (export, "export_policy", 100_000),
        (ReportCallback, "on_train_epoch_end", 7),
    ):
        monkeypatch.setattr(owner, name, slower(getattr(owner, name), seconds, now))
    return lambda: now[0]


def test_every_second_of_a_fit_is_counted_once(clock, quiet_trainer, model_folder, tokenizer, rows_file, capsys):
    times = RunTimes(began=-6, clock=clock)
    replies, last = RepliesCallback(0, num_prompts=2, num_shown=0), LastCheckpoint(every_n_steps=3)
    trainer = quiet_trainer(
        callbacks=[replies, last, export.ExportCallback(), ReportCallback()],
        plugins=[AtomicCheckpointIO()],
        profiler=times,
        max_steps=4,
        val_check_interval=2,
        num_sanity_val_steps=1,
        enable_checkpointing=True,
    )
    data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=0, batch_size=4)
    trainer.fit(DPOModule(str(model_folder), max_new_tokens=2), data)
    seconds = times.seconds
    assert seconds.pop("checkpoints") % 10_000 == 0
    assert seconds == {
        "start": 6 + 50, "steps": 4 * 3, "validations": 3 * 100, "replies": 2 * 1000, "export": 100_000, "rest": 7
    }  # fmt: skip
    assert sum(times.seconds.values()) == clock() + 6


def test_small_parts_are_told_with_the_rest(clock):
    now = [0.0]
    times = RunTimes(clock=lambda: now[0])
    for action, seconds in {"train_dataloader_next": 90, "save_checkpoint": 0.5, "on_test": 5}.items():
        with times.profile("run_training_epoch"), times.profile(action):
            now[0] += seconds
    assert str(times) == "1 min 36 s: steps 1 min 30 s, rest 5.5 s"
