"""A run to attack: trained once for all tests, and its checkpoint with parts of it changed."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main

LAST = Path("lightning_logs", "version_0", "checkpoints", "last.ckpt")


def command(name: str, model: Path, *args: str) -> int:
    """Runs a Trainer command in the working directory, on the small rows, and gives its exit code."""
    rows = Path("rows.jsonl")
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:24]), encoding="utf-8")
    argv = [name, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model)]
    argv += ["--data.train_dataset", str(rows), "--data.val_size", "2", "--data.test_size", "2"]
    argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "2"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_steps", "2"]
    argv += ["--replies.num_prompts", "1", "--replies.every_n_steps", "0", "--trainer.enable_progress_bar", "false"]
    return main([*argv, *args])


@functools.cache
def trained(model: Path) -> Path:
    """The folder of a run of two steps, whose checkpoint is `LAST`."""
    root = Path(tempfile.mkdtemp(prefix="dpo-lightning-test-run-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert command("fit", model) == 0
    return root


def edited(model: Path, to: Path, settings: dict[str, Any] | None = None, **parts: Any) -> str:
    """Writes the run's checkpoint with other settings of the model, or other parts, None for none; gives its path."""
    checkpoint = torch.load(trained(model) / LAST, weights_only=True) | parts
    for name in [name for name, part in parts.items() if part is None]:
        del checkpoint[name]
    if settings:
        checkpoint["hyper_parameters"] = checkpoint["hyper_parameters"] | settings
    to.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, to)
    return str(to)


def error_line(capsys: pytest.CaptureFixture) -> str:
    """What a command that failed has said: one `error: ` line, at the end, and no traceback."""
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]), stderr
    return lines[0]
