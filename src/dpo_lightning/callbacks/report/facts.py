"""What a report says of its run in words: a title, what was trained on what, its costs, and how to run it again."""

import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import lightning
import torch
import transformers
from lightning.pytorch import LightningModule, Trainer

from dpo_lightning.callbacks.context import batch_limit, find_callback, optimized_by
from dpo_lightning.callbacks.methods import method_name
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.times import RunTimes, duration
from dpo_lightning.data.columns import numeric_column
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.models.hardware import device_name, peak_memory
from dpo_lightning.models.hub import short_name


def title_of(module: LightningModule, data: PreferenceDataModule) -> str:
    """A title in words: "gpt2 after DPO + SFT on rows.jsonl"."""
    trained_on = " + ".join(short_name(name) for name in dataset_weights(data.hparams.train_dataset))
    return f"{short_name(module.hparams.name_or_path)} after {method_name(module.hparams.loss_type)} on {trained_on}"


def facts(trainer: Trainer, module: LightningModule) -> dict[str, str]:
    """What was trained on what."""
    data, h, step = trainer.datamodule, module.hparams, trainer.global_step
    sizes = ", ".join(f"{len(pairs):,} {name}" for name, pairs in data.datasets.items())
    train = data.datasets["train"]
    cut = [int(numeric_column(train, column).sum()) for column in ("prompt_cut", "completion_cut")]
    accumulated = trainer.accumulate_grad_batches
    epochs = step / math.ceil(len(data.train_dataloader()) / accumulated)
    loss = h.loss_type if isinstance(h.loss_type, str) else " + ".join(h.loss_type)
    skipped = f", steps skipped for overflow: {module.skipped.total}" if module.skipped.total else ""
    return {
        "model": h.name_or_path,
        "weights": module.size,
        "data": " + ".join(
            name if weight == 1 else f"{weight:g} × {name}"
            for name, weight in dataset_weights(data.hparams.train_dataset).items()
        ),
        "pairs": f"{sizes}; rejected completions: {data.hparams.rejected}",
        "cut to fit": f"{cut[0]} prompts, {cut[1]} completions of training pairs ({data.max_length} tokens)",
        "loss": f"{method_name(h.loss_type)} ({loss}), beta {h.beta}",
        "optimizer": optimized_by(trainer, module),
        "batches": f"{batch_limit(data)} × {accumulated} accumulated × {trainer.world_size} devices",
        "length": f"{step} steps, {epochs:.2g} passes over the training pairs",
        "precision": f"{trainer.precision}{skipped}",
    }


def costs(trainer: Trainer, device: torch.device, seconds: float, curves: Mapping[str, Curve]) -> dict[str, str]:
    """Time, speed and memory, and what they were measured on."""
    speed = [value for _, value in curves.get("train/pairs_per_second", [])]
    found, replies = {"time": duration(seconds)}, find_callback(trainer, RepliesCallback)
    if isinstance(trainer.profiler, RunTimes):
        found["with its start"] = str(trainer.profiler)
    elif replies:
        found["of it for replies"] = f"{duration(replies.seconds)} ({replies.seconds / seconds:.1%})"
    if speed:
        found["speed"] = f"{sum(speed) / len(speed):.3g} pairs per second, without validation and replies"
    if (peak := peak_memory(device)) is not None:
        of = "of the process" if device.type == "cpu" else "on the GPU"
        found["peak memory"] = f"{peak / 2**30:.2f} GiB {of}"
    versions = [f"{module.__name__} {module.__version__}" for module in (torch, lightning, transformers)]
    return found | {
        "machine": device_name(device),
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
    }


def again(data: PreferenceDataModule, commit: str | None) -> dict[str, str]:
    """The command, the commit and the seeds of this run."""
    program, *args = sys.argv
    of_git = {"commit": f"{commit}, and what had changed in the folder since"} if commit else {}
    return {
        "command": shlex.join([Path(program).name, *args]),
        "folder": str(Path.cwd()),
        **of_git,
        "seed": f"{os.environ.get('PL_GLOBAL_SEED', 'none was set')}, of the data {data.hparams.seed}",
    }


def commit() -> str | None:
    """The commit that is checked out in the working directory, None if git knows of none.

    `git status`, which would tell whether files have changed, runs programs that a folder's own settings name.
    """
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
