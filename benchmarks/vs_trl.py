"""Side by side with TRL's DPOTrainer: pairs per second, peak memory and first losses, taking turns in one run.

    pip install -e ".[bench]"
    python benchmarks/vs_trl.py --rows rows.jsonl                      # the hub's gpt2 tokenizer, random GPT-2 small
    python benchmarks/vs_trl.py --rows rows.jsonl --model FOLDER --workloads founding --references online
    python benchmarks/vs_trl.py --rows rows.jsonl --json speed.jsonl   # and then: benchmarks/chart.py speed.jsonl

Each contender is a process with its own trainer; they take turns (A B A B ...), a turn is a few optimizer steps on
the same pairs, and medians over the turns are compared. Same weights, batches, optimizer, schedule and precision;
TRL without gradient checkpointing and without padding beyond the batch.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

WORKLOADS = ("founding", "shuffled", "long")  # see workloads.py, which this small process does not import
REFERENCES = ("online", "cached")
GIB = 2**30


class Contender:
    """A process of `contenders.py`."""

    def __init__(self, name: str, spec: dict[str, Any], folder: Path) -> None:
        folder.mkdir(parents=True)
        path = folder / "spec.json"
        path.write_text(json.dumps(spec | {"folder": str(folder)}))
        self.name, self.log = name, folder / "log.txt"
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.peak_bytes = 0
        with self.log.open("w") as log:
            # Threads wait for work as they do for every user: in a loop for a few milliseconds, then asleep. So who
            # rests does not slow the other one down.
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("contenders.py")), name, str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")},
            )

    def turn(self, steps: int, timed: bool = True) -> None:
        """Takes `steps` optimizer steps."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            killed = " (killed: the machine's memory is probably too small for this batch)" if status == -9 else ""
            sys.exit(f"{self.name} ended early with status {status}{killed}:\n{self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        self.losses += answer["losses"]
        self.peak_bytes = answer["peak_bytes"]
        if timed:
            self.seconds.append(answer["seconds"] / steps)


@contextmanager
def contender(name: str, spec: dict[str, Any], folder: Path) -> Iterator[Contender]:
    """A contender that is gone afterwards."""
    process = Contender(name, spec, folder)
    try:
        yield process
    finally:
        process.process.kill()
        process.process.wait()


def compare(spec: dict[str, Any], folder: Path, repeats: int, steps: int, warmup: int) -> dict[str, Any]:
    """Runs both and gives the figures of one comparison."""
    with ExitStack() as stack:
        ours, trl = (stack.enter_context(contender(name, spec, folder / name)) for name in ("ours", "trl"))
        for each in (ours, trl):
            each.turn(warmup, timed=False)
        for _ in range(repeats):
            for each in (ours, trl):
                each.turn(steps)
    speed = {each.name: spec["batch_size"] / statistics.median(each.seconds) for each in (ours, trl)}
    ratios = [theirs / mine for mine, theirs in zip(ours.seconds, trl.seconds, strict=True)]
    return {
        "ours_pairs_per_s": speed["ours"],
        "trl_pairs_per_s": speed["trl"],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "ours_gib": ours.peak_bytes / GIB,
        "trl_gib": trl.peak_bytes / GIB,
        "loss_difference": max(abs(a - b) for a, b in zip(ours.losses, trl.losses, strict=True)),
        "losses": len(ours.losses),
    }


def largest_batch(name: str, spec: dict[str, Any], folder: Path, limit_gib: float) -> int:
    """The largest batch size, of doublings and the three sizes between two of them, whose second step stays below."""

    def fits(size: int) -> bool:
        inner = folder / f"{name}-{size}"
        write_pairs(spec | {"batch_size": size}, inner.with_suffix(".jsonl"), batches=3)
        with contender(name, spec | {"batch_size": size, "pairs": str(inner.with_suffix(".jsonl"))}, inner) as one:
            one.turn(2, timed=False)
            return one.peak_bytes < limit_gib * GIB

    size = 8
    if not fits(size):
        return 0
    while fits(2 * size):
        size *= 2
    return max([size, *(s for s in (size * 5 // 4, size * 3 // 2, size * 7 // 4) if fits(s))])


def write_pairs(spec: dict[str, Any], path: Path, batches: int) -> None:
    """The workload of a spec as a file, made in a process of its own: this one is to stay small."""
    code = "import sys, json, pathlib, workloads; s = json.loads(sys.argv[1]); s['path'] = pathlib.Path(s['path']); "
    arguments = {
        "name": spec["workload"],
        "rows_file": spec["rows"],
        "tokenizer_name": spec["model"],
        "batch_size": spec["batch_size"],
        "batches": batches,
        "path": str(path),
    }
    run_here(code + "workloads.write_workload(**s)", json.dumps(arguments))


def run_here(code: str, *args: str) -> str:
    """Runs Python code with this folder's modules and gives the last line that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return (done.stdout.strip().splitlines() or [""])[-1]


def main() -> None:
    """Parses the command line, runs every workload with every kind of reference, prints each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", required=True, help="JSONL with question, context, answer")
    parser.add_argument("--model", help="model folder; left out, GPT-2 small with random weights")
    parser.add_argument("--tokenizer", default="gpt2", help="for random weights: tokenizer folder or hub id")
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--references", nargs="+", default=list(REFERENCES), choices=REFERENCES)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--precision", choices=("bf16", "float32"), default="bf16", help="the same for both")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns of each contender")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a turn")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps at the start")
    parser.add_argument("--optimizer", choices=("AdamW", "Adafactor"), default="AdamW", help="of ours; TRL's is AdamW")
    parser.add_argument("--trl_attn", default="sdpa", choices=("sdpa", "eager"), help="TRL's attention kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each comparison as a JSON line")
    parser.add_argument("--largest_batch", type=float, metavar="GIB", help="find the largest batch within GIB instead")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run_options = [options.model or "", options.tokenizer, str(folder / "model")]
        model = run_here(
            "import sys, pathlib, workloads; m, t, f = sys.argv[1:]; "
            "print(workloads.model_folder(m or None, t, pathlib.Path(f)))",
            *run_options,
        )
        here = machine()
        print(
            here["machine"],
            as_words(here["versions"]),
            f"batch {options.batch_size}, {options.precision}",
            sep="; ",
            flush=True,
        )
        for workload in options.workloads:
            spec = {
                "workload": workload,
                "rows": str(Path(options.rows).resolve()),
                "model": model,
                "batch_size": options.batch_size,
                "precision": options.precision,
                "attn": options.trl_attn,
                "optimizer": options.optimizer,
            }
            if options.largest_batch:
                for name in ("ours", "trl"):
                    size = largest_batch(name, spec | {"reference": "online"}, folder, options.largest_batch)
                    print(
                        f"{workload}: the largest batch of {name} in {options.largest_batch} GiB is {size}", flush=True
                    )
                continue
            spec["pairs"] = str(folder / f"{workload}.jsonl")
            write_pairs(spec, Path(spec["pairs"]), options.warmup + options.repeats * options.steps + 1)
            for reference in options.references:
                inner = folder / f"{workload}-{reference}"
                figures = compare(
                    spec | {"reference": reference}, inner, options.repeats, options.steps, options.warmup
                )
                print(as_line(workload, reference, figures), flush=True)
                if options.json:
                    keys = ("workload", "batch_size", "precision", "optimizer")
                    line = here | {key: spec[key] for key in keys} | {"reference": reference} | figures
                    with options.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")


def as_line(workload: str, reference: str, figures: dict[str, Any]) -> str:
    """One comparison in words."""
    low, high = min(figures["ratios"]), max(figures["ratios"])
    return (
        f"{workload:9} {reference:7}"
        f" ours {figures['ours_pairs_per_s']:8.2f} pairs/s  TRL {figures['trl_pairs_per_s']:8.2f}"
        f"  ratio {figures['ratio']:5.2f} ({low:.2f} to {high:.2f})"
        f"  memory {figures['ours_gib']:6.2f} and {figures['trl_gib']:6.2f} GiB"
        f" ({figures['ours_gib'] / figures['trl_gib']:.2f})"
        f"  first {figures['losses']} losses differ by at most {figures['loss_difference']:.1e}"
    )


def as_words(versions: dict[str, str]) -> str:
    """{"torch": "2.14.1", "TRL": "1.16.0"} -> "torch 2.14.1, TRL 1.16.0"."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def machine() -> dict[str, Any]:
    """What this runs on, and when."""
    code = (
        "import json, torch, trl, transformers, dpo_lightning.models.hardware as p; "
        "print(json.dumps([torch.cuda.get_device_name() if torch.cuda.is_available() else "
        "f'CPU with {torch.get_num_threads()} threads, bfloat16 in hardware: ' + "
        "(', '.join(sorted(p.cpu_flags() & p.BF16_FLAGS)) or 'no'), "
        "torch.__version__, transformers.__version__, trl.__version__]))"
    )
    name, *versions = json.loads(run_here(code))
    names = ("torch", "transformers", "TRL", "Python")
    return {
        "date": date.today().isoformat(),
        "machine": name,
        "versions": dict(zip(names, [*versions, platform.python_version()], strict=True)),
    }


if __name__ == "__main__":
    main()
