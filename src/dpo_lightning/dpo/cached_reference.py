"""Reference log-probs of a data set's pairs: computed once, kept on disk, a column of the data set in every later run.

They are stored among the encoded data sets, in a folder named by a digest of everything they depend on. A shared pass
(`storage.shared_pass`) computes them.
"""

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.data.batching import REFERENCE_LOGPS
from dpo_lightning.data.columns import id_counts
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.head import plain_head
from dpo_lightning.internals.datasets import cache_folder
from dpo_lightning.models.generate import evaluating
from dpo_lightning.storage.arrow_cache import Columns, dataset_folder
from dpo_lightning.storage.digests import content_digest, key_digest
from dpo_lightning.storage.shared_pass import Result, SharedPass, find_results, run_shared_pass

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer

    from dpo_lightning.dpo.logps import Scoring
    from dpo_lightning.dpo.policy_module import PolicyModule

FORMAT = 2  # raise it when what is kept, or what it means, changes
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema([(REFERENCE_LOGPS, pa.list_(pa.float32()))])


def sees_pairs_again(trainer: "Trainer", data: PreferenceDataModule) -> bool:
    """Whether a fit is longer than one epoch, so that keeping the reference log-probs saves time."""
    one_epoch = 0 <= trainer.max_steps * trainer.accumulate_grad_batches <= len(data.train_dataloader())
    return not one_epoch and trainer.max_epochs not in (None, 0, 1)


def add_reference_logps(module: "PolicyModule") -> None:
    """Gives the training and validation pairs of a fit their reference log-probs as a column.

    A reference is made only if they are not on disk yet. To be called on all ranks, with the policy on its device and
    `scoring` chosen.
    """
    data, scoring = module.data, module.scoring
    assert data is not None and scoring is not None
    for name in [name for name in data.datasets if name in ("train", "val")]:
        key = {
            "model": module.hparams.name_or_path,
            "weights": module.start_digest,
            "format": FORMAT,
            "pairs": len(data.datasets[name]),
            "tokens": content_digest(data.datasets[name], TOKEN_COLUMNS),
            "layout": "shared" if scoring.shared else "separate",
            "head": _head(module, scoring),
            "attention": _attention(module, scoring),
            "precision": str(module.trainer.precision),
        }
        data.add_column(name, REFERENCE_LOGPS, _logps(module, data, name, key))


def _attention(module: "PolicyModule", scoring: "Scoring") -> str | None:
    """The attention of a cache's key.

    In float32, log-probs with and without packing agree to 1e-4 nats per completion. Those cached without it stay
    valid, under the attention that the policy was loaded with. In 16 bits two attentions differ by tenths of a nat,
    which would show as margins before any training.
    """
    return "packed" if scoring.packed and not _in_float32(module) else module.loaded_attention


def _head(module: "PolicyModule", scoring: "Scoring") -> str:
    """The head of a cache's key. In float32 all ways of computing it agree."""
    if not scoring.gathered:
        return "full"
    return "gathered" if _in_float32(module) or plain_head(module.causal_lm) is None else "in parts"


def _in_float32(module: "PolicyModule") -> bool:
    return module.trainer.precision == "32-true" and module.causal_lm.dtype == torch.float32


def _logps(module: "PolicyModule", data: PreferenceDataModule, name: str, key: dict[str, Any]) -> pa.ChunkedArray:
    """Log-probs (float32, nats) of each pair's completion tokens, first the chosen's and then the rejected's."""
    fingerprint, strategy = key_digest(key), module.trainer.strategy
    sizes = logp_counts(data.datasets[name])
    what = f"reference log-probs of the {len(sizes)} {name} pairs"
    if found := find_results(fingerprint, strategy):
        rank_zero_info(f"{what}: taken from {dataset_folder(fingerprint)}")
        return found[0].data.column(REFERENCE_LOGPS)

    def compute(batches: Iterator[list[int]]) -> Iterator[list[Result]]:
        rank_zero_info(f"{what}: computed once and kept, because {_why_missing(key)}")
        reference = module.reference or module.make_reference()
        with module.trainer.precision_plugin.forward_context(), evaluating(module.causal_lm):
            for positions in batches:
                batch = data.batch(name, positions).to(strategy.root_device)
                logps = reference.logps(batch, module.ensure_scoring(batch)).token_logps.float().cpu()
                parts = zip(positions, logps.split(sizes[positions].tolist()), strict=True)
                yield [_result(position, part.numpy()) for position, part in parts if not part.isnan().any()]

    task = SharedPass(
        fingerprint=fingerprint,
        sizes=sizes,
        schema=SCHEMA,
        compute=compute,
        columns=_columns,
        note=lambda results: {"key": key, "torch": torch.__version__},
        what=what,
        unknown="the reference's log-prob of pair {row} is not a number: look at that row",
        setting="model.reference is cached",
        remedy=", or set model.reference: online",
    )
    results, _ = run_shared_pass(task, data.eval_batch_size, f"Reference, {name}", strategy)
    return results.data.column(REFERENCE_LOGPS)


def logp_counts(data: "Dataset") -> np.ndarray:
    """The number of completion tokens of each pair, int64 [n]."""
    return id_counts(data, "chosen_ids").astype(np.int64) + id_counts(data, "rejected_ids")


def _why_missing(key: dict[str, Any]) -> str:
    """Why log-probs are not on disk, as the end of a sentence."""
    before = cache_folder() / "reference_logps" / key_digest(key | {"format": 1})
    if before.exists():
        return f"'{before}' was written by an earlier version, in another format"
    return "they have not been computed for these pairs, with this model, precision and attention yet"


# A pass writes a pair's log-probs as the bytes of their float32 values in base64, which is exact and short.


def _result(position: int, logps: np.ndarray) -> Result:
    return {"pair": int(position), "logps": base64.b64encode(logps.astype("<f4").tobytes()).decode()}


def _columns(results: list[Result]) -> Columns:
    return {REFERENCE_LOGPS: [np.frombuffer(base64.b64decode(result["logps"]), "<f4") for result in results]}
