"""The command `download`: saves what a configuration names to folders, to run without a network (configs/local.yaml).

A download replaces an existing folder only if an earlier one wrote all its content (`atomic_folder`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import SafetensorError

from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.encoding import load_tokenizer
from dpo_lightning.data.sources import load_dataset_named
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import from_hub_or_folder, reason_of
from dpo_lightning.storage.atomic import atomic_folder, foreign
from dpo_lightning.visible import one_line

MANIFEST = ".dpo-lightning-download.json"


def download(model: str, data: Namespace, output_dir: str) -> Iterator[tuple[str, Path]]:
    """Saves `tokenizer/NAME`, `model/NAME` and `dataset/NAME` under a folder.

    Args:
        model: hub id or folder of the model.
        data: the datamodule's settings: `tokenizer` and the four `*_dataset`.
        output_dir: folder to write into.

    Yields:
        The kind ("tokenizer", "model", "dataset") and the folder of each.

    Raises:
        UserError: a name cannot be loaded, a folder cannot be written, or exists and was not written by an earlier
            download. All folders are checked before the first is written.
    """
    from transformers import AutoModelForCausalLM

    datasets = [
        name for stage in ("train", "val", "test", "predict") for name in dataset_weights(data[f"{stage}_dataset"])
    ]
    wanted: list[tuple[str, str, Any]] = [("tokenizer", data.tokenizer, load_tokenizer)]
    wanted += [("dataset", name, load_dataset_named) for name in sorted({n.partition(":")[0] for n in datasets})]
    wanted += [("model", model, lambda name: from_hub_or_folder("model", name, AutoModelForCausalLM.from_pretrained))]
    wanted = [(kind, name, load) for kind, name, load in wanted if not Path(name).is_file()]  # not files
    folders = [Path(output_dir) / kind / path_below(name) for kind, name, _ in wanted]
    for folder in folders:
        _check_ours(folder)
    for (kind, name, load), folder in zip(wanted, folders, strict=True):
        loaded = load(name)
        _write(kind, folder, loaded.save_to_disk if kind == "dataset" else loaded.save_pretrained)
        yield kind, folder


def _check_ours(folder: Path) -> None:
    """Raises UserError if a folder has content that no download wrote, or that was changed since."""
    if os.path.lexists(folder) and (found := foreign(folder, MANIFEST)):
        wrong = "is not a folder" if found == "." else f"'{found}' in it is not as a download wrote it"
        raise UserError(f"'{folder}' already exists, and {wrong}: move it away, or give another --output_dir")


def _write(kind: str, folder: Path, save: Callable[[str], Any]) -> None:
    try:
        with atomic_folder(folder, MANIFEST) as partial:
            save(str(partial))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{kind} cannot be written to '{folder}': {reason_of(error)}") from error


def path_below(name: str) -> Path:
    """A name as a relative path without `..`: a hub id keeps its owner, a path only its last part."""
    path = Path(name)
    outside = path.is_absolute() or not path.parts or ".." in path.parts or name.count("/") > 1
    return Path(os.path.basename(os.path.abspath(name)) or "root") if outside else path


class DownloadCLI(DPOCLI):
    """The configuration of a run, with the option of `download`."""

    command = "download"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `output_dir`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output_dir", type=str, default=".", help="folder to write into")


def run_download(args: Sequence[str]) -> None:
    """Runs `download`: saves the tokenizer, model and data sets that a configuration names."""
    config = configured(DownloadCLI, args[1:], run=False).config
    for kind, name in download(config.model.name_or_path, config.data, config.output_dir):
        print(one_line(f"{kind} written to {name}"))
