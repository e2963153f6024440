"""Contents -> SHA-256, in hex: of files, of models, of columns of encoded data sets, of the keys of caches."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dpo_lightning.models.sharding import gathered

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_A_TIME = 10_000


def content_digest(data: "Dataset", names: Sequence[str]) -> str:
    """Of what columns of numbers, or of lists of numbers, hold; read a few thousand rows at a time."""
    digest = hashlib.sha256()
    for table in data.select_columns(list(names)).with_format("arrow").iter(ROWS_AT_A_TIME):
        for name in names:
            values = table[name].combine_chunks()
            if hasattr(values, "value_lengths"):
                digest.update(np.asarray(values.value_lengths()).data)
                values = values.flatten()
            digest.update(np.asarray(values).data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def key_digest(key: Any) -> str:
    """Of plain JSON that tells one cached thing from all others: its name, 32 digits."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def weights_digest(model: nn.Module, leave_out: Callable[[str], bool] = lambda name: False) -> str:
    """Of a model's weights (bytes, shapes and dtypes) as loaded: what tells a run, its caches and its replies apart.

    Generated completions are looked up before any model is loaded, so they go by the stored files instead
    (`data.generated.stored_weights`).

    Every byte is read: 0.8 s per GB on one core. Sharded weights are gathered one by one; to be called on all ranks.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not leave_out(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(gathered(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
