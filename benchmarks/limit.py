"""How close a training step comes to what this machine's matrix products allow.

    python benchmarks/limit.py --rows rows.jsonl                  # the hub's gpt2 tokenizer, random GPT-2 small

Counts the matrix products that a step needs at least: every real token once through policy and reference (a pair's
prompt counts once, padding not at all), attention only between tokens that see each other, the LM head only where a
completion token is predicted, a backward pass of two products for each product forward. After each step it measures how
fast this machine computes each of them now, at that very shape and in that precision. The sum of these times is the
step's floor; printed is what share of the step it makes (the median over the steps), and where the rest goes.
"""

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import torch
import vs_trl
import workloads
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.pytorch_utils import Conv1D

from dpo_lightning.data.batching import PADDING, PairBatch
from dpo_lightning.dpo.logps import shared_prefix_mask
from dpo_lightning.dpo.products import padding_for

TRIALS = 5  # of a matrix product; the median counts


class Product(NamedTuple):
    """`batch` matrix products of [rows, inner] by [inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns

    def transposed(self) -> "list[Product]":
        """The two products of the backward pass: the gradients of the left and of the right factor."""
        batch, rows, inner, columns = self
        return [Product(batch, rows, columns, inner), Product(batch, inner, rows, columns)]


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """(in, out) features of every linear layer but the head, with their number."""
    head = model.get_output_embeddings()
    shapes: Counter[tuple[int, int]] = Counter()
    for layer in model.modules():
        if isinstance(layer, Conv1D):
            shapes[tuple(layer.weight.shape)] += 1
        elif isinstance(layer, nn.Linear) and layer is not head:
            shapes[tuple(layer.weight.shape[::-1])] += 1
    return shapes


def floor_products(model: nn.Module, batch: PairBatch, online: bool) -> Counter[Product]:
    """The products of one step on a batch, with how often each is needed."""
    config = model.config
    tokens, predicted = int((batch.segment_ids != PADDING).sum()), len(batch.targets)
    forward = Counter({Product(1, tokens, *shape): count for shape, count in linear_shapes(model).items()})
    forward[Product(1, predicted, config.hidden_size, config.vocab_size)] += 1
    products: Counter[Product] = Counter()
    for product, count in forward.items():
        products[product] += count * (2 if online else 1)
        for backward in product.transposed():
            products[backward] += count
    # Attention is 12 (or 8) small products a row and head; their number of operations is that of the pairs of tokens
    # that see each other, and they are measured as products of the mean row.
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    mask = shared_prefix_mask(batch.segment_ids) & (batch.segment_ids != PADDING)[:, None, :, None]
    seen = float(mask.sum()) / batch.num_pairs
    width = round(seen**0.5)  # the square with as many entries
    scores = Product(batch.num_pairs * heads, width, config.hidden_size // heads, width)
    products[scores] += layers * (8 if online else 6)  # scores and their product with the values, and both backward
    return products


def seconds_of(product: Product, dtype: torch.dtype, device: torch.device) -> float:
    """Median time of a product on this machine."""
    left = torch.randn(product.batch, product.rows, product.inner, dtype=dtype, device=device)
    right = torch.randn(product.batch, product.inner, product.columns, dtype=dtype, device=device)
    if product.batch == 1:
        left, right = left[0], right[0]
    return statistics.median(timed(lambda: left @ right, device) for _ in range(TRIALS + 1))


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds that some work takes, device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Steps(Callback):
    """Times optimizer steps of a fit, each beside its own floor, and profiles those after the first `timed` of them."""

    def __init__(self, timed_steps: int, device: torch.device, dtype: torch.dtype, online: bool) -> None:
        self.timed_steps, self.device, self.dtype, self.online = timed_steps, device, dtype, online
        self.seconds: list[float] = []
        self.floors: list[float] = []
        self.batches: list[PairBatch] = []
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        self.profiler = profile(activities=activities, record_shapes=True)
        self.profiled = 0
        self.last = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: PairBatch, *args: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if len(self.seconds) <= self.timed_steps:
            # From the end of one step to the end of the next: data and logging too.
            self.seconds.append(now - self.last)
            self.batches.append(batch)
            self.floors.append(self._floor(floor_products(module.causal_lm, batch, self.online)))
            if len(self.seconds) == self.timed_steps + 1:
                self.profiler.start()
        else:
            self.profiled += 1
        self.last = time.perf_counter()

    def _floor(self, products: Counter[Product]) -> float:
        return sum(seconds_of(product, self.dtype, self.device) * count for product, count in products.items())

    def on_train_end(self, *args: Any) -> None:
        self.profiler.stop()


def padding_of(batches: list[PairBatch], module: Any) -> float:
    """Share of padding among the positions of batches in the shared layout, or packed if the module packs them."""
    real = [int((batch.segment_ids != PADDING).sum()) for batch in batches]
    if module.scoring.packed:
        with module.trainer.precision_plugin.forward_context():
            positions = sum(tokens + padding_for(module.causal_lm, tokens) for tokens in real)
    else:
        positions = sum(batch.segment_ids.numel() for batch in batches)
    return 1 - sum(real) / positions


KINDS = (  # in order: the first whose words are in an operation's name
    ("attention", ("scaled_dot_product", "bmm", "baddbmm", "_softmax", "attention")),
    ("matrix products", ("addmm", "mm", "linear")),
    ("optimizer", ("adamw", "Optimizer", "_foreach", "clip_grad")),
    ("elementwise", ("aten::", "Backward", "void ", "kernel")),
)


def breakdown(steps: Steps, vocabulary: int) -> dict[str, float]:
    """Kind of work -> seconds of a step, by the profiler's own times of single operations."""
    on_gpu = steps.device.type == "cuda"
    spent: Counter[str] = Counter()
    for event in steps.profiler.key_averages(group_by_input_shape=True):
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kind = kind_of(event.key)
        shapes = [size for shape in event.input_shapes or () if isinstance(shape, Iterable) for size in shape]
        if kind in ("matrix products", "elementwise") and vocabulary in shapes:
            kind = "head"
        spent[kind] += microseconds / 1e6
    return {kind: seconds / max(1, steps.profiled) for kind, seconds in spent.items()}


def kind_of(operation: str) -> str:
    """The kind of work of a profiled operation."""
    return next((kind for kind, words in KINDS if any(word in operation for word in words)), "Python, data, logging")


def main() -> None:
    """Runs a fit, measures the products of its batches, prints floor, step and shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="JSONL with question, context, answer")
    parser.add_argument("--model", help="model folder; left out, GPT-2 small with random weights")
    parser.add_argument("--tokenizer", default="gpt2", help="for random weights: tokenizer folder or hub id")
    parser.add_argument("--workload", default="founding", choices=vs_trl.WORKLOADS)
    parser.add_argument("--reference", default="online", choices=vs_trl.REFERENCES)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16")
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as temporary:
        model = workloads.model_folder(options.model, options.tokenizer, Path(temporary) / "model")
        pairs = Path(temporary) / "pairs.jsonl"
        workloads.write_workload(options.workload, options.rows, model, options.batch_size, options.steps + 4, pairs)
        spec = vars(options) | {"model": model, "pairs": str(pairs), "folder": temporary}
        dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
        steps = Steps(options.steps, device, dtype, options.reference == "online")
        profiler = SimpleProfiler(dirpath=temporary, filename="profile")
        module = contenders.fit_ours(spec, device, [steps], profiler=profiler)
    seconds, floors = steps.seconds[1:], steps.floors[1:]
    shares = [floor / step for floor, step in zip(floors, seconds, strict=True)]
    step, floor, share = (statistics.median(values) for values in (seconds, floors, shares))
    last = floor_products(module.causal_lm, steps.batches[-1], options.reference == "online")
    operations = sum(product.operations * count for product, count in last.items())
    padding = padding_of(steps.batches, module)
    print(
        f"{options.workload}, batch {options.batch_size}, {options.precision}, reference {options.reference}, {device}"
    )
    print(f"a step needs {operations / 1e9:.1f} GFLOP (the last batch); padding {padding:.1%} of the positions")
    print(
        f"floor {floor:.3f} s, measured {step:.3f} s: {share:.1%} of what the matrix products allow "
        f"({min(shares):.1%} to {max(shares):.1%})"
    )
    parts = breakdown(steps, module.causal_lm.config.vocab_size)
    for kind, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        print(f"  {kind:24}{seconds:8.3f} s  {seconds / sum(parts.values()):6.1%} of the profiled time")
    fetches = profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]
    print(f"  (of it, fetching and collating a batch: {statistics.median(fetches):.4f} s)")


if __name__ == "__main__":
    main()
