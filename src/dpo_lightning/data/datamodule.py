"""PreferenceDataModule: data set names -> loaders of PairBatch. Load, check, encode (cached), split, batch.

Also useful without the rest of the package, to any code that needs tokenized preference pairs.
"""

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pyarrow as pa
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from dpo_lightning.data import pipeline
from dpo_lightning.data.batching import REFERENCE_LOGPS, PairBatch, collate_columns
from dpo_lightning.data.chat import ChatTemplate, template_source, with_template
from dpo_lightning.data.columns import with_column
from dpo_lightning.data.encoding import MAX_LENGTH, SHORTEST, EncodedPair, check_tokenizer, load_tokenizer, pair_length
from dpo_lightning.data.formats import RowOptions, check_templates, no_chat_template
from dpo_lightning.data.generated import RejectedGenerator, generation_from
from dpo_lightning.data.loaders import IndexedRows, make_loader
from dpo_lightning.data.origins import Origin, check_fits, check_ids, cuts, row_numbers
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.data.prompt_format import PromptFormat, trained_prompt_format
from dpo_lightning.data.reading import OnBadRow, RowAccount
from dpo_lightning.data.sources import open_source
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.errors import UserError
from dpo_lightning.parsing import AtLeast1, Range, Seed, check_settings
from dpo_lightning.storage.digests import content_digest
from dpo_lightning.storage.trust import TRUST

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

STORABLE = Range(f"at most {2**31 - 1}", lambda value: value < 2**31)
BatchSize = Annotated[AtLeast1, STORABLE]
SplitSize = Annotated[float, Range("a share below 1 or a number of pairs", lambda size: size >= 0), STORABLE]
LONG_ENOUGH = Range(f"at least {SHORTEST}, for a prompt and a completion", lambda length: length >= SHORTEST)
MOST = max(64, 4 * (os.cpu_count() or 1))
NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}  # pairs, by stage
WORKERS = Range(f"from 0 to {MOST}: each is a process", lambda number: 0 <= number <= MOST)


class PreferenceDataModule(LightningDataModule):
    """Preference pairs for DPO, tokenized, split and batched.

    A data set is a hub id (`owner/name`, `owner/name:split`), a folder written by `save_to_disk`, or a .jsonl, .json,
    .csv or .parquet file. Loaders yield `PairBatch`; the prediction loader yields `PromptBatch`.

    Args:
        tokenizer: name or folder of the tokenizer, or the tokenizer itself. The CLI fills in the model's.
        train_dataset: data set to train on; or several in a list, or with weights (see `dataset_weights`).
        val_dataset: held-out data set for validation; left out, `val_size` of the training data is split off.
        test_dataset: held-out data set for `test`; left out, `test_size` of the training data is split off.
        predict_dataset: prompts to answer with `predict`; left out, those of the test data.
        format: how a row is read, a name in `dpo_lightning.data.formats.FORMATS` or a function of your own
            (`my_module:my_function`); left out, it is recognized from the columns.
        chat_template: Jinja file that renders conversations; left out, the tokenizer's own template.
        on_bad_row: what to do with a row that cannot be trained on: `error`, or `skip` and count it (see `reading`).
        prompt_template: prompt of the format sql_create_context, from {context} and {question}; left out, that of
            `RowOptions`. The CLI fills in the one that the model was trained with, if its folder or checkpoint says so.
        completion_template: completion of that format, from {answer}. It begins with the space that follows the prompt,
            because the two are tokenized separately.
        rejected: for data without rejected completions: `empty` (EOS alone), `shuffled` (another row's chosen) or
            `generated` (a reply of the model, sampled before it is trained).
        generation: for `generated`, the model (the CLI fills in the trained one) and its sampling (see `Generation`).
        val_size: split off for validation if `val_dataset` is left out: a share below 1, or a number of pairs (at most
            a tenth of them).
        test_size: the same for testing.
        max_length: tokens of a prompt and completion together; longer prompts are cut from the left. Left out, 1024 or
            what tokenizer and model allow, if that is less. More than the model has positions is an error.
        batch_size: pairs per batch and device.
        eval_batch_size: the same for validation, testing and prediction; left out, `batch_size`.
        shuffle: a new order every epoch, in batches of similar length.
        num_workers: loader processes; 0 is enough for short rows.
        seed: of splits, shuffled and generated completions, and order.
        trust_remote_code: run a hub tokenizer's own Python code.
        batch_tokens: fill training batches up to so many tokens per device, padding counted, instead of `batch_size`.

    Attributes:
        datasets: the encoded pairs that are set up, by "train", "val", "test" and "predict".
        accounts: what became of the rows of each data set that was read, by name.
        generates: whether generated completions that are not in the cache are made. If not, they are empty, and
            `not_generated` names their data sets.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        train_dataset: str | list[str] | dict[str, float] | None = None,
        val_dataset: str | None = None,
        test_dataset: str | None = None,
        predict_dataset: str | None = None,
        format: str | None = None,
        chat_template: str | None = None,
        on_bad_row: OnBadRow = "error",
        prompt_template: str | None = None,
        completion_template: str = RowOptions().completion_template,
        rejected: Literal["empty", "shuffled", "generated"] = "empty",
        generation: dict[str, Any] | None = None,
        val_size: SplitSize = 0.05,
        test_size: SplitSize = 0.05,
        max_length: Annotated[int, LONG_ENOUGH, STORABLE] | None = None,
        batch_size: BatchSize = 16,
        eval_batch_size: BatchSize | None = None,
        shuffle: bool = True,
        num_workers: Annotated[int, WORKERS] = 0,
        seed: Seed = 42,
        trust_remote_code: bool = False,
        batch_tokens: BatchSize | None = None,
    ) -> None:
        check_settings(PreferenceDataModule.__init__, locals(), "data.")
        super().__init__()
        prompt_template = RowOptions().prompt_template if prompt_template is None else prompt_template
        self.save_hyperparameters(ignore=[] if isinstance(tokenizer, str) else ["tokenizer"])
        if rejected == "generated":
            generation_from(generation, max_length or MAX_LENGTH)  # an early error for wrong settings
        self.row_options = RowOptions(prompt_template, completion_template, lambda: self._chat_template)
        check_templates(self.row_options)
        self._train_weights = dataset_weights(train_dataset)
        self._tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.datasets: dict[str, Dataset] = {}
        self.accounts: dict[str, RowAccount] = {}
        self.generates = True
        self.not_generated: list[str] = []
        self._stages: set[str] = set()  # those that are set up
        self._origins: dict[str, Origin] = {}  # of the pairs of `datasets`
        self._formats: dict[str, tuple[str, bool]] = {}  # of each data set; whether it has conversations
        self._largest_id = -1  # token id

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "PreferenceDataModule":
        """As Lightning's, but settings of the file that run code are not used: pass them yourself.

        `_instantiator` would make LightningCLI's parser create the module, and import any class that a value names.

        Raises:
            UserError: the file's `format` is a function, or its `generation` has `trust_remote_code`.
        """
        data = super().load_from_checkpoint(*args, **{TRUST: False, "_instantiator": None} | kwargs)
        if "format" not in kwargs and ":" in str(data.hparams.format):
            raise UserError(
                f"the checkpoint's data.format is the function {data.hparams.format!r}: pass format yourself"
            )
        if "generation" not in kwargs and (data.hparams.generation or {}).get(TRUST):
            raise UserError(f"the checkpoint's data.generation has {TRUST}: pass generation yourself")
        return data

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when first needed."""
        if self._tokenizer is not None:
            check_tokenizer(self._tokenizer, self._tokenizer.name_or_path)
            return self._tokenizer
        if not (name := self.hparams.get("tokenizer")):
            raise UserError("data.tokenizer is missing: give the name or folder of the model's tokenizer")
        return load_tokenizer(name, self.hparams.trust_remote_code)

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of a prompt and completion together (see `encoding.pair_length`)."""
        model = self.trainer and self.trainer.lightning_module
        positions = getattr(model, "positions", None)
        return pair_length(self.hparams.max_length, positions, lambda: self.tokenizer.model_max_length)

    # ------------------------------------------------------------------ load, split, encode

    def prepare_data(self) -> None:
        """Fills the cache of encoded pairs in one process, so that the other ranks only read it."""
        if self.hparams.rejected != "generated":  # those, all ranks make together
            self.setup(self.trainer.state.fn if self.trainer else "fit")

    def setup(self, stage: str) -> None:
        """Loads what a stage needs into `self.datasets`, once."""
        for name, data in self.datasets.items():
            if REFERENCE_LOGPS in data.column_names:  # of an earlier fit, which may have had another reference
                self.datasets[name] = data.remove_columns(REFERENCE_LOGPS)
        if stage in self._stages:
            return
        self._stages.add(stage)
        known = len(self.accounts)
        if stage in NEEDED:
            self._load_pairs(NEEDED[stage])
        elif "predict" not in self.datasets:
            self._load_prompts()
        for account in list(self.accounts.values())[known:]:
            for line in account.lines():
                rank_zero_warn(line)
        if stage == "fit":
            check_fits(self.datasets["train"], self._origins["train"], self.hparams.batch_tokens)
            for name, data in self.datasets.items():
                if "prompt_cut" in data.column_names and (cut := cuts(data, self._origins[name], self.max_length)):
                    rank_zero_warn(f"{name}: {cut}")
        if stage in NEEDED:
            counts = {name: len(self.datasets[name]) for name in NEEDED[stage] if name in self.datasets}
            rank_zero_info(f"data: {', '.join(f'{n:,} {name} pair' + 's' * (n != 1) for name, n in counts.items())}")

    def _load_pairs(self, needed: Sequence[str]) -> None:
        held_out = {"val": self.hparams.val_dataset, "test": self.hparams.test_dataset}
        for name in needed:
            if held_out.get(name) and name not in self.datasets:
                self._keep(name, self._pairs_of(held_out[name], name))
        if any(name not in self.datasets for name in needed):
            if not self._train_weights:
                raise UserError(f"data.{needed[0]}_dataset is missing: give a file, a folder or a hub id")
            sizes = {name: self.hparams[f"{name}_size"] for name in held_out if not held_out[name]}
            parts = [self._pairs_of(name, "train") for name in self._train_weights]
            for name, pairs in pipeline.split(parts, self._train_weights, sizes, self.hparams.seed).items():
                if name not in self.datasets:
                    self._keep(name, pairs)

    def _load_prompts(self) -> None:
        """Prompts to answer, with the preferred reply if the data have one."""
        if name := self.hparams.predict_dataset:
            rows = self._checked(name, "predict", completions=False)
            self._keep("predict", pipeline.encoded_prompts(rows, self.tokenizer, self.max_length))
        else:
            self.setup("test")
            self.datasets["predict"], self._origins["predict"] = self.datasets["test"], self._origins["test"]

    def _keep(self, name: str, pairs: pipeline.Encoded) -> None:
        self.datasets[name], self._origins[name] = pairs.data, pairs.origin
        self._largest_id = max(self._largest_id, pairs.largest_id)

    def _pairs_of(self, name: str, stage: str) -> pipeline.Encoded:
        rows = self._checked(name, stage)  # this may set the EOS of the tokenizer
        return pipeline.encoded(self._rejected(rows), self.tokenizer, self.max_length)

    def _checked(self, name: str, stage: str, completions: bool = True) -> pipeline.Checked:
        h, source = self.hparams, open_source(name, stage)
        rows = pipeline.checked(
            source, h.format, self.row_options, self._chat_source, self.tokenizer, h.on_bad_row, completions
        )
        self.accounts[source.name], self._formats[source.name] = rows.account, (rows.format, rows.chat)
        if rows.chat:
            self.tokenizer = with_template(self.tokenizer, self._chat_template, self._user_template)
        return rows

    def _rejected(self, rows: pipeline.Checked) -> pipeline.Completions:
        if self.hparams.rejected == "empty":
            return pipeline.own_or_empty(rows)
        if self.hparams.rejected == "shuffled":
            return pipeline.shuffled(rows, self.hparams.seed)
        return pipeline.generated(rows, self._replies)

    def _replies(self, pairs: "Dataset", name: str) -> "Dataset | None":
        """A model's replies, from disk or made now; None if they are not on disk and should not be made."""
        generation = generation_from(self.hparams.generation, self.max_length)
        generator = RejectedGenerator(generation, self.tokenizer, self.max_length, self.hparams.seed)
        if self.generates:
            return generator.make(pairs, name, self.eval_batch_size, self.trainer)
        replies = generator.find(pairs, name)
        if replies is None:
            self.not_generated.append(name)
        return replies

    @functools.cached_property
    def _chat_source(self) -> str | None:
        """The Jinja source of the chat template."""
        return template_source(self.hparams.chat_template, self.tokenizer)

    @property
    def _user_template(self) -> str | None:
        """The same, None if it is the tokenizer's own."""
        return self._chat_source if self.hparams.chat_template else None

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        return no_chat_template() if self._chat_source is None else ChatTemplate(self.tokenizer, self._user_template)

    # ------------------------------------------------------------------ about the data

    def prompt_format(self) -> PromptFormat | None:
        """The prompt format of the training data, None if they are not loaded."""
        if "train" not in self._origins:
            return None
        formats = [self._formats[name] for name, _, _ in self._origins["train"].sources]
        return trained_prompt_format(formats, self.row_options, self.tokenizer.eos_token, self._user_template)

    def check_vocabulary(self, size: int, model: str) -> None:
        """Raises UserError for the first token of the data that is not in a model's embedding of `size` rows."""
        if self._largest_id >= size:
            for name, data in self.datasets.items():
                check_ids(data, self._origins[name], size, model, self.tokenizer)

    def identity(self) -> dict[str, Any]:
        """By name, what determines the training batches: a resumed run must have the same."""
        settings = {f"data.{name}": self.hparams[name] for name in ("batch_size", "batch_tokens", "shuffle", "seed")}
        return settings | {"the digest of the encoded training pairs": self._train_digest}

    @functools.cached_property
    def _train_digest(self) -> str:
        return content_digest(self.datasets["train"], EncodedPair._fields)[:16]

    def batch(self, name: str, positions: Sequence[int]) -> PairBatch:
        """A batch of the pairs at some positions of a data set."""
        return collate_columns(*IndexedRows(self.datasets, name)[list(positions)])

    def add_column(self, name: str, column: str, values: pa.ChunkedArray) -> None:
        """Adds a column, [n], to a data set. Its loaders read it from the next batch on."""
        self.datasets[name] = with_column(self.datasets[name], column, values)

    def pairs(self, name: str, positions: Sequence[int]) -> list[PreferencePair]:
        """The texts of the pairs at some positions of a data set."""
        rows = self.datasets[name][list(positions)]
        return [PreferencePair(*texts) for texts in zip(*(rows[c] for c in PreferencePair._fields), strict=True)]

    def row_numbers(self, name: str, positions: Sequence[int]) -> list[int]:
        """The rows that pairs were read from, counted from 1; in .jsonl and .csv files, the lines."""
        return row_numbers(self.datasets[name], positions)

    def locations(self, name: str, positions: Sequence[int]) -> list[str]:
        """The source and row that pairs were read from, for messages: "rows.jsonl, line 6"."""
        return self._origins[name].locations(self.datasets[name], positions)

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader:
        """PairBatch loader over the training pairs."""
        return self._loader("train", self.hparams.batch_size, shuffle=self.hparams.shuffle)

    def val_dataloader(self) -> DataLoader | list:
        """PairBatch loader over the validation pairs; an empty list if there are none."""
        return self._loader("val", self.eval_batch_size) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """PairBatch loader over the test pairs."""
        return self._loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """PromptBatch loader over the prompts to answer, in order."""
        return self._loader("predict", self.eval_batch_size)

    @property
    def eval_batch_size(self) -> int:
        """Pairs per batch and device in validation, testing and prediction."""
        return self.hparams.eval_batch_size or self.hparams.batch_size

    def _loader(self, name: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        if name not in self.datasets:
            raise UserError(
                f"there are no {name} pairs: give data.{name}_dataset, or a data.{name}_size above 0 to split some off"
            )
        rows = IndexedRows(self.datasets, name, prompts=name == "predict")
        h, tokens = self.hparams, self.hparams.batch_tokens if name == "train" else None
        return make_loader(rows, batch_size, shuffle, h.seed, h.num_workers, self.trainer, self.max_length, tokens)
