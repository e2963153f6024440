"""The command `inspect`: what a configuration will train on, and for how long. It needs no weights.

Everything comes from the datamodule as in training: its checked rows, its encoded pairs, its sampler's batches.
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from dpo_lightning.callbacks.context import batch_limit, batches_per_epoch
from dpo_lightning.callbacks.times import duration
from dpo_lightning.cli.doctor import examine
from dpo_lightning.cli.memory import bytes_of, chosen, of_a_run, size
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.batching import PADDING, PairBatch, collate_columns, to_pairs
from dpo_lightning.data.columns import context_keys, id_counts, numeric_column, thumbs
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.encoding import EncodedPair
from dpo_lightning.data.reading import RowAccount
from dpo_lightning.models.policy import base_model_name, load_config, parameter_count
from dpo_lightning.visible import one_line, visible

BINS, BAR = 10, 40  # of a histogram: rows, and characters of the longest bar
INDENT = "\n" + 12 * " "  # of a decoded pair's lines, which must not look like ours
TIMED_STEPS, WARMUP_STEPS = 4, 2
LONGEST_PROMPT = 300  # characters; longer ones are cut


class InspectCLI(DPOCLI):
    """The configuration of a run, with the options of `inspect`."""

    command = "inspect"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `rows` and `time`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--rows", type=int, default=3, help="number of pairs to show decoded")
        parser.add_argument("--time", type=bool, default=False, help="load the model and time a few real steps")


class Clock(Callback):
    """Seconds and tokens of each training batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Starts the clock."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Stops the clock, after the device has computed the loss."""
        outputs["loss"].item()
        self.seconds.append(time.perf_counter() - self._began)
        self.tokens.append(int((batch.segment_ids != PADDING).sum()))


def run_inspect(args: Sequence[str]) -> None:
    """Runs `inspect` with its arguments, the command's name first."""
    cli = configured(InspectCLI, args[1:], run=False)
    data, trainer = cli.datamodule, cli.trainer
    data.trainer = trainer  # for the number of devices
    trainer.strategy.connect(cli.model)  # for the number of positions, which limits the pairs
    data.generates = False
    data.setup("fit")
    for line in chain(inspect(data), examine(data, cli.model.loss), decoded_pairs(data, cli.config.rows)):
        print(visible(line))
    print("\n" + run_line(data, trainer) + "; " + time_line(data, trainer, measured(cli) if cli.config.time else None))
    if cli.model.scoring is not None:  # the model was loaded to measure the time
        print(f"this model takes batches {'packed, without' if cli.model.scoring.packed else 'with'} padding")
    for line in memory_lines(cli):
        print(visible(line))


def memory_lines(cli: DPOCLI) -> list[str]:
    """What the run takes: with `--memory` measured, and what that would change; else by its weights alone."""
    h = cli.model.hparams
    if cli.config.memory:
        config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
        return chosen(of_a_run(config), bytes_of(cli.config.memory)).lines
    weights = parameter_count(load_config(h.name_or_path, h.trust_remote_code)) * getattr(torch, h.dtype).itemsize
    parts = {"weights": weights}
    if not h.lora and base_model_name(h.name_or_path) == h.name_or_path:
        optimizer = {"AdamW's state": 2 * weights} if cli.model.make_optimizer is None else {}
        parts |= {"gradients": weights, **optimizer}
        parts |= {"reference": weights} if cli.model.loss.needs_reference else {}
    words = ", ".join(f"{name} {size(number)}" for name, number in parts.items())
    return [f"memory: {words}; the rest depends on the batches: --memory 8GiB measures it, and makes the run fit"]


def measured(cli: DPOCLI) -> float:
    """Seconds of training per token on one device here, timed over a few real steps."""
    settings, clock = cli.config.trainer, Clock()
    trainer = Trainer(
        accelerator=settings.accelerator, devices=1, precision=settings.precision, callbacks=[clock],
        gradient_clip_val=settings.gradient_clip_val, max_steps=WARMUP_STEPS + TIMED_STEPS, limit_val_batches=0,
        num_sanity_val_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(cli.model, datamodule=cli.datamodule)
    return sum(clock.seconds[WARMUP_STEPS:]) / sum(clock.tokens[WARMUP_STEPS:])


def run_line(data: PreferenceDataModule, trainer: Trainer) -> str:
    """The length of the run in steps."""
    batches, steps = length_of_run(data, trainer)
    return (
        f"an epoch has {batches:,} batches of {batch_limit(data)} on each of {trainer.world_size} devices; "
        f"at {trainer.accumulate_grad_batches} per step the run has {steps:,} steps"
    )


def length_of_run(data: PreferenceDataModule, trainer: Trainer) -> tuple[int, float]:
    """Batches of an epoch on each device, and optimizer steps of the run (infinite if nothing limits it)."""
    batches = batches_per_epoch(trainer, data)
    epochs = trainer.max_epochs if (trainer.max_epochs or -1) >= 0 else math.inf
    most = trainer.max_steps if trainer.max_steps >= 0 else math.inf
    return batches, min(most, epochs * math.ceil(batches / trainer.accumulate_grad_batches))


def time_line(data: PreferenceDataModule, trainer: Trainer, seconds_per_token: float | None) -> str:
    """The duration of the run, if it was measured."""
    if seconds_per_token is None:
        return "--time true loads the model and measures the time that the run takes here"
    _, steps = length_of_run(data, trainer)
    tokens = numeric_column(data.datasets["train"], "length").sum() / trainer.world_size / len(data.train_dataloader())
    seconds = tokens * trainer.accumulate_grad_batches * seconds_per_token
    return (
        f"about {duration(steps * seconds)} of training here, {seconds:.2f} s a step (measured over {TIMED_STEPS} "
        "steps; validation and replies come on top)"
    )


def inspect(data: PreferenceDataModule) -> Iterator[str]:
    """Describes a datamodule that is set up for "fit": rows, lengths and batches."""
    for account in data.accounts.values():
        yield from account_lines(account)
    for name in data.not_generated:
        model = data.hparams.generation["name_or_path"]
        yield f"{name}: `fit` will first generate its rejected completions with {model}; here they are empty"
    yield ""
    for name, pairs in data.datasets.items():
        count, contexts = len(pairs), len(np.unique(context_keys(pairs)))
        size = f"{count:,} pair{'s' * (count != 1)}"
        yield f"{name}: {size}, {contexts:,} different context{'s' * (contexts != 1)} (or prompts)"
        if any(alone := thumbs(pairs)):
            yield f"  {alone[0]:,} of them are a good completion alone, {alone[1]:,} a bad one (column label)"
    train = data.datasets["train"]
    for side in ("prompt", "chosen", "rejected"):
        counts = id_counts(train, f"{side}_ids")
        if counts.any():
            yield ""
            yield from histogram(f"train, tokens of {side}", counts[counts > 0])
    yield ""
    for cut in ("prompt_cut", "completion_cut"):
        count = int(numeric_column(train, cut).sum())
        share = f"{count:,} ({count / len(train):.1%})"
        yield f"{cut.replace('_', 's ')} to fit data.max_length = {data.max_length}: {share}"
    share = f"{padding(data):.1%} of their tokens, none if they are packed (model.attn_implementation)"
    yield f"padding in the first epoch's training batches: {share}"
    yield ""


def account_lines(account: RowAccount) -> Iterator[str]:
    """How many rows of a data set became pairs or were skipped, with the first of each kind."""
    yield f"{account.source}: {account.rows:,} rows read, {account.pairs:,} pairs"
    for label, counts in (("skipped", account.skipped), ("kept, though they teach nothing", account.doubtful)):
        for reason, count in counts.items():
            yield f"  {label}: {count:,} {reason}"
            yield from (f"    {one_line(line)}" for line in account.first[reason])
    if not account.skipped and not account.doubtful:
        yield "  none skipped, none repeated, no chosen that is its rejected"


def histogram(title: str, values: np.ndarray) -> Iterator[str]:
    """A text histogram of integers: a summary, then a line for each of at most `BINS` ranges."""
    low, high = int(values.min()), int(values.max())
    yield f"{title}: {low} to {high}, median {np.median(values):g}, mean {values.mean():.1f}, {values.sum():,} in total"
    width = max(1, math.ceil((high - low + 1) / BINS))
    counts = np.bincount((values - low) // width)
    for number, count in enumerate(counts.tolist()):
        first, last = low + number * width, low + (number + 1) * width - 1
        label = f"{first}" if width == 1 else f"{first}–{last}"
        yield f"  {label:>11} {count:>9,} {'█' * math.ceil(BAR * count / counts.max())}"


def padding(data: PreferenceDataModule) -> float:
    """Share of padding in the first epoch's training batches before packing, on all devices together."""
    lengths = numeric_column(data.datasets["train"], "length")
    sampler: Any = data.train_dataloader().sampler
    world = sampler.num_replicas
    batches = [batch[rank::world] for batch in sampler.global_batches() for rank in range(world)]
    return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches)


def decoded_pairs(data: PreferenceDataModule, rows: int) -> Iterator[str]:
    """The first training pairs, decoded."""
    if rows:
        yield "\nas trained, with ⟦ ⟧ around the tokens that are learnt (chosen) or unlearnt (rejected):"
    for position in range(min(rows, len(data.datasets["train"]))):
        yield from decoded_pair(data, position)


def decoded_pair(data: PreferenceDataModule, position: int) -> Iterator[str]:
    """A training pair, decoded from its batch."""
    columns = data.datasets["train"].select_columns(list(EncodedPair._fields))[[position]]
    (pair,) = to_pairs(collate_columns(columns, [position]))
    prompt = data.tokenizer.decode(pair.prompt_ids)
    yield data.locations("train", [position])[0]
    lines = [f"prompt    {'…' + prompt[-LONGEST_PROMPT:] if len(prompt) > LONGEST_PROMPT else prompt}"]
    for name, ids in (("chosen", pair.chosen_ids), ("rejected", pair.rejected_ids)):
        lines += [f"{name:<9} ⟦{data.tokenizer.decode(ids)}⟧"] if ids else []
    for line in lines:
        yield "  " + line.replace("\n", INDENT)
