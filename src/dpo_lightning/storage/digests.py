"""SHA-256 digests, in hex, of files, models, columns of data sets, and the keys of caches."""

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
    """The digest of columns of numbers or of lists of numbers."""
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
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def key_digest(key: Any) -> str:
    """The name, 32 digits, of a cached object that is identified by this plain JSON."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def weights_digest(model: nn.Module, leave_out: Callable[[str], bool] = lambda name: False) -> str:
    """The digest of a model's loaded weights (bytes, shapes and dtypes), which identifies a run and its caches.

    Generated completions are looked up before any model is loaded, so they go by the stored files instead
    (`data.generated.stored_weights`).

    Every byte is read: 0.8 s per GB on one core. Sharded weights are gathered one by one: call it on all ranks.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not leave_out(name):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(gathered(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
