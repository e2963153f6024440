"""Checks of a run's settings that Lightning would fail on later, without a clear message."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_warn

from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.export.callback import ExportCallback
from dpo_lightning.callbacks.forgetting import ForgettingCallback
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.cli.arms import Find
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import local_path
from dpo_lightning.parsing import Seed, check_setting, check_settings

SECTIONS: dict[str, Any] = {  # of settings -> the class that gets them, if it is ours
    "model": DPOModule,
    "data": PreferenceDataModule,
    "trainer": None,
    "replies": RepliesCallback,
    "forgetting": ForgettingCallback,
    "guards": GuardsCallback,
    "checkpoint": None,
    "last": LastCheckpoint,
    "predictions": ReplyWriter,
    "export": ExportCallback,
    "find": Find,
}
SPLIT_SETTINGS = ("val_dataset", "test_dataset", "val_size", "test_size", "seed")  # decide which rows are held out
PROCESSES = 8  # allowed on any CPU, to try out distributed runs


def check_run_settings(settings: Namespace) -> None:
    """Raises UserError for a setting of a command that is not allowed, before anything is created from it."""
    for section, kind in SECTIONS.items():
        given = settings.get(section, Namespace())
        if not isinstance(given, Namespace):
            raise UserError(f"{section} is '{given}': it must be a section with settings below it")
        if kind:  # the parser accepts null for any setting in a file
            nulls = {name: None for name, value in given.items() if value is None}
            check_settings(kind.__init__, nulls, f"{section}.")
    checkpoint = settings.get("checkpoint") or {}
    filename = checkpoint.get("filename") or ""
    if filename.startswith("/") or ".." in filename.split("/"):
        raise UserError(f"checkpoint.filename is '{filename}': it must lie in the run's folder of checkpoints")
    for folder in (settings.trainer.get("default_root_dir"), checkpoint.get("dirpath")):
        if "://" not in str(folder or ""):
            local_path(str(folder or "."))  # refuses names that no folder can have
    seed = settings.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool):
        check_setting("seed_everything", seed, Seed)
    trainer = settings.trainer
    if not isinstance(trainer.get("val_check_interval") or 0, (int, float, str)):
        raise UserError("trainer.val_check_interval is a table: it must be a number of batches, or a time")
    for name in ("log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch"):
        if (value := trainer.get(name)) is not None and value < 1:
            raise UserError(f"trainer.{name} is {value}: it must be at least 1")
    if (trainer.get("gradient_clip_val") or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val is {trainer.gradient_clip_val}: it must be 0 (no clipping) or more")
    if trainer.get("barebones"):
        raise UserError("trainer.barebones switches checkpoints, logs and replies off, which a run needs: leave it out")
    check_processes(trainer.get("accelerator"), trainer.get("devices"))


def warn_of_other_splits(command: str, data: Namespace, trained: Mapping[str, Any], path: str) -> None:
    """Warns if the held-out rows of a command may be rows that the checkpoint's run trained on.

    Args:
        data: settings of this command.
        trained: settings of the data that the checkpoint's run had.
        path: of the checkpoint.
    """
    own = {"validate": ("val",), "test": ("test",), "predict": ("predict", "test")}.get(command, ())
    if not own or any(data[f"{name}_dataset"] for name in own) or trained.get("train_dataset") != data.train_dataset:
        return
    changed = [name for name in SPLIT_SETTINGS if name in trained and trained[name] != data[name]]
    if changed:
        values = ", ".join(f"data.{name} was {trained[name]!r} and is {data[name]!r}" for name in changed)
        rank_zero_warn(
            f"some rows of this {command} may have been trained on, because they are split off otherwise than in the "
            f"run of '{path}': {values}"
        )


def check_processes(accelerator: Any, devices: Any) -> None:
    """Raises UserError for more processes on the CPU than fit: each has its own copy of the model."""
    on_cpu = accelerator == "cpu" or accelerator == "auto" and not torch.cuda.is_available()
    if not on_cpu or torch.backends.mps.is_available() and accelerator == "auto":
        return
    most = max(PROCESSES, os.cpu_count() or 1)
    try:
        number = int(devices)
    except (TypeError, ValueError):
        return  # auto, a list, or something that Lightning refuses
    if not 1 <= number <= most:
        raise UserError(
            f"trainer.devices is {devices}: on the CPU it is a number of processes, each with its own copy of the "
            f"model: 1 to {most} here"
        )
