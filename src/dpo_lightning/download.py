"""Names in a configuration -> folders that the same run can use without a network (configs/local.yaml)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_lightning.encoding import load_tokenizer
from dpo_lightning.errors import UserError
from dpo_lightning.hub import from_hub_or_folder
from dpo_lightning.sources import dataset_weights, load_dataset_named

if TYPE_CHECKING:
    from jsonargparse import Namespace


def download(model: str, data: "Namespace", output_dir: str) -> Iterator[tuple[str, Path]]:
    """Saves `tokenizer/NAME`, `model/NAME` and `dataset/NAME` under a folder.

    Args:
        model: hub id or folder of the model.
        data: the datamodule's settings: `tokenizer` and the four `*_dataset`.
        output_dir: folder to write into.

    Yields:
        What was written ("tokenizer", "model", "dataset") and where.

    Raises:
        UserError: a name that cannot be loaded, or a folder that cannot be written.
    """
    from transformers import AutoModelForCausalLM

    datasets = [
        name for stage in ("train", "val", "test", "predict") for name in dataset_weights(data[f"{stage}_dataset"])
    ]
    wanted: list[tuple[str, str, Any]] = [("tokenizer", data.tokenizer, load_tokenizer)]
    wanted += [("dataset", name, load_dataset_named) for name in sorted({n.partition(":")[0] for n in datasets})]
    wanted += [("model", model, lambda name: from_hub_or_folder("model", name, AutoModelForCausalLM.from_pretrained))]
    for kind, name, load in wanted:
        if Path(name).is_file():
            continue  # already a file of this machine
        folder = Path(output_dir) / kind / inside(name)
        loaded = load(name)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            (loaded.save_to_disk if kind == "dataset" else loaded.save_pretrained)(str(folder))
        except OSError as error:
            raise UserError(f"{kind} cannot be written to '{folder}': {error.strerror or error}") from error
        yield kind, folder


def inside(name: str) -> Path:
    """A name as a path that stays inside the folder it is joined to: a hub id keeps its owner, a path its last part."""
    path = Path(name)
    outside = path.is_absolute() or ".." in path.parts or name.count("/") > 1
    return Path(os.path.basename(os.path.abspath(name))) if outside else path
