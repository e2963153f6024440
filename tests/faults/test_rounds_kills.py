"""A loop of `rounds`, killed in every stage and gone on with, ends in the same weights, with the same samples.

`make faults` (DPO_FAULTS=long) kills it 30 times; DPO_KILLS sets the number.
"""

import collections
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from harness import TIMEOUT, Run, Zygote, kill
from safetensors.torch import load_file

from conftest import REPO, ROWS
from processes import alive

LONG = os.environ.get("DPO_FAULTS") == "long"
SETTINGS = [
    "--model.max_new_tokens", "8", "--model.learning_rate", "1e-3", "--data.val_size", "4", "--data.test_size", "4",
    "--data.batch_size", "2", "--data.max_length", "128", "--trainer.accelerator", "cpu",
    "--trainer.precision", "32-true", "--replies.num_prompts", "1", "--last.every_n_steps", "1",
    "--rounds.judge", '{"regex": "[aeiou]$"}', "--rounds.samples", "4", "--rounds.count", "2",
    "--rounds.sft_epochs", "2",
]  # fmt: skip
# What a loop leaves, in its order: stage -> a file that is there when the stage has begun, or has got on.
LAST = "lightning_logs/version_*/checkpoints/last.ckpt"
STAGES = {
    "begin": "settings.json",
    "sft": "sft/fit.yaml",
    "saving, sft": f"sft/{LAST}",
    "held-out replies": "round-1/sample.yaml",
    "exported epoch": "start/epoch0",
    "samples, round 1": "start/start.json",
    "pairs, round 1": "round-1/samples.jsonl",
    "training, round 1": "round-1/fit.yaml",
    "saving, round 1": f"round-1/{LAST}",
    "samples, round 2": "round-2/sample.yaml",
    "pairs, round 2": "round-2/samples.jsonl",
    "training, round 2": "round-2/fit.yaml",
    "saving, round 2": f"round-2/{LAST}",
    "last replies": "round-2/model",
}


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """The process that loops and their stages are forked from."""
    zygote = Zygote()
    yield zygote
    zygote.close()


def newest_stage(run: Run) -> str:
    """How far a loop has come."""
    return [stage for stage, file in STAGES.items() if list((run.folder / "rounds").glob(file))][-1]


def killed(run: Run, stage: str, delay: float) -> bool:
    """Goes on with a loop, and kills it `delay` seconds after it has come to a stage; False if it has ended before."""
    pids, end = run.start(), time.monotonic() + TIMEOUT
    while not list((run.folder / "rounds").glob(STAGES[stage])) and alive(pids[0]) and time.monotonic() < end:
        time.sleep(0.002)
    end = min(end, time.monotonic() + delay)
    while time.monotonic() < end and alive(pids[0]):
        time.sleep(0.002)
    if lives := alive(pids[0]):
        kill(pids)
        run.kills.append(newest_stage(run))
    assert run.wait(pids) == [-9 if lives else 0], run.tail()
    return lives


@pytest.mark.skipif(not LONG, reason="in the long version only (DPO_FAULTS=long)")
def test_a_loop_killed_in_every_stage_ends_as_if_it_had_never_been_killed(zygote, tmp_path, model_folder, write_rows):
    args = ["rounds", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
    args += ["--data.train_dataset", write_rows(ROWS), *SETTINGS]
    twin = Run(zygote, tmp_path / "twin", args)
    assert twin.wait(twin.start()) == [0], twin.tail()
    wanted, seed, kills = int(os.environ.get("DPO_KILLS", "30")), 0, collections.Counter[str]()
    while kills.total() < wanted:
        seed += 1
        rng = random.Random(f"rounds {seed}")
        run = Run(zygote, tmp_path / f"run{seed}", args)
        # Each loop is killed in all stages, in some of them twice.
        for stage in sorted([*STAGES, *rng.sample(list(STAGES), 4)], key=list(STAGES).index):
            if len(run.kills) + kills.total() < wanted and not killed(run, stage, rng.uniform(0, 1.5)):
                break
        assert run.wait(run.start()) == [0], f"after kills in {run.kills}:\n{run.tail()}"
        kills.update(run.kills)
        check_same(run.folder / "rounds", twin.folder / "rounds", run.kills)
    print(f"\n{kills.total()} kills of {seed} loops: " + "; ".join(f"{stage} {kills[stage]}" for stage in STAGES))


def check_same(run: Path, twin: Path, kills: list[str]) -> None:
    """Compares the weights bitwise, and the replies, their scores and the pairs line by line."""
    for number in (1, 2):
        one, other = (load_file(folder / f"round-{number}" / "model" / "model.safetensors") for folder in (run, twin))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one), kills
    for name in ("samples.jsonl", "pairs.jsonl", "held-out.jsonl"):
        for number in (1, 2):
            assert lines(run / f"round-{number}" / name) == lines(twin / f"round-{number}" / name), (name, kills)
    samples = lines(run / "round-1" / "samples.jsonl")
    assert samples and all(len(line["replies"]) == 4 for line in samples)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
