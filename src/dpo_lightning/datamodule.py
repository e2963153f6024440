"""PreferenceDataModule: data set names -> loaders of PairBatch. Load, check, split, encode (cached), batch.

Useful without the rest of the package: any pipeline that wants tokenized preference pairs can take its loaders.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from dpo_lightning.batching import LengthGroupedBatchSampler, PairBatch, PromptBatch, collate, collate_prompts
from dpo_lightning.encoding import EncodedPair, encode_batch, encode_prompts, load_tokenizer, tokenizer_fingerprint
from dpo_lightning.errors import UserError
from dpo_lightning.rows import (
    PreferencePair,
    RowOptions,
    check_templates,
    find_format,
    row_to_pair,
    shuffled_partners,
)
from dpo_lightning.sources import Source, open_source

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 1  # raise it when encoding or row reading changes, so that old caches are not used
REJECTED = ("empty", "shuffled")


class PreferenceDataModule(LightningDataModule):
    """Preference pairs for DPO, tokenized, split and batched.

    A data set is a hub id (`owner/name`, `owner/name:split`), a folder written by `save_to_disk`, or a .jsonl, .json,
    .csv or .parquet file. Loaders yield `PairBatch`; the prediction loader yields `PromptBatch`.

    Args:
        tokenizer: name or folder of the tokenizer, or the tokenizer itself. The CLI fills in the model's.
        train_dataset: data set to train on.
        val_dataset: held-out data set for validation; left out, `val_size` of the training data is split off.
        test_dataset: held-out data set for `test`; left out, `test_size` of the training data is split off.
        predict_dataset: prompts to answer with `predict`; left out, the test data are.
        format: how a row is read, a name in `dpo_lightning.rows.FORMATS`; left out, it is found from the columns.
        prompt_template: prompt of the founding format, from {context} and {question}.
        completion_template: completion of the founding format, from {answer}; it begins with the space that parts it
            from the prompt, because the two are tokenized apart.
        rejected: for data without a rejected completion: `empty` (EOS alone) or `shuffled` (another row's chosen).
        val_size: split off for validation where `val_dataset` is left out: a share below 1, or a number of pairs
            (at most a tenth of them).
        test_size: the same for testing.
        max_length: tokens of a prompt and completion together; longer prompts are cut from the left.
        batch_size: pairs per batch (and per device).
        eval_batch_size: the same for validation, testing and prediction; left out, `batch_size`.
        shuffle: new order every epoch, batches grouped by length.
        num_workers: loader processes; 0 is right for small rows.
        seed: of the splits, the shuffled partners and the order.
        trust_remote_code: run a hub tokenizer's own Python code.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        train_dataset: str | None = None,
        val_dataset: str | None = None,
        test_dataset: str | None = None,
        predict_dataset: str | None = None,
        format: str | None = None,
        prompt_template: str = RowOptions().prompt_template,
        completion_template: str = RowOptions().completion_template,
        rejected: str = "empty",
        val_size: float = 0.05,
        test_size: float = 0.05,
        max_length: int = 1024,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 42,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[] if isinstance(tokenizer, str) else ["tokenizer"])
        if rejected not in REJECTED:
            raise UserError(f"data.rejected is '{rejected}': it must be one of {', '.join(REJECTED)}")
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size or batch_size}.items():
            if value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        for name, value in {"val_size": val_size, "test_size": test_size}.items():
            if value < 0:
                raise UserError(f"data.{name} is {value}: it must be a share below 1 or a number of pairs")
        if max_length < 8:
            raise UserError(f"data.max_length is {max_length}: a prompt and a completion need at least 8 tokens")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}: it must be 0 or more")
        self.row_options = RowOptions(prompt_template, completion_template)
        check_templates(self.row_options)
        self._tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.datasets: dict[str, Dataset] = {}
        self._stages: set[str] = set()  # that are set up
        self._split_rows: dict[str, list[int]] = {}  # of splits of the training data: the row of each pair

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when first needed."""
        if self._tokenizer is not None:
            return self._tokenizer
        name = self.hparams.get("tokenizer")
        if not name:
            raise UserError("data.tokenizer is missing: give the name or folder of the model's tokenizer")
        return load_tokenizer(name, self.hparams.trust_remote_code)

    @functools.cached_property
    def max_length(self) -> int:
        """`max_length`, or what the tokenizer says the model can take where that is less."""
        return min(self.hparams.max_length, self.tokenizer.model_max_length)

    # ------------------------------------------------------------------ load, split, encode

    def prepare_data(self) -> None:
        """Fills the cache of encoded pairs in one process, so that several ranks do not all encode."""
        self.setup(self.trainer.state.fn if self.trainer else "fit")

    def setup(self, stage: str) -> None:
        """Loads what a stage needs into `self.datasets` ("train", "val", "test", "predict"), once."""
        if stage in self._stages:
            return
        self._stages.add(stage)
        if stage == "predict":
            if "predict" not in self.datasets:
                self.datasets["predict"] = self._load_prompts()
            return
        needed = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage]
        given = {"val": self.hparams.val_dataset, "test": self.hparams.test_dataset}
        for name in needed:
            if given.get(name) and name not in self.datasets:
                self.datasets[name] = self._encode(self._load_pairs(given[name], name), given[name])
        if any(name not in self.datasets for name in needed):
            if not self.hparams.train_dataset:
                raise UserError(f"data.{needed[0]}_dataset is missing: give a file, a folder or a hub id")
            self.datasets |= {name: data for name, data in self._split().items() if name not in self.datasets}
        if stage == "fit":
            self._say_what_was_cut()

    def _split(self) -> dict[str, "Dataset"]:
        """The training data, minus what is split off where no held-out data set is given."""
        name = self.hparams.train_dataset
        pairs = self._encode(self._load_pairs(name, "train"), name)
        sizes = {
            split: self.hparams[f"{split}_size"] for split in ("val", "test") if not self.hparams[f"{split}_dataset"]
        }
        keys = [context or prompt for context, prompt in zip(pairs["context"], pairs["prompt"], strict=True)]
        self._split_rows = split_by_key(keys, sizes, self.hparams.seed, name)
        return {split: pairs.select(rows) for split, rows in self._split_rows.items()}

    def _load_pairs(self, name: str, stage: str) -> "Dataset":
        """Rows of a data set as PreferencePair columns; read once, then from the cache."""
        source = open_source(name, stage)
        format_name = find_format(source.columns, name, self.hparams.format)
        pairs = self._cached_pairs(source, format_name, completions=True)
        if self.hparams.rejected == "shuffled":
            pairs = self._with_shuffled_rejected(pairs, name)
        return pairs

    def _load_prompts(self) -> "Dataset":
        """Rows to answer: prompts alone, with the wanted reply where the data has it."""
        name = self.hparams.predict_dataset
        if not name:
            self.setup("test")
            return self.datasets["test"]
        source = open_source(name, "predict")
        pairs = self._cached_pairs(
            source, find_format(source.columns, name, self.hparams.format, completions=False), completions=False
        )
        return pairs.map(
            _encode_prompt_batch,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, "max_length": self.max_length},
            new_fingerprint=self._fingerprint(pairs, "prompts"),
            desc=f"Encoding {name}",
        )

    def _cached_pairs(self, source: Source, format_name: str, completions: bool) -> "Dataset":
        from datasets import Dataset
        from datasets.exceptions import DatasetGenerationError

        rows = functools.partial(
            _pair_rows, source=source, format_name=format_name, options=self.row_options, completions=completions
        )
        fingerprint = _digest(source.fingerprint, source.name, format_name, self.row_options, completions)
        try:
            return Dataset.from_generator(rows, fingerprint=fingerprint)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def _with_shuffled_rejected(self, pairs: "Dataset", name: str) -> "Dataset":
        from datasets import concatenate_datasets

        if any(pairs["rejected"]):
            raise UserError(f"{name} has rejected completions of its own: leave data.rejected out")
        partners = shuffled_partners(pairs["chosen"][:], self.hparams.seed, name)
        rejected = pairs.select(partners).select_columns("chosen").rename_column("chosen", "rejected")
        return concatenate_datasets([pairs.remove_columns("rejected"), rejected], axis=1)

    def _encode(self, pairs: "Dataset", name: str) -> "Dataset":
        return pairs.map(
            encode_batch,
            batched=True,
            fn_kwargs={"tokenizer": self.tokenizer, "max_length": self.max_length},
            new_fingerprint=self._fingerprint(pairs, "pairs"),
            desc=f"Encoding {name}",
        )

    def _fingerprint(self, pairs: "Dataset", what: str) -> str:
        return _digest(pairs._fingerprint, what, tokenizer_fingerprint(self.tokenizer), self.max_length)

    def _say_what_was_cut(self) -> None:
        for name, data in self.datasets.items():
            if "prompt_cut" not in data.column_names:
                continue
            prompts, completions = sum(data["prompt_cut"]), sum(data["completion_cut"])
            if prompts or completions:
                rank_zero_warn(
                    f"{name}: of {len(data)} pairs {prompts} had their prompt cut from the left and {completions} a "
                    f"completion cut (its EOS kept) to fit data.max_length = {self.max_length}"
                )
        rank_zero_info("data: " + ", ".join(f"{len(data)} {name} pairs" for name, data in self.datasets.items()))

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader:
        """PairBatch loader over the training pairs."""
        return self._pair_loader("train", self.hparams.batch_size, shuffle=self.hparams.shuffle)

    def val_dataloader(self) -> DataLoader | list:
        """PairBatch loader over the validation pairs; an empty list where there are none."""
        return self._pair_loader("val", self._eval_batch_size) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """PairBatch loader over the test pairs."""
        return self._pair_loader("test", self._eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """PromptBatch loader over the prompts to answer, in their order."""
        return self._loader("predict", ("prompt_ids",), collate_prompt_rows, self._eval_batch_size, shuffle=False)

    @property
    def _eval_batch_size(self) -> int:
        return self.hparams.eval_batch_size or self.hparams.batch_size

    def _pair_loader(self, name: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        return self._loader(name, EncodedPair._fields, collate_pair_rows, batch_size, shuffle)

    def _loader(self, name: str, columns: Sequence[str], collate_fn: Any, batch_size: int, shuffle: bool) -> DataLoader:
        if name not in self.datasets:
            raise UserError(
                f"there are no {name} pairs: give data.{name}_dataset, or a data.{name}_size above 0 to split some off"
            )
        data = self.datasets[name]
        lengths = np.asarray(data["length"]) if "length" in data.column_names else np.zeros(len(data), dtype=np.int64)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = LengthGroupedBatchSampler(lengths, batch_size, shuffle, self.hparams.seed, rank, world)
        return DataLoader(
            IndexedRows(data.select_columns(list(columns))),
            sampler=sampler,
            batch_size=None,
            collate_fn=collate_fn,
            num_workers=self.hparams.num_workers,
            persistent_workers=self.hparams.num_workers > 0,
        )

    def pairs(self, name: str, positions: Sequence[int]) -> list[PreferencePair]:
        """The texts of pairs of a data set ("train", "val", "test", "predict") by their position."""
        rows = self.datasets[name][list(positions)]
        return [PreferencePair(*texts) for texts in zip(*(rows[c] for c in PreferencePair._fields), strict=True)]

    def row_numbers(self, name: str, positions: Sequence[int]) -> list[int]:
        """The rows, counted from 1, of pairs of a data set in the file or hub data set that they were read from."""
        rows = self._split_rows.get(name)
        return [(rows[position] if rows else position) + 1 for position in positions]


class IndexedRows:
    """A map-style data set whose item is a whole batch: a list of positions gives those rows and their positions."""

    def __init__(self, data: "Dataset") -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, positions: list[int]) -> tuple[dict[str, list], list[int]]:
        return self.data[positions], positions


def collate_pair_rows(item: tuple[dict[str, list], list[int]]) -> PairBatch:
    """A batch's encoded columns and their positions -> PairBatch."""
    columns, positions = item
    pairs = zip(*(columns[field] for field in EncodedPair._fields), strict=True)
    return collate([EncodedPair(*ids) for ids in pairs], positions)


def collate_prompt_rows(item: tuple[dict[str, list], list[int]]) -> PromptBatch:
    """A batch's prompt column and its positions -> PromptBatch."""
    columns, positions = item
    return collate_prompts(columns["prompt_ids"], positions)


def split_by_key(keys: Sequence[str], sizes: dict[str, float], seed: int, source: str) -> dict[str, list[int]]:
    """Seeded split of positions in which equal keys (contexts) stay together.

    Args:
        keys: a key per row.
        sizes: name of a held-out split -> share below 1, or number of rows but at most a tenth of them; it gets at
            least that many rows.

    Returns:
        Name -> positions, ascending, for every size above 0 and for "train", the rest.

    Raises:
        UserError: too few different keys to give every split one.
    """
    most = math.ceil(0.1 * len(keys))  # of a number of rows: a small data set is there to be trained on
    wanted = {
        name: min(size, most) if size >= 1 else math.ceil(size * len(keys)) for name, size in sizes.items() if size > 0
    }
    members: dict[str, list[int]] = {}
    for position, key in enumerate(keys):
        members.setdefault(key, []).append(position)
    groups = list(members.values())
    np.random.default_rng(seed).shuffle(groups)
    splits: dict[str, list[int]] = {}
    for name, size in wanted.items():
        splits[name] = []
        while len(splits[name]) < size and groups:
            splits[name] += groups.pop()
    splits["train"] = [position for group in groups for position in group]
    if empty := [name for name, rows in splits.items() if not rows]:
        raise UserError(
            f"{source}: its {len(keys)} rows have only {len(members)} different contexts, too few to keep "
            f"{' and '.join(wanted)} apart from train (nothing is left for {empty[0]}); "
            + ", ".join(f"give data.{name}_dataset or set data.{name}_size to 0" for name in wanted)
        )
    return {name: sorted(rows) for name, rows in splits.items()}


def _pair_rows(source: Source, format_name: str, options: RowOptions, completions: bool) -> Iterator[dict[str, str]]:
    for number, row in enumerate(source.rows):
        yield row_to_pair(row, format_name, options, source.where(number), completions)._asdict()


def _encode_prompt_batch(
    columns: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> dict[str, list]:
    return {"prompt_ids": encode_prompts(tokenizer, columns["prompt"], max_length)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([ENCODING_VERSION, *parts]).encode()).hexdigest()[:32]
