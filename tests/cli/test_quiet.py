"""What the console leaves out without `--verbose`: only what nobody can act on."""

import io
import logging
import threading
import warnings

import pytest
from lightning.fabric import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from transformers.utils.logging import set_tqdm_hook, tqdm

import dpo_lightning
from dpo_lightning.cli import console


@pytest.fixture
def said(monkeypatch):
    """What Lightning logs to a console of a command without `--verbose`."""
    stream = io.StringIO()
    for name in ("lightning.pytorch", "lightning.fabric"):  # each has a handler, except in pytest
        monkeypatch.setattr(logging.getLogger(name), "handlers", [logging.StreamHandler(stream)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    console.keep_imported_quiet()
    yield stream
    set_tqdm_hook(None)


def test_lightning_is_quiet_and_we_are_not(said, tmp_path):
    seed_everything(1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    Trainer(precision="bf16-mixed", val_check_interval=1.0, default_root_dir=tmp_path, **quiet)
    rank_zero_info("data: 3 train pairs")
    assert said.getvalue() == "data: 3 train pairs\n"
    # One batch where all were meant is a mistake that is easily made.
    Trainer(limit_val_batches=1, default_root_dir=tmp_path, **quiet)
    assert "`Trainer(limit_val_batches=1)` was configured so 1 batch will be used." in said.getvalue()


@pytest.mark.parametrize(
    ("level", "message", "stays"),
    [
        (logging.INFO, "[rank: 1] Seed set to 42", False),
        (logging.INFO, f"{'-' * 100}\ndistributed_backend=gloo\nAll distributed processes registered.", False),
        (logging.INFO, "`Trainer.fit` stopped: `max_steps=4` reached.", False),
        (logging.INFO, "`Trainer.fit` stopped: No training batches.", True),
        (logging.INFO, "Restored all states from the checkpoint at last.ckpt", True),
        (logging.INFO, "Metric val/loss improved. New best score: 0.1", True),  # EarlyStopping(verbose=True)
        (logging.WARNING, "GPU available: but broken", True),
        (logging.ERROR, "CUDA out of memory", True),
    ],
)
def test_only_what_is_listed_is_hidden(level, message, stays):
    record = logging.LogRecord("lightning.pytorch", level, __file__, 1, message, (), None)
    assert console.is_of_use(record) == stays


@pytest.mark.parametrize(
    ("message", "stays"),
    [
        ("The 'train_dataloader' does not have many workers which may be a bottleneck.", False),
        ("`ModelCheckpoint(monitor='val/loss')` could not find the monitored key in the returned metrics: []", False),
        ("`ModelCheckpoint(monitor='train/los')` could not find the monitored key in the returned metrics: []", True),
        ("The number of training batches (3) is smaller than the logging interval", True),
        ("my_loss is deprecated", True),
    ],
)
def test_only_warnings_that_are_listed_are_hidden(message, stays):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        console.keep_quiet()
        warnings.warn_explicit(message, UserWarning, "fit_loop.py", 7, module="lightning.pytorch.loops.fit_loop")
        warnings.warn_explicit(message, UserWarning, "my_loss.py", 7, module="my_loss")
    assert [warning.filename for warning in caught] == ["fit_loop.py"] * stays + ["my_loss.py"]


def test_a_warning_names_the_line_of_the_users_own_code_alone():
    for library in (dpo_lightning.__file__, warnings.__file__, Trainer.fit.__code__.co_filename):
        assert console.warning_line("3 prompts are cut", UserWarning, library, 7) == "warning: 3 prompts are cut\n"
    own = console.warning_line("old", DeprecationWarning, "/home/me/my_judge.py", 7)
    assert own == "warning: /home/me/my_judge.py:7: old\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_long_lines_break_between_words_in_a_terminal(terminal, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "20")
    text = "model: tiny, all of it is trained\n/a/path/that/is/longer/than/20 is-not-broken\nfits\n"
    wrapped = "model: tiny, all of\nit is trained\n/a/path/that/is/longer/than/20\nis-not-broken\nfits\n"
    assert console.wrapped(text) == (wrapped if terminal else text)
    record = logging.makeLogRecord({"msg": "%s", "args": (text,)})
    assert console.Wrapping().format(record) == (wrapped if terminal else text)


def test_bars_of_transformers_are_drawn_where_there_is_something_to_wait_for(said, monkeypatch, capsys):
    assert list(tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(console, "SECONDS_BEFORE_BARS", 0.0)
    assert list(tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert "Loading weights" in capsys.readouterr().err


def test_a_thread_ends_with_one_line_if_the_disk_is_full(capsys, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", console.thread_error)
    for error in (OSError(28, "No space left on device"), ValueError("a fault")):

        def fail(error=error):
            raise error

        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: a thread of this run ended: [Errno 28] No space left on device"
    assert "Traceback" in "".join(others) and others[-1] == "ValueError: a fault"
