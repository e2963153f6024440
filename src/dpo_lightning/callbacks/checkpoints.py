"""Checkpoints that are whole or not there: written beside and renamed, checked before they are loaded, found again.

A crash, a full disk or a kill while one is written leaves the one before it as it was.
"""

import os
import pickle
import shutil
import time
import traceback
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line, local_path
from dpo_lightning.storage.locks import hold, let_go
from dpo_lightning.callbacks.context import find_callback, run_folder
from dpo_lightning.storage.states import check_amount, check_state

LAST, PREVIOUS, PARTIAL = "last.ckpt", "previous.ckpt", ".partial"
LOCK = ".dpo-lightning.lock"  # in a folder of checkpoints that is not the run's own
SETTINGS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
DATA_SETTINGS = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
RESTORING = {"_restore_modules_and_callbacks", "restore_training_state"}  # Lightning's functions
BEST = {  # of ModelCheckpoint's state
    "best_model_path": str,
    "best_model_score": torch.Tensor | None,
    "current_score": torch.Tensor | None,
    "best_k_models": {str: torch.Tensor},
    "kth_best_model_path": str,
    "kth_value": torch.Tensor,
    "last_model_path": str,
    "dirpath": str | None,
}
SHARDED = "meta.pt"  # in the folder of a sharded checkpoint, all but the weights and the optimizer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written atomically, checked before loading, and never unpickled."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes beside, flushes to the disk, renames.

        Raises:
            UserError: the file cannot be written; one that was there before stands.
        """
        if "://" in str(path):  # an object store has its own way to be atomic
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        partial = path.with_name(path.name + PARTIAL)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _flush_folder(path.parent)
        except (OSError, RuntimeError) as error:
            reason = _system_error(error)
            if reason is None:
                raise
            stands = " (the one before it stands)" if path.exists() else ""
            raise UserError(
                f"the checkpoint '{path}' cannot be written{stands}: {reason.strerror}; make room, or choose another "
                "folder with trainer.default_root_dir, and go on with --ckpt_path last"
            ) from error
        finally:
            _remove(partial)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Loads tensors and plain values, to the CPU unless told otherwise.

        Raises:
            UserError: there is no such file, it is damaged, or it holds other Python objects.
        """
        if "://" in str(path):
            try:
                return super().load_checkpoint(path, map_location or "cpu", weights_only=True)
            except Exception as error:  # each kind of store has its own
                raise UserError(f"--ckpt_path '{path}' cannot be read: {first_line(error)}") from error
        check_checkpoint(path)
        return read_checkpoint(path, map_location or "cpu")


def _flush_folder(folder: Path) -> None:
    """Makes a rename in a folder survive a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's own error in a chain of them: torch.save wraps it while it closes its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # a folder that cannot be written: then it was not written either
        pass


# ---------------------------------------------------------------------- whole or not


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, None where nothing is: each record has a CRC-32, and all are checked.

    A sharded checkpoint is a folder; `meta.pt` is written last.
    """
    if path.is_dir():
        return None if (path / SHARDED).is_file() else f"its {SHARDED} is missing"
    if not path.stat().st_size:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # a damaged archive fails anywhere in zipfile
        return str(error) or type(error).__name__
    return record and f"the bytes of {record} have changed"


def check_checkpoint(path: str | Path) -> None:
    """Raises:
    UserError: there is no such checkpoint, or it is damaged; the newest whole one beside it is named.
    """
    path = Path(path)
    local_path(str(path))  # that can be looked up
    if not path.exists():
        raise UserError(f"--ckpt_path '{path}': there is no such file")
    if not path.is_file() and not path.is_dir():  # a pipe would be waited for
        raise UserError(f"--ckpt_path '{path}' is no file")
    if reason := damage(path):
        whole = next((other for other in newest_first(path.parent) if other != path and not damage(other)), None)
        raise UserError(
            f"--ckpt_path '{path}' is not a readable checkpoint: {reason}; "
            + (f"the newest whole one beside it is '{whole}'" if whole else "there is no other one beside it")
        )


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content, of a sharded one all but weights and optimizer. `mmap`: tensors are read when used.

    Raises:
        UserError: it cannot be read, holds Python objects other than tensors and plain values, or is no checkpoint.
    """
    file = Path(path) / SHARDED if Path(path).is_dir() else path
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--ckpt_path '{path}' holds Python objects, which could run code of their own when loaded: only tensors "
            "and plain values are loaded"
        ) from error
    except Exception as error:  # a damaged file fails anywhere in torch.load
        raise UserError(f"--ckpt_path '{path}' is not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"global_step", SETTINGS} <= set(checkpoint):
        raise UserError(f"--ckpt_path '{path}' is not a checkpoint of dpo-lightning")
    if wrong := _malformed(checkpoint, weights=not Path(path).is_dir()):
        raise UserError(f"--ckpt_path '{path}' is not a checkpoint as dpo-lightning writes it: {wrong}")
    return checkpoint


def _malformed(checkpoint: dict[str, Any], weights: bool) -> str | None:
    """What a checkpoint's own parts are that they must not be, None where all is well."""
    step = checkpoint["global_step"]
    if type(step) is not int or not 0 <= step < 2**53:
        return f"its global_step is {step!r}, not a number of steps"
    for name in (SETTINGS, DATA_SETTINGS, "callbacks", *(["state_dict"] if weights else [])):
        part = checkpoint.get(name, None if name == "state_dict" else {})
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            return f"its {name} is missing" if part is None else f"its {name} is no table of names and values"
    for name, weight in checkpoint["state_dict"].items() if weights else ():
        if not torch.is_tensor(weight):
            return f"the weight {name!r} is {type(weight).__name__}, not a tensor"
    return None


# ---------------------------------------------------------------------- to go on from


def can_go_on(path: Path) -> bool:
    """Whether a run can go on from a whole file: it is a checkpoint, and not of the weights alone."""
    try:
        return "lr_schedulers" in read_checkpoint(path, mmap=True)
    except UserError:
        return False


def check_resumable(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Checks what a run is to go on from.

    Raises:
        UserError: it holds the weights alone, or names files for ModelCheckpoint to delete that are none of its own.
    """
    if "lr_schedulers" not in checkpoint or "loops" not in checkpoint:
        raise UserError(
            f"--ckpt_path '{path}' holds the weights alone (checkpoint.save_weights_only), so no run can go on from "
            "it: it can be tested and exported; go on with --ckpt_path last"
        )
    for name, state in (checkpoint.get("callbacks") or {}).items():
        if name.startswith(ModelCheckpoint.__name__):
            _check(state, BEST, "ModelCheckpoint's state", path)
        if isinstance(state, dict) and (stray := _stray(state)):
            raise UserError(
                f"--ckpt_path '{path}' names {stray!r} as one of its run's checkpoints, but that lies elsewhere or "
                "is none, and what ModelCheckpoint no longer wants it deletes: it was edited; do not use it"
            )


def _check(state: Any, kind: Any, name: str, path: str | Path) -> None:
    try:
        check_state(state, kind, name)
    except ValueError as error:
        raise UserError(f"--ckpt_path '{path}' was edited: {error}; go on from another one") from error


def _stray(state: dict[str, Any]) -> str | None:
    """A path in ModelCheckpoint's state, of those that it may delete, that does not lie in its own folder."""
    best = state.get("best_k_models")
    paths = [*(best if isinstance(best, dict) else ()), state.get("kth_best_model_path"), state.get("last_model_path")]
    folder = str(state.get("dirpath"))
    for path in map(str, filter(None, paths)):
        remote = "://" in path or "::" in path
        there = (
            path.rpartition("/")[0] == folder.rstrip("/")
            if remote
            else Path(path).resolve().parent == Path(folder).resolve()
        )
        if not there or not path.endswith(ModelCheckpoint.FILE_EXTENSION):
            return path
    return None


@contextmanager
def restoring() -> Iterator[None]:
    """Turns what Lightning raises while it restores a run from a checkpoint into one line.

    Raises:
        UserError: in place of any error from a state that does not fit this run, as an edited checkpoint's does not.
    """
    try:
        yield
    except (UserError, MisconfigurationException, OSError):  # which say it better
        raise
    except Exception as error:
        frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not RESTORING & set(frames):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the run cannot be restored from its checkpoint, whose states do not fit it ({what}): was it written by "
            "another version, or edited? Go on from another one, or start anew without --ckpt_path"
        ) from error


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first; of two that are equally new, `last.ckpt`."""
    there = [path for path in folder.glob("*.ckpt") if path.is_file() or path.is_dir()]  # no pipe, no dead link
    return sorted(there, key=lambda path: (path.stat().st_mtime_ns, path.name == LAST), reverse=True)


def newest_whole(folders: Iterable[Path], to_go_on: bool = False) -> Path | None:
    """The newest whole checkpoint of the first folder that has checkpoints, None if none has.

    Damaged ones are passed over, with a warning each, and `to_go_on` from it, those of the weights alone too.

    Raises:
        UserError: that folder's checkpoints are all damaged.
    """
    for folder in folders:
        found = newest_first(folder)
        for path in found:
            if reason := damage(path):
                rank_zero_warn(f"passing over the checkpoint '{path}', which is damaged: {reason}")
            elif to_go_on and not can_go_on(path):
                rank_zero_warn(f"passing over the checkpoint '{path}': no run can go on from it (weights alone?)")
            else:
                return path
        if found:
            raise UserError(
                f"--ckpt_path last: all {len(found)} checkpoints in '{folder}' are damaged"
                f"{' or none to go on from' if to_go_on else ''}: start anew without --ckpt_path, or give the file "
                "of an older run"
            )
    return None


def version(run: Path) -> int:
    """version_12 -> 12, -1 for another folder."""
    number = run.name.removeprefix("version_")
    return int(number) if number.isdecimal() and number != run.name else -1


def checkpoint_folders(root: Path) -> list[Path]:
    """The folders of checkpoints of all runs under a folder, the newest run's first."""
    runs = [run for run in (root / "lightning_logs").glob("version_*") if version(run) >= 0]
    return [run / "checkpoints" for run in sorted(runs, key=version, reverse=True)]


# ---------------------------------------------------------------------- when


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt`, to resume from, and the one before it as `previous.ckpt`.

    They are written every so often, when training ends, and when it is stopped, always between two optimizer steps
    and after everything about a step has been logged. They stand beside the best checkpoints of ModelCheckpoint.

    Args:
        every_n_minutes: minutes between two of them; 0 leaves it to `every_n_steps`.
        every_n_steps: optimizer steps between two of them; 0 leaves it to `every_n_minutes`.
    """

    def __init__(self, every_n_minutes: float = 5.0, every_n_steps: int = 0) -> None:
        if every_n_minutes < 0 or every_n_steps < 0:
            raise UserError("last.every_n_minutes and last.every_n_steps must be 0 or more")
        self.every_n_minutes, self.every_n_steps = every_n_minutes, every_n_steps
        self.path = Path(LAST)  # the run's, once it trains
        self._lock: Path | None = None
        self._step, self._saved = 0, 0.0  # of the newest one: its step, and when it was written

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting, and removes what a kill left half written.

        Raises:
            UserError: the folder holds another run's checkpoints, which this run could replace, or the optimizer's
                state in the checkpoint that the run goes on from does not fit the weights.
        """
        best, run = find_callback(trainer, ModelCheckpoint), run_folder(trainer)
        if trainer.ckpt_path:
            _check_optimizers(trainer)
        self._step, self._saved = trainer.global_step, time.monotonic()
        if run is None:
            return
        self.path = Path(best.dirpath if best and best.dirpath else run / "checkpoints") / LAST
        if run.absolute() not in self.path.absolute().parents:  # else it is this run's alone (`run_folders`)
            self._take(trainer)
        found = newest_first(self.path.parent)
        if found and trainer.ckpt_path is None:
            raise UserError(
                f"'{self.path if self.path in found else found[0]}' is another run's: go on with that run with "
                "--ckpt_path last, or choose another checkpoint.dirpath"
            )
        if trainer.is_global_zero:
            for partial in self.path.parent.glob(f"*{ModelCheckpoint.FILE_EXTENSION}{PARTIAL}"):
                _remove(partial)
            if self.path.exists() and damage(self.path):  # else it would become the previous one
                self.path.replace(self.path.with_suffix(".damaged"))

    def _take(self, trainer: Trainer) -> None:
        """Locks the folder until the run ends, that two runs do not replace each other's checkpoints."""
        self._lock = self.path.with_name(LOCK)
        try:
            taken = hold(self._lock) if trainer.is_global_zero else None
        except OSError as error:
            raise UserError(f"checkpoint.dirpath '{self.path.parent}' cannot be written: {error.strerror}") from error
        if not trainer.strategy.broadcast(taken):
            raise UserError(
                f"checkpoint.dirpath '{self.path.parent}' is in use by a run that still goes on: wait for its end or "
                "stop it, or choose another folder"
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the folder back, also after an error."""
        if self._lock is not None:
            let_go(self._lock, remove=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the folder back."""
        self.teardown(trainer, pl_module, "fit")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Looks at what the run is to go on from.

        Raises:
            UserError: it cannot (`check_resumable`).
        """
        if trainer.state.fn == TrainerFn.FITTING:
            check_resumable(checkpoint, trainer.ckpt_path or LAST)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Saves what the steps before this batch have led to, if it is time."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._due(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves the end."""
        self.save(trainer)

    def _due(self, trainer: Trainer) -> bool:
        steps = trainer.global_step - self._step
        if not steps:
            return False
        late = bool(self.every_n_minutes) and time.monotonic() - self._saved >= 60 * self.every_n_minutes
        late = late or bool(self.every_n_steps) and steps >= self.every_n_steps
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def save(self, trainer: Trainer) -> None:
        """Saves, unless this step is saved or a trial run. To be called on all ranks."""
        if trainer.global_step == self._step or trainer.fast_dev_run:
            return
        best = find_callback(trainer, ModelCheckpoint)
        same = best and best._last_global_step_saved == trainer.global_step and not best.save_weights_only
        same = trainer.strategy.broadcast(same and Path(best._last_checkpoint_saved).is_file())
        if trainer.is_global_zero and self.path.exists():
            _name_too(self.path, self.path.with_name(PREVIOUS))
        if same and trainer.is_global_zero:  # the best is of this step: no need to write it twice
            _name_too(Path(best._last_checkpoint_saved), self.path)
        trainer.strategy.barrier("LastCheckpoint")
        if not same:
            trainer.save_checkpoint(self.path)
        self._step, self._saved = trainer.global_step, time.monotonic()


def _check_optimizers(trainer: Trainer) -> None:
    """PyTorch itself finds what does not fit in the first step, reads past a state's end, or trains otherwise."""
    for optimizer in (o for o in trainer.optimizers if isinstance(o, torch.optim.AdamW)):
        where = f"--ckpt_path '{trainer.ckpt_path}': the optimizer's"
        for weight, state in optimizer.state.items():
            shape = weight.shape if torch.is_tensor(weight) else None
            for name, value in state.items():
                if not torch.is_tensor(value) or value.shape != (() if name == "step" else shape):
                    found = f"the shape {list(value.shape)}" if torch.is_tensor(value) else f"the type {type(value)}"
                    raise UserError(
                        f"{where} {name} has {found}, which is not that of its weight ({shape and list(shape)}): the "
                        "checkpoint was edited; go on from another one"
                    )
        try:
            for state in optimizer.state.values():
                _check_moments(state)
            for group in optimizer.param_groups:
                _check_options(group, optimizer.defaults)
        except ValueError as error:
            raise UserError(f"{where} {error}: the checkpoint was edited; go on from another one") from error


def _check_moments(state: dict[str, Any]) -> None:
    check_state(state, {"step": torch.Tensor, "exp_avg": torch.Tensor, "exp_avg_sq": torch.Tensor}, "state")
    for name, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} is no plain tensor of floating-point numbers")
        local = value.to_local() if hasattr(value, "to_local") else value
        if not local.isfinite().all() or name != "exp_avg" and (local < 0).any():
            raise ValueError(f"{name} has a value that it cannot have")


def _check_options(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Numbers may differ from this run's own (a schedule moves the learning rate), how a step is made may not."""
    for name, own in {**defaults, **({"initial_lr": 0.0} if "initial_lr" in group else {})}.items():
        if name not in group:
            raise ValueError(f"{name} is missing")
        value = group[name]
        if isinstance(own, float):
            check_amount(value, name)
        elif (tuple(value) if isinstance(value, list) else value) != own:  # a sharded checkpoint has no tuples
            raise ValueError(f"{name} is {group[name]!r} instead of {own!r}")


def _name_too(path: Path, name: Path) -> None:
    """Gives a checkpoint a second name, in place of what had it; a folder, which has but one, loses its own.

    Where the file system has no hard links a file is copied.
    """
    if path.is_dir():
        shutil.rmtree(name, ignore_errors=True)
        path.rename(name)
        return
    partial = name.with_name(name.name + PARTIAL)
    _remove(partial)
    try:
        os.link(path, partial)
    except OSError:
        shutil.copyfile(path, partial)
    partial.replace(name)
    _remove(partial)  # a rename does nothing where both are one file already
