"""The callback that writes `last.ckpt`, from which a run is resumed, and keeps `previous.ckpt` beside it."""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from dpo_lightning.callbacks.agreement import Agreement
from dpo_lightning.callbacks.checkpoint_files import (
    LAST,
    PREVIOUS,
    check_resumable,
    damage,
    newest_first,
    newest_resumable,
)
from dpo_lightning.callbacks.context import find_callback, run_folder
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import last_save
from dpo_lightning.models.hub import reason_of
from dpo_lightning.parsing import Range, check_settings
from dpo_lightning.storage.atomic import PARTIAL, atomic_file
from dpo_lightning.storage.locks import hold, in_use, let_go
from dpo_lightning.storage.states import check_amount

NOT_NEGATIVE = Range("at least 0", lambda value: value >= 0)
LOCK = ".dpo-lightning.lock"  # in a checkpoint folder outside the run's own folder


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, to resume from, and keeps the one before it as `previous.ckpt`.

    They are written at regular intervals, when training ends and when it is stopped, always between two optimizer
    steps and after a step's metrics have been logged. They lie beside ModelCheckpoint's best checkpoints.

    Args:
        every_n_minutes: minutes between two checkpoints; 0 for no limit.
        every_n_steps: optimizer steps between two checkpoints; 0 for no limit.
    """

    def __init__(
        self, every_n_minutes: Annotated[float, NOT_NEGATIVE] = 5.0, every_n_steps: Annotated[int, NOT_NEGATIVE] = 0
    ) -> None:
        check_settings(LastCheckpoint.__init__, locals(), "last.")
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.path = Path(LAST)  # set when training starts
        self._lock: Path | None = None
        self._step, self._saved = 0, 0.0  # step and time of the newest one
        self._agreed = Agreement()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, and removes partial files that a killed run left.

        Raises:
            UserError: the folder has another run's checkpoints, which this run could replace, or the optimizer's
                restored state does not fit the weights.
        """
        best, run = find_callback(trainer, ModelCheckpoint), run_folder(trainer)
        if trainer.ckpt_path:
            _check_optimizers(trainer)
        self._step, self._saved, self._agreed = trainer.global_step, time.monotonic(), Agreement()
        if run is None:
            return
        self.path = Path(best.dirpath if best and best.dirpath else run / "checkpoints") / LAST
        if run.absolute() not in self.path.absolute().parents:  # the run's own folder is locked (`run_folders`)
            self._lock_folder(trainer)
        found = newest_first(self.path.parent)
        if found and trainer.ckpt_path is None:
            raise UserError(
                f"'{self.path if self.path in found else found[0]}' is another run's: "
                + ("resume that run with --ckpt_path last" if newest_resumable(self.path.parent) else "move it away")
                + ", or choose another checkpoint.dirpath"
            )
        if trainer.is_global_zero:
            for partial in self.path.parent.glob(f"*{ModelCheckpoint.FILE_EXTENSION}.????????{PARTIAL}"):
                with suppress(OSError):
                    partial.unlink()
            if self.path.exists() and damage(self.path):  # or it would become previous.ckpt
                self.path.replace(self.path.with_suffix(".damaged"))

    def _lock_folder(self, trainer: Trainer) -> None:
        """Locks the folder until the run ends, so that two runs cannot replace each other's checkpoints."""
        self._lock = self.path.with_name(LOCK)
        try:
            taken = hold(self._lock) if trainer.is_global_zero else None
        except OSError as error:
            raise UserError(f"checkpoint.dirpath '{self.path.parent}' cannot be written: {reason_of(error)}") from error
        if not trainer.strategy.broadcast(taken):
            raise in_use(f"checkpoint.dirpath '{self.path.parent}'", "choose another folder")

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Unlocks the folder, also after an error."""
        if self._lock is not None:
            let_go(self._lock, remove=True)

    on_exception = teardown

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises UserError if a run cannot be resumed from the checkpoint (`check_resumable`)."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_resumable(checkpoint, trainer.ckpt_path or LAST)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves if it is time and the batch begins an optimizer step."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the final state."""
        self.save(trainer)

    def _due(self, trainer: Trainer) -> bool:
        steps = trainer.global_step - self._step
        if not steps:
            return False
        if self.every_n_steps and steps >= self.every_n_steps:
            return True
        if not self.every_n_minutes:
            return False
        late = time.monotonic() - self._saved >= 60 * self.every_n_minutes  # by each rank's own clock
        return bool(self._agreed(trainer, late))

    def save(self, trainer: Trainer) -> None:
        """Writes `last.ckpt`, unless this step is already saved or the run is a trial. Call it on all ranks."""
        if trainer.global_step == self._step or trainer.fast_dev_run:
            return
        best = find_callback(trainer, ModelCheckpoint)
        step, saved = last_save(best) if best and not best.save_weights_only else (0, "")
        same = trainer.strategy.broadcast(step == trainer.global_step and Path(saved).is_file())
        if trainer.is_global_zero and self.path.exists():
            _link(self.path, self.path.with_name(PREVIOUS))
        if same and trainer.is_global_zero:  # ModelCheckpoint has saved this step: no need to write it twice
            _link(Path(saved), self.path)
        trainer.strategy.barrier("LastCheckpoint")
        if not same:
            trainer.save_checkpoint(self.path, weights_only=False)
        self._step, self._saved, self._agreed = trainer.global_step, time.monotonic(), Agreement()


def newest_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of a run, `last.ckpt` or one of ModelCheckpoint's; None if there is none."""
    last, other = find_callback(trainer, LastCheckpoint), trainer.checkpoint_callback
    if last and last.path.exists():
        return last.path
    path = getattr(other, "last_model_path", "") or getattr(other, "best_model_path", "")
    return Path(path) if path else None


def _check_optimizers(trainer: Trainer) -> None:
    """Checks the optimizers' restored states, which PyTorch takes as they are.

    A state that does not fit would fail in the midst of the first step, train differently or, where the optimizer is
    fused, be read past its end.
    """
    for optimizer in trainer.optimizers:
        adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        if not adam and not optimizer.defaults.get("fused"):  # PyTorch compares the shapes in such a step
            continue
        try:
            for weight, state in optimizer.state.items():
                shape = list(weight.shape) if torch.is_tensor(weight) else None
                _check_shapes({name: value for name, value in state.items() if adam or value is not None}, shape)
                if adam:
                    _check_moments(state)
            for group in optimizer.param_groups if adam else ():
                _check_options(group, optimizer.defaults)
        except ValueError as error:
            raise UserError(
                f"--ckpt_path '{trainer.ckpt_path}': the optimizer's {error}: the checkpoint was edited, or its "
                "run had other optimizer settings; resume from another one"
            ) from error


def _check_shapes(state: dict[str, Any], shape: list[int] | None) -> None:
    for name, value in state.items():
        if not torch.is_tensor(value) or list(value.shape) != ([] if name == "step" else shape):
            found = f"shape {list(value.shape)}" if torch.is_tensor(value) else f"type {type(value).__name__}"
            raise ValueError(f"{name} has the {found}, which does not fit its weight ({shape})")


def _check_moments(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is not a dense tensor of floating-point numbers")
        local = value.to_local() if hasattr(value, "to_local") else value
        if not local.isfinite().all() or name != "exp_avg" and (local < 0).any():
            raise ValueError(f"{name} has a value that is negative or not finite")
    if missing := {"step", "exp_avg", "exp_avg_sq"} - set(state):
        raise ValueError(f"state has no {min(missing)}")


def _check_options(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Checks a group's settings: only numbers, as schedules change them, and what is only for speed may differ."""
    for name, own in {**defaults, **({"initial_lr": 0.0} if "initial_lr" in group else {})}.items():
        if name not in group:
            raise ValueError(f"{name} is missing")
        value = group[name]
        if isinstance(own, float):
            check_amount(value, name)
        elif name in ("fused", "foreach") and value in (None, True, False):
            continue
        elif (tuple(value) if isinstance(value, list) else value) != own:  # a sharded checkpoint has no tuples
            raise ValueError(f"{name} is {group[name]!r} instead of {own!r}")


def _link(path: Path, name: Path) -> None:
    """Makes `name` a hard link to a checkpoint, or a copy if the file system has no links; a folder is renamed."""
    if path.is_dir():
        shutil.rmtree(name, ignore_errors=True)
        path.rename(name)
        return
    with atomic_file(name) as partial:
        try:
            os.link(path, partial)
        except OSError:
            shutil.copyfile(path, partial)
