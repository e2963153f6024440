"""PreferenceDataModule: data set names -> loaders of PairBatch. Load, check, split, encode (cached), batch.

Useful without the rest of the package: any pipeline that wants tokenized preference pairs can take its loaders.
"""

import copy
import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from dpo_lightning.data.asking import Asking, trained_asking
from dpo_lightning.data.batching import PairBatch, PromptBatch
from dpo_lightning.data.columns import batches_of, context_keys, numbers, text_keys
from dpo_lightning.data.encoding import (
    EncodedPair,
    check_tokenizer,
    encode_batch,
    encode_prompts,
    load_tokenizer,
    tokenizer_fingerprint,
)
from dpo_lightning.data.formats import RowOptions, check_templates, find_format, get_format, no_chat_template
from dpo_lightning.data.generated import RejectedGenerator, generation_from, said
from dpo_lightning.data.loaders import (
    FixedBatchSampler,
    IndexedRows,
    LengthGroupedBatchSampler,
    ResumableLoader,
    _leave_signals_to_the_run,
    collate_pair_rows,
    collate_prompt_rows,
)
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.data.reading import PAIR_COLUMNS, OnBadRow, PairReader, RowAccount
from dpo_lightning.data.rejected import shuffled_partners
from dpo_lightning.data.sources import Source, dataset_weights, open_source
from dpo_lightning.data.splits import mixed, split_by_key
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import local_path
from dpo_lightning.parsing import Range, Seed, check_settings
from dpo_lightning.storage.arrow_cache import Columns, cached_dataset
from dpo_lightning.storage.digests import content_digest, key_digest
from dpo_lightning.storage.progress import progress
from dpo_lightning.storage.trust import TRUST
from dpo_lightning.visible import one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dpo_lightning.data.chat import ChatTemplate
    from dpo_lightning.dpo.cached_reference import ReferenceCache

MAX_LENGTH, SHORTEST = 1024, 8  # tokens of a pair: where none are given, and the fewest
HELD = Range(f"at most {2**31 - 1}", lambda value: value < 2**31)
BatchSize = Annotated[int, Range("at least 1", lambda size: size >= 1), HELD]
SplitSize = Annotated[float, Range("a share below 1 or a number of pairs", lambda size: size >= 0), HELD]
LARGEST_TEMPLATE = 1_000_000  # bytes
LONG_ENOUGH = Range(f"at least {SHORTEST}, for a prompt and a completion", lambda length: length >= SHORTEST)
MOST_WORKERS = max(64, 4 * (os.cpu_count() or 1))
WORKERS = Range(f"from 0 to {MOST_WORKERS}: each is a process", lambda number: 0 <= number <= MOST_WORKERS)
ENCODING_VERSION = 2  # raise it when encoding or row reading changes, so that old caches are not used
IDS = pa.list_(pa.int32())
PROMPT_COLUMNS = pa.schema([*PAIR_COLUMNS, pa.field("prompt_ids", IDS)])
ENCODED_COLUMNS = pa.schema(
    [*PAIR_COLUMNS, *(pa.field(name, IDS) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))]
    + [pa.field("length", pa.int32()), pa.field("prompt_cut", pa.bool_()), pa.field("completion_cut", pa.bool_())]
)


class PreferenceDataModule(LightningDataModule):
    """Preference pairs for DPO, tokenized, split and batched.

    A data set is a hub id (`owner/name`, `owner/name:split`), a folder written by `save_to_disk`, or a .jsonl, .json,
    .csv or .parquet file. Loaders yield `PairBatch`; the prediction loader yields `PromptBatch`.

    Args:
        tokenizer: name or folder of the tokenizer, or the tokenizer itself. The CLI fills in the model's.
        train_dataset: data set to train on; or several in a list, or with weights (see `dataset_weights`).
        val_dataset: held-out data set for validation; left out, `val_size` of the training data is split off.
        test_dataset: held-out data set for `test`; left out, `test_size` of the training data is split off.
        predict_dataset: prompts to answer with `predict`; left out, the test data are.
        format: how a row is read, a name in `dpo_lightning.data.formats.FORMATS` or a function of the user's
            (`my_module:my_function`); left out, it is found from the columns.
        chat_template: Jinja file that renders conversations; left out, the tokenizer's own template does.
        on_bad_row: what to do with a row that cannot be trained on: `error`, or `skip`, counted (see `reading`).
        prompt_template: prompt of the founding format, from {context} and {question}; left out, that of `RowOptions`.
            The CLI fills in the one that the model was trained with, where its folder or checkpoint says so.
        completion_template: completion of the founding format, from {answer}; it begins with the space that parts it
            from the prompt, because the two are tokenized apart.
        rejected: for data without a rejected completion: `empty` (EOS alone), `shuffled` (another row's chosen) or
            `generated` (a reply of the model, sampled before it is trained).
        generation: for `generated`, the model and its sampling, see `dpo_lightning.data.generated.Generation`; the CLI
            fills in the model that is trained.
        val_size: split off for validation where `val_dataset` is left out: a share below 1, or a number of pairs
            (at most a tenth of them).
        test_size: the same for testing.
        max_length: tokens of a prompt and completion together; longer prompts are cut from the left. Left out,
            `MAX_LENGTH`, or what the tokenizer and the model can take where that is less; more than the model has
            positions is refused.
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
        max_length: Annotated[int, LONG_ENOUGH, HELD] | None = None,
        batch_size: BatchSize = 16,
        eval_batch_size: BatchSize | None = None,
        shuffle: bool = True,
        num_workers: Annotated[int, WORKERS] = 0,
        seed: Seed = 42,
        trust_remote_code: bool = False,
    ) -> None:
        check_settings(PreferenceDataModule.__init__, locals(), "data.")
        super().__init__()
        prompt_template = RowOptions().prompt_template if prompt_template is None else prompt_template
        self.save_hyperparameters(ignore=[] if isinstance(tokenizer, str) else ["tokenizer"])
        if rejected == "generated":
            generation_from(generation, max_length or MAX_LENGTH)  # wrong settings are said before anything is read
        self.row_options = RowOptions(prompt_template, completion_template, self._chat_template)
        check_templates(self.row_options)
        self._train_weights = dataset_weights(train_dataset)
        self._tokenizer = None if isinstance(tokenizer, str) else tokenizer
        self.datasets: dict[str, Dataset] = {}
        self.reference_caches: dict[str, ReferenceCache] = {}  # by data set, where a fit has opened them
        self._stages: set[str] = set()  # that are set up
        self.accounts: dict[str, RowAccount] = {}  # by data set: what became of its rows
        self._origins: dict[str, Origin] = {}  # of the pairs of each of `datasets`
        self._formats: dict[str, tuple[str, bool]] = {}  # by data set: its format, and whether it holds conversations
        self._largest_id = -1
        self.generates = True  # else data sets without generated completions on disk get empty ones
        self.not_generated: list[str] = []  # those data sets

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> "PreferenceDataModule":
        """As Lightning's, but what runs code is never taken from the file: give it here.

        Raises:
            UserError: the file's `format` is a function, or its generating model wants its own code to be run.
        """
        data = super().load_from_checkpoint(*args, **{TRUST: False} | kwargs)
        if "format" not in kwargs and ":" in str(data.hparams.format):
            raise UserError(
                f"the checkpoint's data.format is the function {data.hparams.format!r}: give format yourself"
            )
        if "generation" not in kwargs and (data.hparams.generation or {}).get(TRUST):
            raise UserError(f"the checkpoint's data.generation has {TRUST}: give generation yourself")
        return data

    @functools.cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer, loaded when first needed."""
        if self._tokenizer is not None:
            check_tokenizer(self._tokenizer, self._tokenizer.name_or_path)
            return self._tokenizer
        name = self.hparams.get("tokenizer")
        if not name:
            raise UserError("data.tokenizer is missing: give the name or folder of the model's tokenizer")
        return load_tokenizer(name, self.hparams.trust_remote_code)

    @functools.cached_property
    def max_length(self) -> int:
        """Tokens of a prompt and completion together: as set, or what tokenizer and model allow up to `MAX_LENGTH`.

        The tokenizer's number is a hint and gives way to the user's; the model's positions are a wall.

        Raises:
            UserError: more was asked for than the model has positions, or it has too few for any pair.
        """
        asked, positions = self.hparams.max_length, self._model_positions
        if positions < (asked or SHORTEST):
            wanted = f"data.max_length is {asked}" if asked else f"a prompt and a completion need {SHORTEST} tokens"
            mend = f"lower it to {positions}" if asked and positions >= SHORTEST else "take another model"
            raise UserError(f"{wanted}, but this model has {positions} positions: {mend}")
        if asked:
            return asked
        found = int(min(MAX_LENGTH, self.tokenizer.model_max_length, positions))
        if found < MAX_LENGTH:
            rank_zero_info(f"data.max_length: {found} tokens, which is what the tokenizer and the model can take")
        return found

    @property
    def _model_positions(self) -> float:
        """Positions of the model that the trainer has; infinite where there is none, or it does not number them."""
        model = self.trainer and self.trainer.lightning_module
        return getattr(model, "positions", None) or math.inf

    # ------------------------------------------------------------------ load, split, encode

    def prepare_data(self) -> None:
        """Fills the cache of encoded pairs in one process, so that several ranks do not all encode."""
        if self.hparams.rejected != "generated":  # which all ranks do together
            self.setup(self.trainer.state.fn if self.trainer else "fit")

    def setup(self, stage: str) -> None:
        """Loads what a stage needs into `self.datasets` ("train", "val", "test", "predict"), once."""
        if stage in self._stages:
            return
        self._stages.add(stage)
        known = set(self.accounts)
        if stage == "predict":
            if "predict" not in self.datasets:
                self._load_prompts()
        else:
            self._load_pairs({"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}[stage])
        for name, account in self.accounts.items():
            if name not in known:
                for line in account.lines():
                    rank_zero_warn(line)
        if stage == "fit":
            self._say_what_was_cut()

    def _load_pairs(self, needed: Sequence[str]) -> None:
        given = {"val": self.hparams.val_dataset, "test": self.hparams.test_dataset}
        for name in needed:
            if given.get(name) and name not in self.datasets:
                self.datasets[name], source = self._pairs_of(given[name], name)
                self._origins[name] = Origin([(source.name, source.unit, 0)], None)
        if any(name not in self.datasets for name in needed):
            if not self._train_weights:
                raise UserError(f"data.{needed[0]}_dataset is missing: give a file, a folder or a hub id")
            self._split()

    def _split(self) -> None:
        """The training data, minus what is split off where no held-out data set is given."""
        from datasets import concatenate_datasets

        parts, sources, start = [], [], 0
        for name in self._train_weights:
            part, source = self._pairs_of(name, "train")
            parts.append(part)
            sources.append((source.name, source.unit, start))
            start += len(part)
        pairs = concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        sizes = {
            split: self.hparams[f"{split}_size"] for split in ("val", "test") if not self.hparams[f"{split}_dataset"]
        }
        splits = split_by_key(context_keys(pairs), sizes, self.hparams.seed, ", ".join(self._train_weights))
        splits["train"] = mixed(
            splits["train"], [first for _, _, first in sources], list(self._train_weights.values()), self.hparams.seed
        )
        for split, rows in splits.items():
            if split not in self.datasets:
                self.datasets[split] = pairs.select(rows)
                self._origins[split] = Origin(sources, rows)

    def _pairs_of(self, name: str, stage: str) -> tuple["Dataset", Source]:
        """The encoded pairs of a data set, and where they were read."""
        source = open_source(name, stage)
        pairs = self._checked(source, find_format(source.columns, name, self.hparams.format), completions=True)
        return self._encoded(pairs, name, self._rejected(pairs, name)), source

    def _load_prompts(self) -> None:
        """Rows to answer: prompts alone, with the wanted reply where the data has it."""
        name = self.hparams.predict_dataset
        if not name:
            self.setup("test")
            self.datasets["predict"], self._origins["predict"] = self.datasets["test"], self._origins["test"]
            return
        source = open_source(name, "predict")
        form = find_format(source.columns, name, self.hparams.format, completions=False)
        pairs = self._checked(source, form, completions=False)

        def batches() -> Iterator[Columns]:
            for columns in progress(batches_of(pairs), f"Encoding {name}", len(pairs)):
                ids = encode_prompts(self.tokenizer, columns["prompt"], self.max_length, columns["chat"])
                self._largest_id = max(self._largest_id, *map(max, ids))
                yield columns | {"prompt_ids": ids}

        self.datasets["predict"] = self._written(self._fingerprint(pairs, "prompts"), PROMPT_COLUMNS, batches)
        self._origins["predict"] = Origin([(source.name, source.unit, 0)], None)

    def _checked(self, source: Source, format_name: str, completions: bool) -> "Dataset":
        """The checked rows of a data set as columns of text; read once, then from the cache, the account too."""
        row_format = get_format(format_name)
        reader = PairReader(source, row_format, self.row_options, completions, self.hparams.on_bad_row)
        fingerprint = _digest(
            *(source.fingerprint, source.name, format_name, row_format.fingerprint, self.row_options[:2]),
            *(self._chat_source, str(self.tokenizer.special_tokens_map), completions, self.hparams.on_bad_row),
        )
        pairs, note = cached_dataset(
            fingerprint,
            PAIR_COLUMNS,
            lambda: progress(reader.batches(), f"Reading {source.name}"),
            lambda: {"account": reader.account._asdict(), "chat": reader.chat},
        )
        self.accounts[source.name] = RowAccount(**note["account"])
        self._formats[source.name] = format_name, note["chat"]
        if note["chat"]:
            self._end_replies_as_the_template_does()
        return pairs

    @functools.cached_property
    def _chat_source(self) -> str | None:
        """The Jinja source of the chat template."""
        path = self.hparams.chat_template
        if path is None:
            template = self.tokenizer.chat_template
            return json.dumps(template) if isinstance(template, dict) else template
        file = local_path(path)
        if not file.is_file():  # a pipe or a device would be read for ever
            raise UserError(f"data.chat_template '{path}' cannot be read: there is no such file")
        if file.stat().st_size > LARGEST_TEMPLATE:
            raise UserError(f"data.chat_template '{path}' has more than {LARGEST_TEMPLATE:,} bytes: it is no template")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"data.chat_template '{path}' cannot be read: {error}") from error

    def _chat_template(self) -> "ChatTemplate":
        return self._cached_chat_template

    @functools.cached_property
    def _cached_chat_template(self) -> "ChatTemplate":
        from dpo_lightning.data.chat import ChatTemplate

        if self._chat_source is None:
            no_chat_template()
        return ChatTemplate(self.tokenizer, self._chat_source if self.hparams.chat_template else None)

    def _end_replies_as_the_template_does(self) -> None:
        """Makes the token that ends a reply in the template the tokenizer's EOS: it is trained, replies stop at it."""
        end = self._chat_template().end_token
        if end != self.tokenizer.eos_token:
            rank_zero_info(f"replies end in {end}, as in the chat template, not in {self.tokenizer.eos_token}")
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.eos_token = end
        if self.hparams.chat_template and self.tokenizer.chat_template != self._chat_source:
            self.tokenizer = copy.deepcopy(self.tokenizer)
            self.tokenizer.chat_template = self._chat_source  # it is exported with the model

    def asking(self) -> Asking | None:
        """How the training data ask the model; None where they are not loaded."""
        if "train" not in self._origins:
            return None
        formats = [self._formats[name] for name, _, _ in self._origins["train"].sources]
        template = self._chat_source if self.hparams.chat_template else None
        return trained_asking(formats, self.row_options, self.tokenizer.eos_token, template)

    def _rejected(self, pairs: "Dataset", name: str) -> "Rejected | None":
        """The rejected completions of a data set, where `data.rejected` makes them."""
        if self.hparams.rejected == "empty":
            return None
        if any(any(columns["rejected"]) for columns in batches_of(pairs, ["rejected"])):
            raise UserError(f"{name} has rejected completions of its own: leave data.rejected out")
        if self.hparams.rejected == "generated":
            return self._generated(pairs, name)
        chosen = pairs.select_columns("chosen")
        partners = shuffled_partners(text_keys(pairs, "chosen"), self.hparams.seed, name)
        return Rejected(
            ("shuffled", self.hparams.seed),
            lambda start, stop: {"rejected": chosen[partners[start:stop].tolist()]["chosen"]},
        )

    def _generated(self, pairs: "Dataset", name: str) -> "Rejected | None":
        """Replies of the model, made now where they are not on disk yet; None where they are not to be made."""
        generation = generation_from(self.hparams.generation, self.max_length)
        generator = RejectedGenerator(generation, self.tokenizer, self.max_length, self.hparams.seed)
        if self.generates:
            found = generator.make(pairs, name, self.eval_batch_size, self.trainer)
        else:
            found = generator.find(pairs)
        if found is None:
            self.not_generated.append(name)
            return None
        replies, note = found
        made, *doubts = said(one_line(name), note, len(replies))
        rank_zero_info(made)
        for doubt in doubts:
            rank_zero_warn(doubt)

        def columns(start: int, stop: int) -> Columns:
            rows = replies[start:stop]
            return {"rejected": rows["text"], "rejected_tokens": rows["tokens"]}

        return Rejected(("generated", replies._fingerprint), columns)

    def _encoded(self, pairs: "Dataset", name: str, rejected: "Rejected | None") -> "Dataset":
        def batches() -> Iterator[Columns]:
            start = 0
            for columns in progress(batches_of(pairs), f"Encoding {name}", len(pairs)):
                stop = start + len(columns["prompt"])
                if rejected:
                    columns |= rejected.columns(start, stop)
                encoded = encode_batch(columns, self.tokenizer, self.max_length)
                if not all(encoded["prompt_ids"]):
                    raise UserError(
                        f"the tokenizer '{self.tokenizer.name_or_path}' makes no tokens of a prompt in {name}: "
                        "it is damaged or incomplete; give the model's own one as data.tokenizer"
                    )
                for side in ("prompt_ids", "chosen_ids", "rejected_ids"):
                    self._largest_id = max(self._largest_id, *map(max, encoded[side]))
                yield columns | encoded
                start = stop

        made = rejected.made if rejected else ("empty",)
        return self._written(self._fingerprint(pairs, *made), ENCODED_COLUMNS, batches)

    def _written(self, fingerprint: str, schema: pa.Schema, batches: Callable[[], Iterator[Columns]]) -> "Dataset":
        before, self._largest_id = self._largest_id, -1
        data, note = cached_dataset(fingerprint, schema, batches, lambda: {"largest_id": self._largest_id})
        self._largest_id = max(before, note["largest_id"])
        return data

    def _fingerprint(self, pairs: "Dataset", *what: Any) -> str:
        return _digest(pairs._fingerprint, what, tokenizer_fingerprint(self.tokenizer), self.max_length)

    def check_vocabulary(self, size: int, model: str) -> None:
        """Checks that a model knows every token of the data.

        Args:
            size: rows of the model's embedding.

        Raises:
            UserError: a token's id is `size` or more; the first row with one is named.
        """
        if self._largest_id < size:
            return
        for name, data in self.datasets.items():
            for position, pair in enumerate(data):
                for column in ("prompt", "chosen", "rejected"):
                    if unknown := [token for token in pair.get(f"{column}_ids", ()) if token >= size]:
                        raise UserError(
                            f"{self.where(name, [position])[0]}, {column}: its token "
                            f"{self.tokenizer.convert_ids_to_tokens(unknown[0])!r} has the id {unknown[0]}, but model "
                            f"'{model}' has embeddings for {size} tokens only: data.tokenizer belongs to another model"
                        )

    def _say_what_was_cut(self) -> None:
        for split, data in self.datasets.items():
            if "prompt_cut" not in data.column_names:
                continue
            prompts, completions = (numbers(data, name) for name in ("prompt_cut", "completion_cut"))
            if (prompts | completions).any():
                first = self.where(split, np.flatnonzero(prompts | completions)[:1].tolist())[0]
                rank_zero_warn(
                    f"{split}: of {len(data)} pairs {prompts.sum()} had their prompt cut from the left and "
                    f"{completions.sum()} a completion cut (its EOS kept) to fit data.max_length = {self.max_length} "
                    f"(the first: {first})"
                )
        rank_zero_info("data: " + ", ".join(f"{len(data)} {name} pairs" for name, data in self.datasets.items()))

    # ------------------------------------------------------------------ loaders

    def train_dataloader(self) -> DataLoader:
        """PairBatch loader over the training pairs."""
        return self._pair_loader("train", self.hparams.batch_size, shuffle=self.hparams.shuffle)

    def val_dataloader(self) -> DataLoader | list:
        """PairBatch loader over the validation pairs; an empty list where there are none."""
        return self._pair_loader("val", self.eval_batch_size) if "val" in self.datasets else []

    def test_dataloader(self) -> DataLoader:
        """PairBatch loader over the test pairs."""
        return self._pair_loader("test", self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        """PromptBatch loader over the prompts to answer, in their order."""
        return self._loader("predict", ("prompt_ids",), collate_prompt_rows, self.eval_batch_size, shuffle=False)

    @property
    def eval_batch_size(self) -> int:
        """Pairs per batch in validation, testing and prediction."""
        given = self.hparams.eval_batch_size
        return self.hparams.batch_size if given is None else given

    def on_before_batch_transfer(self, batch: PairBatch | PromptBatch, dataloader_idx: int) -> PairBatch | PromptBatch:
        """Adds the reference log-probs that are in a cache; on the CPU, so that no device is waited for."""
        if self.trainer.state.fn != "fit" or not self.reference_caches:
            return batch
        cache = self.reference_caches["train" if self.trainer.training else "val"]
        return batch._replace(reference_logps=cache.look_up(batch.pair_ids.tolist()))

    def _pair_loader(self, name: str, batch_size: int, shuffle: bool = False) -> DataLoader:
        return self._loader(name, EncodedPair._fields, collate_pair_rows, batch_size, shuffle)

    def _loader(self, name: str, columns: Sequence[str], collate_fn: Any, batch_size: int, shuffle: bool) -> DataLoader:
        if name not in self.datasets:
            raise UserError(
                f"there are no {name} pairs: give data.{name}_dataset, or a data.{name}_size above 0 to split some off"
            )
        data = self.datasets[name]
        lengths = numbers(data, "length") if "length" in data.column_names else np.zeros(len(data), dtype=np.int64)
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        fixed = self.trainer is not None and self.trainer.overfit_batches > 0
        sampler_class = FixedBatchSampler if fixed else LengthGroupedBatchSampler
        sampler = sampler_class(lengths, batch_size, shuffle and not fixed, self.hparams.seed, rank, world)
        loader = ResumableLoader(
            IndexedRows(data.select_columns(list(columns))),
            sampler=sampler,
            batch_size=None,
            collate_fn=collate_fn,
            num_workers=self.hparams.num_workers,
            worker_init_fn=_leave_signals_to_the_run,
            persistent_workers=self.hparams.num_workers > 0,
        )
        loader.trainer = self.trainer
        return loader

    def identity(self) -> dict[str, Any]:
        """What the training batches follow from, by name: a resumed run must have the same."""
        settings = {f"data.{name}": self.hparams[name] for name in ("batch_size", "shuffle", "seed")}
        return settings | {"the digest of the encoded training pairs": self._train_digest}

    @functools.cached_property
    def _train_digest(self) -> str:
        return content_digest(self.datasets["train"], EncodedPair._fields)[:16]

    def pairs(self, name: str, positions: Sequence[int]) -> list[PreferencePair]:
        """The texts of pairs of a data set ("train", "val", "test", "predict") by their position."""
        rows = self.datasets[name][list(positions)]
        return [PreferencePair(*texts) for texts in zip(*(rows[c] for c in PreferencePair._fields), strict=True)]

    def row_numbers(self, name: str, positions: Sequence[int]) -> list[int]:
        """The rows (of .jsonl and .csv files: the lines), counted from 1, that pairs of a data set were read from."""
        return self.datasets[name].select_columns("row")[list(positions)]["row"]

    def where(self, name: str, positions: Sequence[int]) -> list[str]:
        """The data set and row that pairs of `datasets[name]` were read from, for messages: "rows.jsonl, line 6"."""
        sources, rows = self._origins[name]
        starts = [start for _, _, start in sources]
        named = []
        for position, number in zip(positions, self.row_numbers(name, positions), strict=True):
            place = position if rows is None else rows[position]
            source, unit, _ = sources[np.searchsorted(starts, place, side="right") - 1]
            named.append(f"{source}, {unit} {number}")
        return named


class Origin(NamedTuple):
    """Where the pairs of a data set come from."""

    sources: list[tuple[str, str, int]]  # name, what its row numbers count, position of its first pair
    positions: Sequence[int] | None  # of the pairs among all of them; None where they are all


class Rejected(NamedTuple):
    """Rejected completions that the rows do not have themselves."""

    made: tuple  # what tells them from others
    columns: Callable[[int, int], Columns]  # of pairs [start, stop): `rejected`, and its ids where there are any


def _digest(*parts: Any) -> str:
    return key_digest([ENCODING_VERSION, *parts])
