"""Encoded pairs -> the order of their batches, and loaders that a resumed run can start in mid-epoch."""

import functools
import math
import signal
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler
from torch.utils.data import Dataset as MapDataset

from dpo_lightning.data.batching import REFERENCE_LOGPS, PairBatch, PromptBatch, collate_columns, collate_prompts
from dpo_lightning.data.columns import numeric_column
from dpo_lightning.data.encoding import EncodedPair
from dpo_lightning.errors import UserError
from dpo_lightning.internals.lightning import batch_index

if TYPE_CHECKING:
    from datasets import Dataset


class LengthGroupedBatchSampler(DistributedSampler):
    """Batches of pair positions: a pure function of (lengths, seed, epoch), sharded by rank.

    To shuffle, the pairs are cut into windows of `window` global batches, each window is sorted by length so that the
    rows of a batch need little padding, and the batches are put in random order. Every pair comes exactly once an
    epoch: if the last global batch would leave a rank without pairs, its pairs join the batch before it.

    With `batch_tokens` all pairs are sorted and cut by `token_batches`: every epoch has batches of the same sizes, and
    pairs of equal length change places.

    It is a DataLoader's `sampler` with `batch_size=None` (an item is a batch), and a DistributedSampler so that
    Lightning does not wrap it.

    Args:
        lengths: tokens of each pair's row, [n].
        batch_size: pairs per batch and rank.
        shuffle: otherwise the data keep their order.
        batch_tokens: tokens per batch and rank, instead of `batch_size`.

    Raises:
        UserError: fewer pairs than ranks; or see `token_batches`.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        window: int = 50,
        batch_tokens: int | None = None,
    ) -> None:
        if len(lengths) < num_replicas:
            raise UserError(f"{len(lengths)} pairs cannot be split among {num_replicas} processes")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.shuffle, self.seed, self.window = batch_size, shuffle, seed, window
        self.rank, self.num_replicas, self.epoch = rank, num_replicas, 0
        self.start = 0  # batches at the start of the epoch that a resumed run has already trained on
        self.sizes: list[int] = []  # pairs of each batch of the epoch, over all ranks
        self._ends: list[int] | None = None  # of the batches among the pairs in order of length
        if batch_tokens is not None:
            in_order = np.sort(self.lengths) if shuffle else self.lengths
            self._ends = np.cumsum(token_batches(in_order, batch_tokens, num_replicas)).tolist()

    def __len__(self) -> int:
        if self._ends is not None:
            return len(self._ends)
        full, rest = divmod(len(self.lengths), self.batch_size * self.num_replicas)
        return full + (rest > 0 if full == 0 else rest >= self.num_replicas)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()
        self.sizes = [len(batch) for batch in batches]
        for batch in batches[self.start :]:
            yield batch[self.rank :: self.num_replicas].tolist()

    def global_batches(self) -> list[np.ndarray]:
        """This epoch's batches over all ranks, in order: int64 pair positions."""
        size = self.batch_size * self.num_replicas
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths)) if self.shuffle else np.arange(len(self.lengths))
        batches = []
        step = size * self.window if self._ends is None else len(order)
        for start in range(0, len(order), step):
            part = order[start : start + step]
            if self.shuffle:
                part = part[np.argsort(self.lengths[part], kind="stable")]
            ends = self._ends or range(size, len(part) + size, size)
            batches += np.split(part, ends[:-1])
        if len(batches) > 1 and len(batches[-1]) < self.num_replicas:
            short = batches.pop()
            batches[-1] = np.concatenate([batches[-1], short])
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches


def token_batches(lengths: np.ndarray, most: int, ranks: int) -> list[int]:
    """The number of pairs of each global batch, for pairs that keep their order and are dealt to the ranks in turn.

    On each rank a batch has at most `most` tokens if each of its pairs is padded to the longest of the global batch, so
    the limit holds with padding and without, and the batches do not depend on what the model can take.

    Args:
        lengths: tokens of each pair's row, [n], none above `most`.

    Raises:
        UserError: pairs are left over that are fewer than the ranks, and no batch can do without one of its pairs.
    """
    sizes, count, longest = [], 0, 0
    for length in lengths.tolist():
        longest = max(longest, length)
        if math.ceil((count + 1) / ranks) * longest > most:
            sizes.append(count)
            count, longest = 0, length
        count += 1
    sizes.append(count)
    missing = max(0, ranks - count)
    # Pairs move back from one batch to the next. Those in between have one pair per rank, which always fits.
    for i in reversed(range(len(sizes) - 1)):
        moved = min(missing, sizes[i] - ranks)
        sizes[i], sizes[-1], missing = sizes[i] - moved, sizes[-1] + moved, missing - moved
    if missing:
        raise UserError(
            f"data.batch_tokens is {most}, which leaves only {ranks - missing} of {len(lengths)} pairs for the last "
            f"batch of {ranks} processes: raise it"
        )
    return sizes


class FixedBatchSampler(LengthGroupedBatchSampler, SequentialSampler):  # type: ignore[misc]
    """The same batches in the same order every epoch, for `trainer.overfit_batches`.

    There Lightning replaces all but SequentialSamplers by one, which knows nothing of batches and ranks.
    """


class ResumableLoader(DataLoader):
    """A DataLoader that starts where its trainer is in the epoch, without reading the batches before.

    Outside of training it gives all batches. The position is looked up with the first batch, since Lightning makes the
    iterator before epoch and position are known.
    """

    sampler: LengthGroupedBatchSampler
    trainer: Trainer | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        trainer = self.trainer
        training = trainer is not None and trainer.training and trainer.train_dataloader is self
        self.sampler.start = batch_index(trainer) + 1 if training else 0
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the trainer has the position. Lightning resumes only loaders that have this method."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


class IndexedRows(MapDataset):
    """A map-style data set whose item is a batch: a list of positions gives the rows there, and the positions.

    The data set is looked up at each batch: Lightning makes the training loader, to count the steps of a run, before
    the data set has all of its columns.

    Args:
        datasets: by name, as a datamodule has them.
        prompts: whether only prompts are read, to be answered.
    """

    def __init__(self, datasets: "dict[str, Dataset]", name: str, prompts: bool = False) -> None:
        self.datasets, self.name = datasets, name
        self.columns = ("prompt_ids",) if prompts else (*EncodedPair._fields, REFERENCE_LOGPS)
        self._data: Dataset | None = None
        self._rows: Any = None  # its columns that are read

    def __len__(self) -> int:
        return len(self.datasets[self.name])

    def __getitem__(self, positions: list[int]) -> tuple[dict[str, list], list[int]]:
        data = self.datasets[self.name]
        if data is not self._data:
            self._data = data
            self._rows = data.select_columns([column for column in self.columns if column in data.column_names])
        return self._rows[positions], positions


def collate_rows(
    item: tuple[dict[str, list], list[int]], mismatch_length: int | None = None
) -> PairBatch | PromptBatch:
    """An item of IndexedRows as a batch."""
    columns, positions = item
    if "chosen_ids" in columns:
        return collate_columns(columns, positions, mismatch_length)
    return collate_prompts(columns["prompt_ids"], positions)


def leave_signals_to_the_run(worker: int) -> None:
    """Makes a loader process ignore Ctrl-C and SIGTERM: the run handles both and ends its loaders."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def make_loader(
    rows: IndexedRows,
    batch_size: int,
    shuffle: bool,
    seed: int,
    num_workers: int,
    trainer: Trainer | None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
) -> ResumableLoader:
    """A loader of one rank's share of the batches (see `LengthGroupedBatchSampler`).

    Args:
        trainer: knows the rank and the device, and whether the model's loss needs `mismatched` pairs; without one, all
            batches.
        max_length: tokens of a `mismatched` prompt and completion together.
    """
    needs_kl = getattr(getattr(getattr(trainer, "lightning_module", None), "loss", None), "needs_kl", False)
    data = rows.datasets[rows.name]
    lengths = numeric_column(data, "length") if "length" in data.column_names else np.zeros(len(data), dtype=np.int64)
    rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    fixed = trainer is not None and trainer.overfit_batches > 0
    sampler_class = FixedBatchSampler if fixed else LengthGroupedBatchSampler
    loader = ResumableLoader(
        rows,
        sampler=sampler_class(lengths, batch_size, shuffle and not fixed, seed, rank, world, batch_tokens=batch_tokens),
        batch_size=None,
        # Without a batch_size it gets one item.
        collate_fn=functools.partial(collate_rows, mismatch_length=max_length if needs_kl else None),
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_run,
        persistent_workers=num_workers > 0,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
    )
    loader.trainer = trainer
    return loader
