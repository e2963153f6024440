"""Settings of a run -> UserError where Lightning would fall over them later, or mend them, with a line that says so."""

import inspect
import os
from typing import Any

import torch
from jsonargparse import Namespace

from dpo_lightning.callbacks.checkpoints import LastCheckpoint
from dpo_lightning.callbacks.export.callback import ExportCallback
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import local_path
from dpo_lightning.parsing import Seed, check_setting

SECTIONS = {  # of settings -> what is made from them, where that is ours
    "model": DPOModule,
    "data": PreferenceDataModule,
    "trainer": None,
    "replies": RepliesCallback,
    "checkpoint": None,
    "last": LastCheckpoint,
    "predictions": ReplyWriter,
    "export": ExportCallback,
}
PROCESSES = 8  # that any machine may be asked for, to try out distributed runs


def check_settings(settings: Namespace) -> None:
    """Checks the settings of a command before anything is made from them.

    Raises:
        UserError: the setting, what it is, and what it may be.
    """
    for section, made in SECTIONS.items():
        given = settings.get(section, Namespace())
        if not isinstance(given, Namespace):
            raise UserError(f"{section} is '{given}': it must be a section, with settings of its own below it")
        if made:
            refuse_null(section, given, made)
    checkpoint = settings.get("checkpoint") or {}
    named = checkpoint.get("filename") or ""
    if named.startswith("/") or ".." in named.split("/"):
        raise UserError(f"checkpoint.filename is '{named}': it must lie in the run's folder of checkpoints")
    for folder in (settings.trainer.get("default_root_dir"), checkpoint.get("dirpath")):
        if "://" not in str(folder or ""):
            local_path(str(folder or "."))  # that can be looked up
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
        raise UserError("trainer.barebones leaves out checkpoints, logs and replies, which a run is for: leave it out")
    check_processes(trainer.get("accelerator"), trainer.get("devices"))


def refuse_null(section: str, settings: Namespace, made: type) -> None:
    """Refuses `null` for a setting that must have a value: the parser lets it pass where it stands in a file.

    Raises:
        UserError: the setting, and its default.
    """
    for name, parameter in inspect.signature(made).parameters.items():
        if name in settings and settings[name] is None and parameter.default is not None:
            default = "" if parameter.default is parameter.empty else f" (left out, it is {parameter.default})"
            raise UserError(f"{section}.{name} is null: it must have a value{default}")


def check_processes(accelerator: Any, devices: Any) -> None:
    """Refuses more processes on the CPU than its machine can hold: each has a copy of the model.

    Raises:
        UserError: how many there may be.
    """
    on_cpu = accelerator == "cpu" or accelerator == "auto" and not torch.cuda.is_available()
    if not on_cpu or torch.backends.mps.is_available() and accelerator == "auto":
        return
    most = max(PROCESSES, os.cpu_count() or 1)
    try:
        number = int(devices)
    except (TypeError, ValueError):
        return  # auto, a list, or what Lightning refuses
    if not 1 <= number <= most:
        raise UserError(
            f"trainer.devices is {devices}: on the CPU it is a number of processes, each with its own copy of the "
            f"model: 1 to {most} here"
        )
