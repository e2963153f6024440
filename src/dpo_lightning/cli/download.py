"""Names in a configuration -> folders that the same run can use without a network (configs/local.yaml).

A folder is written beside its place and then renamed. A list of its files goes into it, which tells a later download
that all of it is ours: whatever else stands in the way is the user's and is left alone.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lightning.data.encoding import load_tokenizer
from dpo_lightning.data.sources import load_dataset_named
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import from_hub_or_folder

if TYPE_CHECKING:
    from jsonargparse import Namespace

LISTING = ".dpo-lightning-download.json"  # file of the folder -> [bytes, time of its last change]


def download(model: str, data: "Namespace", output_dir: str) -> Iterator[tuple[str, Path]]:
    """Saves `tokenizer/NAME`, `model/NAME` and `dataset/NAME` under a folder.

    Args:
        model: hub id or folder of the model.
        data: the datamodule's settings: `tokenizer` and the four `*_dataset`.
        output_dir: folder to write into.

    Yields:
        What was written ("tokenizer", "model", "dataset") and where.

    Raises:
        UserError: a name that cannot be loaded, a folder that cannot be written, or one that is there already and was
            not written by an earlier download. All folders are looked at before the first is written.
    """
    from transformers import AutoModelForCausalLM

    datasets = [
        name for stage in ("train", "val", "test", "predict") for name in dataset_weights(data[f"{stage}_dataset"])
    ]
    wanted: list[tuple[str, str, Any]] = [("tokenizer", data.tokenizer, load_tokenizer)]
    wanted += [("dataset", name, load_dataset_named) for name in sorted({n.partition(":")[0] for n in datasets})]
    wanted += [("model", model, lambda name: from_hub_or_folder("model", name, AutoModelForCausalLM.from_pretrained))]
    wanted = [(kind, name, load) for kind, name, load in wanted if not Path(name).is_file()]  # these are here already
    folders = [Path(output_dir) / kind / inside(name) for kind, name, _ in wanted]
    for folder in folders:
        _check_ours(folder)
    for (kind, name, load), folder in zip(wanted, folders, strict=True):
        loaded = load(name)
        _write(kind, folder, loaded.save_to_disk if kind == "dataset" else loaded.save_pretrained)
        yield kind, folder


def _check_ours(folder: Path) -> None:
    """Raises UserError where a folder holds what no download of ours wrote, or wrote otherwise."""
    if not os.path.lexists(folder):
        return
    if foreign := _foreign(folder):
        raise UserError(
            f"'{folder}' is there already, and '{foreign}' in it is not as a download wrote it: move it away, or give "
            "another --output_dir"
        )


def _foreign(folder: Path) -> str | None:
    """The first thing in a folder that is not in its listing; the folder's own name where it is no folder of ours."""
    if folder.is_symlink() or not folder.is_dir():
        return folder.name
    listed = {}
    try:
        if (folder / LISTING).is_file():
            listed = dict(json.loads((folder / LISTING).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return LISTING
    found = _listing(folder)
    return next((name for name, state in found.items() if state != listed.get(name)), None)


def _listing(folder: Path) -> dict[str, list[int]]:
    """Every file under a folder (a link counts as one; an empty folder too) with its size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            continue
        state = path.lstat()
        found[path.relative_to(folder).as_posix()] = [state.st_size, state.st_mtime_ns]
    found.pop(LISTING, None)
    return found


def _write(kind: str, folder: Path, save: Callable[[str], Any]) -> None:
    """Puts what `save` writes at `folder`, wholly or not at all."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name[:40]}-"))
        try:
            save(str(partial / "new"))
            (partial / "new" / LISTING).write_text(json.dumps(_listing(partial / "new")), encoding="utf-8")
            _check_ours(folder)  # again: loading took its time
            if folder.exists():
                os.rename(folder, partial / "old")
            os.rename(partial / "new", folder)
        except BaseException:
            if (partial / "old").exists() and not folder.exists():
                os.rename(partial / "old", folder)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException as error:
        for parent in made:  # innermost first
            try:
                parent.rmdir()
            except OSError:
                break
        if isinstance(error, OSError):
            raise UserError(f"{kind} cannot be written to '{folder}': {error.strerror or error}") from error
        raise


def inside(name: str) -> Path:
    """A name as a path that stays inside the folder it is joined to: a hub id keeps its owner, a path its last part."""
    path = Path(name)
    outside = path.is_absolute() or not path.parts or ".." in path.parts or name.count("/") > 1
    return Path(os.path.basename(os.path.abspath(name)) or "root") if outside else path
