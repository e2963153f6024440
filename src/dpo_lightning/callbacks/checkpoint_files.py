"""Checkpoint files: written atomically, checked before they are loaded, and found again."""

import functools
import pickle
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import failed_restoring
from dpo_lightning.models.hub import first_line, local_path
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.states import check_state

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
SETTINGS = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
DATA_SETTINGS = LightningDataModule.CHECKPOINT_HYPER_PARAMS_KEY
BEST = {  # types in ModelCheckpoint's state
    "best_model_path": str,
    "best_model_score": torch.Tensor | None,
    "current_score": torch.Tensor | None,
    "best_k_models": {str: torch.Tensor},
    "kth_best_model_path": str,
    "kth_value": torch.Tensor,
    "last_model_path": str,
    "dirpath": str | None,
}
RESUMED = "lr_schedulers"  # a part that only checkpoints with more than the weights have
SHARDED = "meta.pt"  # in a sharded checkpoint's folder: everything but the weights and the optimizer


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes Lightning's checkpoint files atomically, checks them before loading, and never unpickles objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes a checkpoint as an `atomic_file`.

        Raises:
            UserError: the file cannot be written; an earlier one of this name is kept.
        """
        if "://" in str(path):  # object stores are atomic by themselves
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            reason = _system_error(error)
            if reason is None:
                raise
            kept = " (the one before it is kept)" if path.exists() else ""
            raise UserError(
                f"the checkpoint '{path}' cannot be written{kept}: {reason.strerror}; free some space, or choose "
                "another folder with trainer.default_root_dir, and resume with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        """Loads tensors and plain values, to the CPU by default.

        Raises:
            UserError: there is no such file, it is damaged, or it has other Python objects in it.
        """
        if "://" in str(path):
            try:
                return super().load_checkpoint(path, map_location or "cpu", weights_only=True)
            except Exception as error:  # each kind of store has its own errors
                raise UserError(f"--ckpt_path '{path}' cannot be read: {first_line(error)}") from error
        check_checkpoint(path)
        return read_checkpoint(path, map_location or "cpu", mmap=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system's error in a chain of errors: torch.save wraps it while it closes its archive."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, or None: the CRC-32 of every record is checked, once for each file.

    Of a sharded checkpoint, which is a folder, only `meta.pt` is looked for: it is written last.
    """
    if path.is_dir():
        return None if (path / SHARDED).is_file() else f"its {SHARDED} is missing"
    stat = path.stat()
    if not stat.st_size:
        return "it is empty"
    return _damaged_record(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _damaged_record(path: Path, *state: int) -> str | None:
    """As `damage`; `state` is what changes with the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except Exception as error:  # a damaged archive fails anywhere in zipfile
        return first_line(error)
    return record and f"the bytes of {record} have changed"


def check_checkpoint(path: str | Path) -> None:
    """Raises UserError if a checkpoint is missing or damaged, and names the newest undamaged one beside it."""
    path = Path(path)
    local_path(str(path))  # refuses names that no file can have
    if not path.exists():
        raise UserError(f"--ckpt_path '{path}': there is no such file")
    if not path.is_file() and not path.is_dir():  # reading from a pipe would wait forever
        raise UserError(f"--ckpt_path '{path}' is not a file")
    if reason := damage(path):
        other = next((other for other in newest_first(path.parent) if other != path and not damage(other)), None)
        raise UserError(
            f"--ckpt_path '{path}' is not a readable checkpoint: {reason}; "
            + (f"the newest undamaged one beside it is '{other}'" if other else "there is no other one beside it")
        )


def read_checkpoint(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content; of a sharded one, without weights and optimizer. `mmap`: tensors are read when used.

    Raises:
        UserError: it cannot be read, has Python objects in it that are not plain values, or is not a checkpoint.
    """
    file = Path(path) / SHARDED if Path(path).is_dir() else path
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"--ckpt_path '{path}' contains Python objects, which could run code when loaded: only tensors and plain "
            "values are loaded"
        ) from error
    except Exception as error:  # a damaged file fails anywhere in torch.load
        raise UserError(f"--ckpt_path '{path}' is not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not {"global_step", SETTINGS} <= set(checkpoint):
        raise UserError(f"--ckpt_path '{path}' is not a checkpoint of dpo-lightning")
    if wrong := _malformed(checkpoint, weights=not Path(path).is_dir()):
        raise UserError(f"--ckpt_path '{path}' is not a checkpoint as dpo-lightning writes it: {wrong}")
    return checkpoint


def _malformed(checkpoint: dict[str, Any], weights: bool) -> str | None:
    """What is wrong with the types of a checkpoint's parts, or None."""
    step = checkpoint["global_step"]
    if type(step) is not int or not 0 <= step < 2**53:
        return f"its global_step is {step!r}, not a number of steps"
    for name in (SETTINGS, DATA_SETTINGS, "callbacks", *(["state_dict"] if weights else [])):
        part = checkpoint.get(name, None if name == "state_dict" else {})
        if not isinstance(part, dict) or not all(isinstance(key, str) for key in part):
            return f"its {name} is missing" if part is None else f"its {name} is not a table of names and values"
    for name, weight in checkpoint["state_dict"].items() if weights else ():
        if not torch.is_tensor(weight):
            return f"the weight {name!r} is {type(weight).__name__}, not a tensor"
    return None


def newest_resumable(folder: Path) -> Path | None:
    """The newest undamaged checkpoint in a folder with more than the weights, from which a run can be resumed."""
    return next((path for path in newest_first(folder) if not damage(path) and RESUMED in _parts(path)), None)


def _parts(path: Path) -> frozenset[str]:
    """The names of a checkpoint's parts, none if it cannot be used."""
    stat = (path / SHARDED if path.is_dir() else path).stat()
    return _parts_read(path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@functools.cache
def _parts_read(path: Path, *state: int) -> frozenset[str]:
    """As `_parts`, read once for each `state` of a file."""
    try:
        return frozenset(read_checkpoint(path, mmap=True))
    except UserError:
        return frozenset()


def check_resumable(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Checks the checkpoint from which a run is to be resumed.

    Raises:
        UserError: it has only weights, or lets ModelCheckpoint delete files that are not its own.
    """
    if RESUMED not in checkpoint or "loops" not in checkpoint:
        other = newest_resumable(Path(path).parent)
        raise UserError(
            f"--ckpt_path '{path}' has only the weights (checkpoint.save_weights_only): it can be tested and "
            "exported, but no run can be resumed from it; resume with "
            + (f"--ckpt_path '{other}'" if other else "another checkpoint, there is none beside it")
        )
    for name, state in (checkpoint.get("callbacks") or {}).items():
        if name.startswith(ModelCheckpoint.__name__):
            try:
                check_state(state, BEST, "ModelCheckpoint's state")
            except ValueError as error:
                raise UserError(f"--ckpt_path '{path}' was edited: {error}; resume from another one") from error
        if isinstance(state, dict) and (stray := _stray(state)):
            raise UserError(
                f"--ckpt_path '{path}' was edited, do not use it: it names {stray!r} as one of its run's checkpoints, "
                "which ModelCheckpoint deletes in time, but that lies elsewhere or is not a checkpoint"
            )


def _stray(state: dict[str, Any]) -> str | None:
    """A path that ModelCheckpoint's state lets it delete, although it does not lie in its folder."""
    best = state.get("best_k_models")
    paths = [*(best if isinstance(best, dict) else ()), state.get("kth_best_model_path"), state.get("last_model_path")]
    folder = str(state.get("dirpath"))
    for path in map(str, filter(None, paths)):
        if "://" in path or "::" in path:  # in an object store
            own = path.rpartition("/")[0] == folder.rstrip("/")
        else:
            own = Path(path).resolve().parent == Path(folder).resolve()
        if not own or not path.endswith(ModelCheckpoint.FILE_EXTENSION):
            return path
    return None


@contextmanager
def restoring() -> Iterator[None]:
    """Turns what Lightning raises while it restores a run from a checkpoint into a UserError.

    Such errors come from states that do not fit the run, for example those of an edited checkpoint.
    """
    try:
        yield
    except (UserError, MisconfigurationException, OSError):  # whose messages are better
        raise
    except Exception as error:
        if not failed_restoring(error):
            raise
        what = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"the run cannot be restored: the checkpoint's states do not fit it ({what}); was it edited, or written by "
            "another version? Resume from another one, or start a new run without --ckpt_path"
        ) from error


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first; of two of the same age, `last.ckpt` first."""
    paths = [path for path in folder.glob("*.ckpt") if path.is_file() or path.is_dir()]  # no pipe, no dead link
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name == LAST), reverse=True)


def newest_undamaged(folders: Iterable[Path], to_resume: bool = False) -> Path | None:
    """The newest usable checkpoint of the first folder that has checkpoints; None if no folder has any.

    Damaged ones are skipped with a warning each. With `to_resume` those of the weights alone are skipped as well; there
    may be no others yet, if the run was killed early: then it is None, too.

    Raises:
        UserError: none of that folder's checkpoints is usable.
    """
    found = next(filter(None, map(newest_first, folders)), [])
    unusable = 0
    for path in found:
        reason = damage(path) or (to_resume and not _parts(path) and "it is no checkpoint of dpo-lightning")
        if reason:
            unusable += 1
            rank_zero_warn(f"skipping the checkpoint '{path}', which is damaged: {reason}")
        elif not to_resume or RESUMED in _parts(path):
            return path
    if unusable:
        raise UserError(
            f"--ckpt_path last: all {len(found)} checkpoints in '{found[0].parent}' are damaged"
            f"{' or have only the weights' if to_resume else ''}: start a new run without --ckpt_path, or give "
            "the file of an older run"
        )
    return None


def version(run: Path) -> int:
    """The number of a run's folder: 12 for version_12, -1 for other names."""
    number = run.name.removeprefix("version_")
    return int(number) if number.isdecimal() and number != run.name else -1


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoint folders of all runs under a folder, the newest run's first."""
    runs = [run for run in (root / "lightning_logs").glob("version_*") if version(run) >= 0]
    return [run / "checkpoints" for run in sorted(runs, key=version, reverse=True)]


def folders_of_logger(logger: Any, root: Path) -> list[Path]:
    """The checkpoint folders of the runs of a configured logger, or of none, last written first.

    Whatever the logger, a run's folder is SAVE_DIR/NAME/VERSION, in `trainer.default_root_dir` if it has no `save_dir`.
    """
    if not logger:
        return [root / "checkpoints"]
    first = logger[0] if isinstance(logger, list) else logger  # it decides on the folder
    roots = {root, Path(first.get("init_args", {}).get("save_dir") or root)}
    newest = [found[0] for root in roots for folder in root.glob("*/*/checkpoints") if (found := newest_first(folder))]
    return [path.parent for path in sorted(newest, key=lambda path: path.stat().st_mtime_ns, reverse=True)]
