"""The command `probe`, which `--memory` and `start` run: a few real steps of a run, in a process of their own.

The peak of a process's memory cannot be taken back, so it is measured in one that ends. It is the run itself, with its
callbacks, replies, checkpoints and export, on the longest pairs of its data: first in the smallest micro-batches, then
in larger ones for as long as these can be expected to fit, and last in a few batches as they come, which are timed. The
results go to a file of JSON lines.
"""

import math
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch.utils.data import DataLoader, Dataset

from dpo_lightning.callbacks.context import find_callback
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.cli.peaks import Point, expected
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.batching import PADDING, PairBatch
from dpo_lightning.data.columns import numeric_column
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.loaders import IndexedRows, collate_rows
from dpo_lightning.dpo.cached_reference import sees_pairs_again
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.dpo.reference import FrozenCopy
from dpo_lightning.errors import UserError
from dpo_lightning.models.hardware import peak_memory
from dpo_lightning.storage.jsonl import append_lines

WARM_UP = 1  # batches as they come, before those that are timed
WATCHED_EVERY = 0.02  # seconds
MANY = 10**6  # batches, more than any probe has
# Of a run, in its probe: nothing goes to the user's loggers, callbacks and folders, and nothing ends it early.
OVERRIDES: dict[str, Any] = {
    **{"trainer.max_epochs": 1, "trainer.max_steps": -1, "trainer.min_epochs": None, "trainer.min_steps": None},
    **{"trainer.max_time": None, "trainer.limit_train_batches": 1.0, "trainer.limit_val_batches": 1.0},
    **{"trainer.overfit_batches": 0.0, "trainer.val_check_interval": 1.0, "trainer.check_val_every_n_epoch": 1},
    **{"trainer.num_sanity_val_steps": 0, "trainer.accumulate_grad_batches": 1, "trainer.fast_dev_run": False},
    **{"trainer.logger": True, "trainer.enable_progress_bar": False, "trainer.enable_checkpointing": True},
    **{"replies.every_n_steps": 0, "replies.num_shown": 0, "guards.stop_when_learned": False},
    **{"checkpoint.dirpath": None, "checkpoint.monitor": None, "export.folder": None},
}


class ProbeCLI(DPOCLI):
    """The configuration of a run, with the options of `probe`."""

    command = "probe"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the limits and the file of results."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--limit", type=int, help="bytes that a run may use")
        parser.add_argument("--ceiling", type=int, help="bytes at which the process ends, to protect the machine")
        parser.add_argument("--parts", type=int, default=1, help="micro-batches that a batch is at least cut into")
        parser.add_argument("--timed", type=int, default=0, help="batches to time")
        parser.add_argument("--folder", type=str, help="an empty folder for the files of the run")
        parser.add_argument("--result", type=str, help="the file to write")


def run_probe(args: Sequence[str]) -> None:
    """Runs `probe` with its arguments, the command's name first.

    Raises:
        UserError: the run has several processes, or its data cannot be used.
    """
    cli = configured(ProbeCLI, args[1:], run=False)
    data, config = cli.datamodule, cli.config
    if cli.trainer.world_size > 1:
        raise UserError(
            f"memory is measured for one process, and this run has {cli.trainer.world_size}: give --trainer.devices 1, "
            "or leave memory out"
        )
    data.trainer = cli.trainer
    cli.trainer.strategy.connect(cli.model)  # for the number of positions, which limits the pairs
    data.setup("fit")
    overrides = OVERRIDES | {"trainer.default_root_dir": config.folder}
    if cli.model.loss.needs_reference and cli.model.hparams.reference is None:
        again = not cli.model.hparams.sync_ref_model and sees_pairs_again(cli.trainer, data)
        overrides["model.reference"] = "cached" if again else "online"
    batches = Batches(data, cli.model, config.replies.num_prompts, WARM_UP + config.timed)
    flags = [part for name, value in overrides.items() for part in (f"--{name}", as_text(value))]
    run = configured(ProbeCLI, [*args[1:], *flags], run=False)
    device = run.trainer.strategy.root_device
    sizes = [size for size in batches.sizes if size.parts >= config.parts]
    growth = Growth(batches, sizes, cli.trainer.accumulate_grad_batches > 1, device, config.limit, Path(config.result))
    run.trainer.callbacks.insert(0, growth)
    watch(device, config.ceiling)
    loaders: Any = data
    loaders.train_dataloader = lambda: DataLoader(growth, batch_size=None, collate_fn=as_it_is)
    if batches.held_out:
        held_out: Any = [batches.held_out]
        loaders.val_dataloader = lambda: DataLoader(
            held_out, batch_size=None, collate_fn=lambda rows: batches.batch("val", rows)
        )
    try:
        run.trainer.fit(run.model, datamodule=data)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return  # what was measured before is in the file
    replies = find_callback(run.trainer, RepliesCallback)
    if replies and replies.showings:
        growth.write({"replies": replies.seconds / len(replies.showings)})
    growth.write({"peak": held(device)})


def as_it_is(batch: Any) -> Any:
    """The batch: it needs no collation."""
    return batch


def as_text(value: Any) -> str:
    """A setting as on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def held(device: torch.device) -> int:
    """The most memory in bytes that this process has held so far, on a GPU that of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = peak_memory(device)
    if peak is None:
        raise UserError("this system does not say how much memory a process uses: leave memory out")
    return peak


def watch(device: torch.device, ceiling: int) -> None:
    """Ends this process before it holds more than `ceiling` bytes and drives others into swap."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(min(1.0, ceiling / torch.cuda.mem_get_info(device)[1]), device)
        return

    def look() -> None:
        while held(device) < ceiling:
            time.sleep(WATCHED_EVERY)
        os._exit(0)  # at once: what was measured before is in the file

    threading.Thread(target=look, daemon=True).start()


class Size(NamedTuple):
    """A size of micro-batches."""

    parts: int  # micro-batches that a batch of the configuration is cut into
    pairs: int  # in each
    tokens: int  # of as many of the longest pairs


def micro_batches(lengths: np.ndarray, batch_size: int, batch_tokens: int | None) -> list[Size]:
    """The sizes that a batch can be cut into, smallest first.

    Args:
        lengths: tokens of the training pairs, longest first.
    """
    if batch_tokens is None:
        parts = [part for part in range(batch_size, 0, -1) if batch_size % part == 0]
        pairs = [batch_size // part for part in parts]
    else:
        parts = [2**n for n in reversed(range(int(math.log2(batch_tokens // lengths[0])) + 1))]
        pairs = [batch_tokens // part // int(lengths[0]) for part in parts]
    return [Size(part, n, int(lengths[:n].sum())) for part, n in zip(parts, pairs, strict=True)]


class Batches:
    """The batches of a probe. The data sets keep only the pairs that these need.

    Args:
        prompts: held-out pairs that the run's replies are to.
        typical: batches as they come.
    """

    def __init__(self, data: PreferenceDataModule, model: DPOModule, prompts: int, typical: int) -> None:
        self.data, self.max_length = data, data.max_length if model.loss.needs_kl else None
        train = data.datasets["train"]
        lengths = numeric_column(train, "length")
        longest = np.argsort(-lengths, kind="stable")
        sizes = micro_batches(lengths[longest], data.hparams.batch_size, data.hparams.batch_tokens)
        self.sizes = [size for size in sizes if size.pairs > 1 or not model.loss.needs_kl]
        sampler: Any = data.train_dataloader().sampler
        kept = [longest[: sizes[-1].pairs], *sampler.global_batches()[:typical]]
        ends = np.cumsum(list(map(len, kept))).tolist()
        self.longest, *self.typical = [range(end - len(rows), end) for rows, end in zip(kept, ends, strict=True)]
        data.datasets["train"] = train.select(np.concatenate(kept))
        self.held_out = range(0)
        if held_out := data.datasets.get("val"):
            longest = np.argsort(-numeric_column(held_out, "length"), kind="stable")[: data.eval_batch_size]
            asked = np.arange(min(prompts, len(held_out)))
            data.datasets["val"] = held_out.select(np.concatenate([asked, longest]))
            self.held_out = range(len(asked), len(asked) + len(longest))

    def batch(self, name: str, positions: Sequence[int]) -> PairBatch:
        """A batch, as the loaders make it."""
        batch = collate_rows(IndexedRows(self.data.datasets, name)[list(positions)], self.max_length)
        assert isinstance(batch, PairBatch)
        return batch


class Growth(Callback, Dataset):
    """A data set whose items are the batches of a probe, decided on as it goes, and the callback that measures them.

    A size is measured in two micro-batches of one optimizer step, because accumulated gradients take memory as well.

    Args:
        sizes: to try, smallest first.
        accumulates: the run accumulates whole batches.
        limit: bytes; sizes that can be expected to take more are left out.
        result: file to write to.
    """

    def __init__(
        self, batches: Batches, sizes: Sequence[Size], accumulates: bool, device: torch.device, limit: int, result: Path
    ) -> None:
        self.batches, self.sizes, self.accumulates = batches, sizes, accumulates
        self.device, self.limit, self.result = device, limit, result
        self._accumulated, self._timed, self._last = 1, False, False  # for the current batch
        self._items, self._began = self._growing(), 0.0

    def __len__(self) -> int:
        return MANY

    def __getitem__(self, index: int) -> PairBatch:
        return self.batches.batch("train", next(self._items))

    def write(self, line: dict[str, Any]) -> None:
        """Adds what was measured to the file."""
        append_lines(self.result, [line])

    def _growing(self) -> Iterator[Sequence[int]]:
        """Positions of the next batch; what follows a `yield` comes after the training step."""
        points: list[Point] = []
        self._accumulated = 2
        yield from (self.batches.longest[: self.sizes[0].pairs] for _ in range(2))  # now the optimizer has its state
        for size in self.sizes:
            if points and expected(points, size.tokens) > self.limit:
                break
            self._accumulated = 2 if size.parts > 1 or self.accumulates else 1
            yield from (self.batches.longest[: size.pairs] for _ in range(self._accumulated))
            points.append(Point(*size, bytes=held(self.device)))
            self.write({"point": list(points[-1])})
            if points[-1].bytes > self.limit:
                break
        for number, rows in enumerate(self.batches.typical, 1):
            self._timed, self._last = number > WARM_UP, number == len(self.batches.typical)
            yield rows[: points[-1].pairs]

    # ------------------------------------------------------------------ the hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes what is known of the model."""
        parameters = [(p.requires_grad, p.numel(), p.element_size()) for p in pl_module.policy.parameters()]
        own = isinstance(pl_module.reference, FrozenCopy)
        facts = {
            "start": held(self.device),
            "weights": sum(number * size for _, number, size in parameters),
            "trained": sum(number for trained, number, _ in parameters if trained),
            "spare_copy": own and not pl_module.loss.needs_kl and not pl_module.hparams.sync_ref_model,
            "can_recompute": bool(pl_module.causal_lm.supports_gradient_checkpointing),
            "can_adapt": not pl_module.has_adapter,
            "pairs": self.batches.sizes[-1].pairs,
            "tokens": self.batches.sizes[-1].tokens,
        }
        self.write({"facts": facts})

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: PairBatch, batch_idx: int
    ) -> None:
        """Starts the clock."""
        trainer.accumulate_grad_batches, trainer.should_stop = self._accumulated, self._last
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Stops the clock, after the device has computed the loss."""
        outputs["loss"].item()
        if self._timed:
            seconds, tokens = time.perf_counter() - self._began, int((batch.segment_ids != PADDING).sum())
            stepped = (batch_idx + 1) % self._accumulated == 0
            self.write({"timed": {"seconds": seconds, "tokens": tokens, "stepped": stepped}})
