"""Reference log-probs of a data set's pairs: computed once, kept on disk, a column of the data set in every later run.

They are kept among the encoded data sets, in a folder named by the digest of everything they depend on, and computed
by a shared pass (`storage.shared_pass`).
"""

import base64
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.data.batching import REFERENCE_LOGPS
from dpo_lightning.data.columns import id_counts
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.dpo.logps import Scoring
from dpo_lightning.dpo.reference import Reference
from dpo_lightning.models.generate import evaluating
from dpo_lightning.storage.arrow_cache import Columns, dataset_folder
from dpo_lightning.storage.digests import content_digest, key_digest
from dpo_lightning.storage.shared_pass import Result, SharedPass, find_results, run_shared_pass

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

FORMAT = 2  # raise it when what is kept, or what it means, changes
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
SCHEMA = pa.schema([(REFERENCE_LOGPS, pa.list_(pa.float32()))])


def is_cached(choice: str | None, trainer: "Trainer | None") -> bool:
    """Whether a fit's reference log-probs come from a cache: as chosen, or else if pairs are seen more than once."""
    if trainer is None or trainer.state.fn != "fit" or choice == "online":
        return False
    if not isinstance(trainer.datamodule, PreferenceDataModule):  # there is no data set that the log-probs could join
        return False
    if choice == "cached":
        return True
    data, steps = trainer.datamodule, trainer.max_steps
    pairs_per_step = data.hparams.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    one_epoch = trainer.max_epochs in (None, 0, 1) or 0 <= steps * pairs_per_step <= len(data.datasets["train"])
    return not one_epoch


def add_reference_logps(
    trainer: "Trainer",
    model: "PreTrainedModel",
    scoring: Scoring,
    start: dict[str, str],
    make_reference: Callable[[], Reference],
) -> None:
    """Gives the training and validation pairs of a fit their reference log-probs as a column.

    Only where they are not on disk yet is a reference made. To be called on all ranks, with the policy on its device.

    Args:
        model: the policy.
        scoring: how log-probs are computed.
        start: what tells the model that the policy started from, the reference, from all others, by name.
    """
    for name in [name for name in trainer.datamodule.datasets if name in ("train", "val")]:
        key = start | {
            "format": FORMAT,
            "pairs": len(trainer.datamodule.datasets[name]),
            "tokens": content_digest(trainer.datamodule.datasets[name], TOKEN_COLUMNS),
            "layout": "shared" if scoring.shared else "separate",
            "head": "gathered" if scoring.gathered else "full",
            "attention": model.config._attn_implementation,
            "precision": str(trainer.precision),
        }
        column = _logps(trainer, model, name, scoring, key, make_reference)
        trainer.datamodule.add_column(name, REFERENCE_LOGPS, column)


def _logps(
    trainer: "Trainer",
    model: "PreTrainedModel",
    name: str,
    scoring: Scoring,
    key: dict[str, Any],
    make_reference: Callable[[], Reference],
) -> pa.ChunkedArray:
    """Log-probs (float32, nats) of each pair's completion tokens, the chosen's and then the rejected's."""
    data, fingerprint, device = trainer.datamodule, key_digest(key), trainer.strategy.root_device
    sizes = logp_counts(data.datasets[name])
    what = f"reference log-probs of the {len(sizes)} {name} pairs"
    if found := find_results(fingerprint, trainer.strategy):
        rank_zero_info(f"{what}: taken from {dataset_folder(fingerprint)}")
        return found[0].data.column(REFERENCE_LOGPS)

    def compute(batches: Iterator[list[int]]) -> Iterator[list[Result]]:
        rank_zero_info(f"{what}: computed once and kept, because {_why(key)}")
        reference = make_reference()
        with trainer.precision_plugin.forward_context(), evaluating(model):
            for positions in batches:
                logps = reference.logps(data.batch(name, positions).to(device), scoring).token_logps.float().cpu()
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
    results, _ = run_shared_pass(task, data.eval_batch_size, f"Reference, {name}", trainer.strategy)
    return results.data.column(REFERENCE_LOGPS)


def logp_counts(data: "Dataset") -> np.ndarray:
    """How many completion tokens each pair has, int64 [n]."""
    return id_counts(data, "chosen_ids").astype(np.int64) + id_counts(data, "rejected_ids")


def _why(key: dict[str, Any]) -> str:
    """Why log-probs are not on disk, as the end of a sentence."""
    import datasets.config

    before = Path(datasets.config.HF_DATASETS_CACHE) / "reference_logps" / key_digest(key | {"format": 1})
    if before.exists():
        return f"'{before}' is of an earlier version, which kept them in another format"
    return "they were not computed before for these pairs, this model and this precision"


# A pass keeps a pair's log-probs as the bytes of its float32 values, in base64: bitwise, and short.


def _result(position: int, logps: np.ndarray) -> Result:
    return {"pair": int(position), "logps": base64.b64encode(logps.astype("<f4").tobytes()).decode()}


def _columns(results: list[Result]) -> Columns:
    return {REFERENCE_LOGPS: [np.frombuffer(base64.b64decode(result["logps"]), "<f4") for result in results]}
