"""`--memory`: what is chosen for which peaks, with peaks that are made up; and whole runs that stay below a limit."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import REPO, ROWS
from dpo_lightning.cli import memory
from dpo_lightning.cli.entry import main
from dpo_lightning.cli.memory import MARGIN, as_resumed, bytes_of, chosen, merged
from dpo_lightning.cli.peaks import Point, Probe, expected
from dpo_lightning.cli.probe import micro_batches
from dpo_lightning.errors import UserError

GIB = 2**30
TRIMMED = {"trainer": {"callbacks": [memory.TRIM]}}
# Prints the peak of a command in KiB: that of a process counts the program which started it, so this is a small one.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, used = os.wait4(process.pid, 0)
print(used.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
CONFIG = {"model": {"lora": None, "reference": None}, "data": {"batch_size": 16}, "trainer": {}}


@pytest.fixture
def machine(monkeypatch):
    """A machine on which a run takes `base` and 0.5 GiB a pair; cached log-probs and checkpointing take less."""
    probed = []

    def make(base, ends_at=0.0, trained=GIB // 16):
        def measured(config, limit, parts=1, timed=0):
            probed.append((config, parts))
            fixed, slope = base, 0.5
            fixed -= 1.0 if config["model"].get("reference") == "cached" else 0
            slope -= 0.4 if config["model"].get("gradient_checkpointing") else 0
            facts = {"spare_copy": config["model"].get("reference") is None, "can_recompute": True, "pairs": 16}
            points = []
            for pairs in (1, 2, 4, 8, 16):
                if 16 // pairs < parts or points and expected(points, 100 * pairs) > limit:
                    break
                points.append(Point(16 // pairs, pairs, 100 * pairs, int(GIB * (fixed + slope * pairs))))
            peak = max(points[-1].bytes, int(GIB * ends_at))
            return Probe(facts | {"tokens": 1600, "trained": trained}, points, [], peak)

        monkeypatch.setattr(memory, "measured", measured)
        return probed

    return make


@pytest.mark.parametrize(
    ("text", "number"), [("8GiB", 8 * GIB), ("1.5 gib", 3 * GIB // 2), ("900MB", 900_000_000), ("2TB", 2 * 10**12)]
)
def test_sizes(text, number):
    assert bytes_of(text) == number


@pytest.mark.parametrize("text", ["8", "8G", "0GiB", "much", "-1GiB", "1e3GiB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match=f"^memory is '{text}': it must be a size such as 8GiB or 900MB$"):
        bytes_of(text)


def test_a_run_that_fits_is_not_changed(machine):
    probed = machine(base=1.0)
    choice = chosen(CONFIG, 12 * GIB)
    assert choice.changes == TRIMMED and len(probed) == 1
    assert choice.lines == ["memory: about 9 GiB at the peak of the 12 GiB that are allowed, so nothing is changed"]


def test_micro_batches_come_first_and_keep_the_pairs_of_a_step(machine):
    probed = machine(base=1.0)
    choice = chosen(merged(CONFIG, {"trainer": {"accumulate_grad_batches": 3}}), 6 * GIB)
    assert choice.changes == merged(TRIMMED, {"data": {"batch_size": 8}, "trainer": {"accumulate_grad_batches": 6}})
    assert len(probed) == 1  # 16 pairs were expected to take too much, and not tried
    assert choice.lines[0] == "memory: 16 pairs at once would take about 9 GiB of 6 GiB"
    assert "8 pairs at once and 6 such micro-batches per step" in choice.lines[1]


def test_very_small_micro_batches_come_after_what_else_keeps_the_result(machine):
    probed = machine(base=2.6)
    cached = chosen(CONFIG, 4 * GIB)  # 3.63 with the margin: one pair alone would fit
    assert cached.changes["model"] == {"reference": "cached"} and cached.changes["data"] == {"batch_size": 4}
    assert len(probed) == 2
    both = chosen(CONFIG, 3 * GIB)
    assert both.changes["model"] == {"reference": "cached", "gradient_checkpointing": True}
    assert both.changes["data"] == {"batch_size": 8} and "gradient checkpointing" in both.lines[-2]


def test_the_end_of_a_run_counts(machine, monkeypatch):
    """A probe that was ended, or that tried too large a size, says nothing of the size before."""
    machine(base=1.0)
    whole, probes = memory.measured, []

    def measured(config, limit, parts=1, timed=0):
        probe = whole(config, limit, parts)
        probes.append(parts)
        return probe if len(probes) > 1 else probe._replace(peak=None)

    monkeypatch.setattr(memory, "measured", measured)
    assert chosen(CONFIG, 6 * GIB).point.pairs == 8 and probes == [1, 2]


def test_what_does_not_fit_is_refused_with_the_closest_that_would(machine):
    machine(base=5.0, trained=GIB // 8)
    with pytest.raises(UserError) as error:
        chosen(CONFIG, 4 * GIB)
    needed = MARGIN * (5.0 - 1.0 + 0.1)
    assert str(error.value).startswith("memory is 4 GiB, but with the smallest micro-batches and all else that keeps")
    assert f"the run takes {needed:.3g} GiB: allow that much" in str(error.value)
    assert f"Adafactor (about {needed - 1:.3g} GiB)" in str(error.value)
    assert f"--config lora (about {needed - 1.5:.3g} GiB)" in str(error.value)


def test_the_peak_is_a_line_through_the_largest_sizes():
    points = [Point(4, 1, 100, 900), Point(2, 2, 200, 1000), Point(1, 4, 400, 1400)]
    assert expected(points, 800) == 2200 and expected(points[:1], 800) == 900


def test_sizes_of_micro_batches():
    lengths = np.array([50, 40, 30, 20, 10, 5])
    assert micro_batches(lengths, 6, None) == [(6, 1, 50), (3, 2, 90), (2, 3, 120), (1, 6, 155)]
    assert micro_batches(lengths, 16, 210) == [(4, 1, 50), (2, 2, 90), (1, 4, 140)]


def test_a_users_own_callbacks_stay():
    own = {"class_path": "lightning.pytorch.callbacks.Timer"}
    for given in (own, [own]):
        assert memory.trimming(merged(CONFIG, {"trainer": {"callbacks": given}})) == {
            "trainer": {"callbacks": [own, memory.TRIM]}
        }
    assert memory.trimming(merged(CONFIG, TRIMMED)) == {}


def test_a_resumed_run_keeps_its_micro_batches():
    assert as_resumed(CONFIG, {"batch_size": 4})["trainer"] == {"accumulate_grad_batches": 4}
    tokens = merged(CONFIG, {"data": {"batch_tokens": 4096}})
    assert as_resumed(tokens, {"batch_size": 16, "batch_tokens": 1024})["data"] == {"batch_tokens": 1024}
    assert as_resumed(CONFIG, {"batch_size": 16}) == as_resumed(CONFIG, {"batch_size": "x"}) == {}


def test_fit_takes_what_was_chosen_and_a_resumed_fit_takes_it_again(
    machine, model_folder, rows_file, tmp_path, monkeypatch, capsys
):
    probed = machine(base=1.0)
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--config", "gpt2", "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
    args += ["--data.max_length", "64", "--data.val_size", "4", "--data.test_size", "0", "--memory", "6GiB"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--forgetting.enabled", "false"]
    args += ["--replies.num_prompts", "1", "--model.max_new_tokens", "2", "--model.reference", "online"]
    assert main([*args, "--trainer.max_steps", "2"]) == 0
    (sent, _) = probed.pop()
    assert "memory" not in sent and sent["data"]["batch_size"] == 16
    saved = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert (saved["data"]["batch_size"], saved["trainer"]["accumulate_grad_batches"], saved["memory"]) == (8, 2, None)
    assert [callback["class_path"] for callback in saved["trainer"]["callbacks"]] == [memory.TRIM["class_path"]]
    assert main([*args, "--trainer.max_steps", "3", "--ckpt_path", "last"]) == 0
    assert not probed and "batch_size" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("width", "layers", "batch"), [(64, 2, 96), (256, 4, 32), (384, 6, 16)])
def test_the_peak_of_a_run_stays_below(width, layers, batch, tokenizer, tmp_path):
    """Whole commands, with their interpreter, libraries, replies, checkpoints and export."""
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_layer": layers, "n_head": width // 64, "n_positions": 512}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "model")
    longer = copy.deepcopy(tokenizer)
    longer.model_max_length = 512
    longer.save_pretrained(tmp_path / "model")
    rows = [row | {"context": " ".join([row["context"]] * (1 + i % 12))} for i, row in enumerate(ROWS * 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row | {"weight": 1}) + "\n" for row in rows))
    config = {
        "model": {"name_or_path": str(tmp_path / "model"), "max_new_tokens": 8},
        "data": {"train_dataset": str(tmp_path / "rows.jsonl"), "batch_size": batch, "val_size": 4, "test_size": 0},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path)},
        "replies": {"num_shown": 0, "every_n_steps": 4},
    }
    points = memory.measured(config, 64 * GIB).points
    limit = int(MARGIN * (points[0].bytes + points[-1].bytes) / 2)
    assert MARGIN * points[-1].bytes > limit + 50_000_000  # or there is nothing to choose
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(REPO / "cli.py"), "fit", "--config", str(tmp_path / "run.yaml")]
    command = [sys.executable, "-c", MEASURE, *command, "--memory", f"{limit / 10**6}MB"]
    peak = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    assert int(peak) * 1024 <= limit
    saved = yaml.safe_load(next(Path(tmp_path).glob("lightning_logs/*/config.yaml")).read_text())
    assert saved["data"]["batch_size"] < batch
    assert saved["data"]["batch_size"] * saved["trainer"]["accumulate_grad_batches"] == batch
