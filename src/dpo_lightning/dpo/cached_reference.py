"""Reference log-probs of a data set's pairs on disk: computed once, looked up in every epoch and every later run.

A cache is a folder named by the digest of its key, which is everything the numbers depend on. It holds the log-probs
of all completion tokens, pair after pair, and a manifest that says what they are. While it is being computed it is
called `.partial` and holds NaN where nothing is known yet, so an interrupted pass goes on where it stopped.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from dpo_lightning.data.batching import PairBatch, collate_columns
from dpo_lightning.data.columns import id_counts
from dpo_lightning.data.encoding import EncodedPair
from dpo_lightning.errors import UserError
from dpo_lightning.models.generate import evaluating
from dpo_lightning.storage.arrow_cache import lock_file
from dpo_lightning.storage.digests import content_digest, file_digest, key_digest
from dpo_lightning.storage.locks import alone
from dpo_lightning.storage.progress import with_progress

if TYPE_CHECKING:
    from datasets import Dataset
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from dpo_lightning.dpo.module import DPOModule

MANIFEST, LOGPS = "manifest.json", "logps.float32"
FORMAT = 1  # raise it when the files or what they mean change
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def is_cached(choice: str | None, trainer: "Trainer | None") -> bool:
    """Whether a fit's reference log-probs come from a cache: as chosen, or else if pairs are seen more than once."""
    if trainer is None or trainer.state.fn != "fit" or trainer.datamodule is None or choice == "online":
        return False
    if choice == "cached":
        return True
    data, steps = trainer.datamodule, trainer.max_steps
    pairs_per_step = data.hparams.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    one_epoch = trainer.max_epochs in (None, 0, 1) or 0 <= steps * pairs_per_step <= len(data.datasets["train"])
    return not one_epoch


def open_caches(module: "DPOModule") -> dict[str, "ReferenceCache"]:
    """Reference log-probs of the training and validation pairs of a fit, computed where they are not on disk yet.

    Where they are, the reference's weights are not needed. To be called on all ranks, with the policy on its device.
    """
    datasets = {name: data for name, data in module.trainer.datamodule.datasets.items() if name in ("train", "val")}
    first = range(min(len(datasets["train"]), module.trainer.datamodule.hparams.batch_size))
    module.settle_scoring(batch_of(datasets["train"], first).to(module.device))
    return {name: _open_cache(module, name, data) for name, data in datasets.items()}


def _open_cache(module: "DPOModule", name: str, data: "Dataset") -> "ReferenceCache":
    trainer, root = module.trainer, cache_root()
    digest, offsets = tokenized_pairs(data)
    key = {
        "format": FORMAT,
        "model": module.hparams.name_or_path,
        "weights": module.start_digest,
        "pairs": len(data),
        "tokens": digest,
        "layout": "shared" if module.scoring.shared else "separate",
        "head": "gathered" if module.scoring.gathered else "full",
        "attention": module.causal_lm.config._attn_implementation,
        "precision": str(trainer.precision),
    }
    what = f"reference log-probs of the {len(data)} {name} pairs"

    def find() -> tuple[ReferenceCache | None, str]:
        cache, why = find_cache(root, key, offsets)
        # Every rank must take the same way, or one would wait for the others for ever.
        if not trainer.strategy.reduce_boolean_decision(cache is not None, all=True):
            return None, why
        rank_zero_info(f"{what}: taken from {root / key_digest(key)}")
        return cache, ""

    def score(positions: Sequence[int]) -> Tensor:
        return reference.logps(batch_of(data, positions).to(module.device), module.scoring).token_logps

    cache, _ = find()
    if cache is not None:
        return cache
    with alone(lock_file(root / key_digest(key)), what, trainer.strategy):
        cache, why = find()  # another run may have made it meanwhile
        if cache is not None:
            return cache
        rank_zero_info(f"{what}: computed once and kept, because {why}")
        reference = module.reference or module.make_reference()
        with trainer.precision_plugin.forward_context(), evaluating(module.causal_lm):
            return build_cache(
                root, key, offsets, score, trainer.datamodule.eval_batch_size, trainer.strategy, f"Reference, {name}"
            )


def cache_root() -> Path:
    """Where caches are kept: among the encoded data sets."""
    import datasets.config

    return Path(datasets.config.HF_DATASETS_CACHE) / "reference_logps"


class TokenizedPairs(NamedTuple):
    """What a cache needs to know of the pairs that it is for."""

    digest: str  # of all token ids, in order
    offsets: np.ndarray  # [pairs + 1] int64: where a pair's log-probs begin among those of all pairs


def tokenized_pairs(data: "Dataset") -> TokenizedPairs:
    """What the token columns hold."""
    counts = id_counts(data, "chosen_ids").astype(np.int64) + id_counts(data, "rejected_ids")
    return TokenizedPairs(content_digest(data, TOKEN_COLUMNS), np.concatenate([[0], np.cumsum(counts)]))


class ReferenceCache:
    """Log-probs of every completion token of every pair of a data set.

    Args:
        folder: of a complete cache, or of one that is being computed.
        offsets: see `TokenizedPairs`.
        mode: "r" to look up, "r+" to compute.
    """

    def __init__(self, folder: Path, offsets: np.ndarray, mode: str = "r") -> None:
        self.offsets = offsets
        self.values = np.memmap(folder / LOGPS, dtype=np.float32, mode=mode, shape=(int(offsets[-1]),))

    def look_up(self, pair_ids: Sequence[int]) -> Tensor:
        """Log-probs [N] float32, nats, of the pairs' completion tokens, in the order of a batch's targets."""
        parts = [self.values[self.offsets[i] : self.offsets[i + 1]] for i in pair_ids]
        return torch.from_numpy(np.concatenate(parts))

    def write(self, pair_ids: Sequence[int], token_logps: Tensor) -> None:
        """The opposite of `look_up`."""
        values = token_logps.float().cpu().numpy()
        sizes = [int(self.offsets[i + 1] - self.offsets[i]) for i in pair_ids]
        for i, part in zip(pair_ids, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
            self.values[self.offsets[i] : self.offsets[i + 1]] = part

    def missing(self) -> np.ndarray:
        """Positions of the pairs of which a log-prob is not known, ascending, int64."""
        unknown = np.isnan(self.values).astype(np.int64)
        return np.flatnonzero(np.add.reduceat(unknown, self.offsets[:-1]))


def find_cache(root: Path, key: dict[str, Any], offsets: np.ndarray) -> tuple[ReferenceCache | None, str]:
    """The complete cache of a key and "", or None and why there is none that can be used."""
    folder = root / key_digest(key)
    if not folder.exists():
        return None, "they were not computed before for these pairs, this model and this precision"
    if problem := _problem(folder, key):
        return None, f"the cache {folder} cannot be used: {problem}"
    return ReferenceCache(folder, offsets), ""


def _problem(folder: Path, key: dict[str, Any]) -> str:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if differing := [name for name in key if manifest["key"].get(name) != key[name]]:
            return f"its {differing[0]} is {manifest['key'].get(differing[0])}, not {key[differing[0]]}"
        if file_digest(folder / LOGPS) != manifest["sha256"]:
            return "its log-probs are not those that were written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it is damaged ({type(error).__name__}: {error})"
    return ""


def build_cache(
    root: Path,
    key: dict[str, Any],
    offsets: np.ndarray,
    score: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    strategy: "Strategy",
    description: str,
) -> ReferenceCache:
    """Computes what is not known yet, each rank its share, and gives the complete cache.

    To be called on all ranks, and by one run at a time.

    Args:
        score: positions of pairs -> their log-probs as `ReferenceCache.look_up` gives them.
        batch_size: pairs that are scored at a time.
        description: of the progress bar.

    Raises:
        UserError: a log-prob is NaN, the folder cannot be written, or the ranks do not share it.
    """
    folder = root / key_digest(key)
    partial = folder.with_name(folder.name + ".partial")
    if strategy.is_global_zero:
        _prepare(partial, key, int(offsets[-1]))
    strategy.barrier("reference cache prepared")
    if not strategy.reduce_boolean_decision((partial / LOGPS).exists(), all=True):
        raise UserError(
            f"model.reference is cached, but not all processes see the folder {root}: share the folder that "
            "HF_DATASETS_CACHE names between the machines, or set model.reference: online"
        )
    cache = ReferenceCache(partial, offsets, "r+")
    missing = cache.missing()  # on every rank before any of them writes: they must share out the same pairs
    strategy.barrier("reference cache read")
    longest_first = missing[np.argsort(offsets[missing] - offsets[missing + 1], kind="stable")]
    share = longest_first[strategy.global_rank :: strategy.world_size]
    for positions in with_progress(share, batch_size, description, strategy.is_global_zero):
        cache.write(positions, score(positions))
    cache.values.flush()
    strategy.barrier("reference cache computed")
    if len(unknown := cache.missing()):
        raise UserError(f"the reference's log-prob of pair {unknown[0] + 1} is not a number: look at that row")
    del cache  # and with it the mapped file: Windows renames no folder with an open one
    strategy.barrier("reference cache closed")
    if strategy.is_global_zero:
        _complete(partial, folder, key)
    strategy.barrier("reference cache complete")
    return ReferenceCache(folder, offsets)


def _prepare(partial: Path, key: dict[str, Any], tokens: int) -> None:
    """A partial cache of this key: the one that an interrupted pass left, or a new one without any log-prob."""
    try:
        if json.loads((partial / MANIFEST).read_text(encoding="utf-8"))["key"] == key and (
            (partial / LOGPS).stat().st_size == 4 * tokens
        ):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or cut off: made anew
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        np.full(tokens, np.nan, dtype=np.float32).tofile(partial / LOGPS)
        (partial / MANIFEST).write_text(json.dumps({"key": key}, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"reference log-probs cannot be kept in {partial}: {error.strerror or error}") from error


def _complete(partial: Path, folder: Path, key: dict[str, Any]) -> None:
    manifest = {
        "what": "log-probabilities (nats, float32) of all completion tokens under the reference model, pair after pair",
        "key": key,
        "sha256": file_digest(partial / LOGPS),
        "torch": torch.__version__,
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # one that could not be used
    partial.rename(folder)


def batch_of(data: "Dataset", positions: Sequence[int]) -> PairBatch:
    """Pairs of an encoded data set as a batch."""
    return collate_columns(data.select_columns(list(EncodedPair._fields))[list(positions)], positions)
