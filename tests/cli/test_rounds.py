"""Rounds: every stage leaves its files, goes on where it was stopped, and refuses what would mix two settings."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from contextlib import suppress

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import REPO, ROWS
from dpo_lightning.cli import rounds
from dpo_lightning.cli.entry import main
from dpo_lightning.cli.entry import run as run_command
from dpo_lightning.cli.rounds_settings import Rounds
from dpo_lightning.cli.sample import write_lines
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.judging.sampling import JudgedReplies
from dpo_lightning.judging.verified import HeldOut
from vllm_stand_in import stand_in_command

JUDGES = '''
def parity(reply, pair):
    """Right or wrong, for no reason."""
    return len(reply.text) % 2 == 0


def pleased(reply, pair):
    return 1.0
'''


@pytest.fixture
def args(tmp_path, monkeypatch, model_folder, write_rows):
    """The arguments of a small loop in an empty folder: 18 prompts and 3 held-out ones, 2 rounds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "round_judges.py").write_text(JUDGES)
    settings = {
        "model.name_or_path": model_folder, "model.max_new_tokens": 5, "model.learning_rate": 1e-3,
        "data.train_dataset": write_rows(ROWS[::2]), "data.val_size": 4, "data.test_size": 4,
        "data.batch_size": 4, "data.max_length": 100, "trainer.accelerator": "cpu", "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false", "replies.num_prompts": 1, "last.every_n_steps": 1,
        "rounds.judge": "round_judges:parity", "rounds.samples": 3, "rounds.count": 2, "rounds.sft_epochs": 2,
    }  # fmt: skip
    named = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["rounds", "--config", str(REPO / "configs" / "gpt2.yaml"), *named]


@pytest.fixture
def in_process(monkeypatch):
    """Stages run in this process, which saves their start; gives the list of those that have run."""
    ran = []

    def stage(command, config, *more):
        ran.append((command, os.path.dirname(config)))
        run_command([command, "--config", config, *more])

    monkeypatch.setattr(rounds, "run_stage", stage)
    return ran


def weights(folder="rounds", number=2):
    """The weights that a round made."""
    return load_file(f"{folder}/round-{number}/model/model.safetensors")


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_a_loop_leaves_files_that_say_everything_and_a_second_call_does_nothing(args, in_process, capsys, monkeypatch):
    assert main(args) == 0
    assert [command for command, _ in in_process] == ["fit", "sample", "fit", "sample", "fit", "sample"]
    samples = lines("rounds/round-1/samples.jsonl")
    assert len(samples) == 18 and all(len(line["replies"]) == 3 for line in samples)
    reply = samples[0]["replies"][0]
    assert reply["score"] == (len(reply["text"]) % 2 == 0) and reply["logp"] < 0
    pairs, account = lines("rounds/round-1/pairs.jsonl"), json.loads(open("rounds/round-1/pairs.json").read())
    assert account["prompts"] == 18 == account["pairs"] + sum(account["left out"].values())
    assert len(pairs) == account["pairs"] and sum(account["samples"].values()) == 54
    answers = {line["prompt"]: line["chosen"] for line in samples}
    assert all(pair["chosen"] == answers[pair["prompt"]] and len(pair["rejected"]) % 2 for pair in pairs)
    table = json.loads(open("rounds/rounds.json").read())
    assert [line["model"] for line in table] == ["start", "round 1", "round 2"]
    assert all(line["judged"] == 3 for line in table)
    assert "turned right" in open("rounds/report.html").read()
    assert "replies to 3 held-out prompts" in capsys.readouterr().out
    # The model of a round begins as the one before, and knows how its prompts were made.
    fit = yaml.safe_load(open("rounds/round-2/fit.yaml"))
    assert fit["model"]["name_or_path"] == "rounds/round-1/model"
    assert "{question}" in json.loads(open("rounds/round-2/model/dpo_lightning.json").read())["prompt_template"]
    in_process.clear()
    assert main(args) == 0 and not in_process
    # The pairs are a data set like any other.
    fit = args[1 : args.index("--rounds.judge")] + ["--data.train_dataset", "rounds/round-1/pairs.jsonl"]
    assert main(["fit", *fit, "--data.val_size", "0", "--data.test_size", "0", "--trainer.max_steps", "1"]) == 0


@pytest.mark.slow
def test_a_loop_that_broke_in_every_stage_ends_with_the_same_weights(args, in_process, monkeypatch):
    assert main([*args, "--rounds.folder", "whole"]) == 0
    whole, calls = weights("whole"), {"steps": 0, "answers": 0}
    step, answer = DPOModule.training_step, JudgedReplies.lines
    answered = []

    def breaking(name, function, every):
        def call(*arguments):
            calls[name] += 1
            if calls[name] % every == 0:
                raise RuntimeError("broken")
            return function(*arguments)

        return call

    def counting(self, model, pairs, positions):
        found = answer(self, model, pairs, positions)
        answered.extend((self.generation.name_or_path, self.samples, position) for position in positions)
        return found

    # What the first loop has cached must not help.
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "cache2")
    monkeypatch.setattr(DPOModule, "training_step", breaking("steps", step, 4))
    monkeypatch.setattr(JudgedReplies, "lines", breaking("answers", counting, 5))
    breaks = 0
    while True:
        try:
            assert main(args) == 0
            break
        except RuntimeError:
            breaks += 1
    assert breaks >= 8
    assert len(answered) == len(set(answered)) == 3 * (2 + 2) + 18 * 2, "no reply is made twice"
    assert all(torch.equal(weight, whole[name]) for name, weight in weights().items())
    for name in ("samples.jsonl", "pairs.jsonl", "held-out.jsonl"):
        assert lines(f"rounds/round-2/{name}") == lines(f"whole/round-2/{name}")


def test_other_settings_data_or_files_are_refused(args, in_process, capsys, write_rows):
    short = [*args, "--rounds.count", "1", "--rounds.sft_epochs", "0"]
    assert main(short) == 0

    def error(*more):
        capsys.readouterr()
        assert main([*short, *more]) == 2
        return capsys.readouterr().err

    assert "error: rounds.temperature was 1.0 and is 0.5: set it back, or give another" in error(
        "--rounds.temperature", "0.5"
    )
    assert "error: model.beta was 0.1 and is 0.2" in error("--model.beta", "0.2")
    assert "rounds.chosen is 'mine': it must be one of data, own" in error("--rounds.chosen", "mine")
    assert "rounds.vllm: there is no command 'vlm': install vLLM" in error("--rounds.vllm", "vlm")
    assert "rounds.vllm: 'vllm \"' cannot be read: No closing quotation" in error("--rounds.vllm", 'vllm "')
    adapter = error("--rounds.vllm", sys.executable, "--model.lora.r", "4")
    assert "error: rounds.vllm takes complete models of 16 or 32 bits: leave out model.lora" in adapter
    with open("rounds/round-1/pairs.jsonl", "a") as file:
        file.write("\n")
    assert "error: 'rounds/round-1/pairs.jsonl' has changed since it was made" in error()
    write_rows(ROWS)
    assert "rows.jsonl' has changed since 'rounds' was begun" in error()
    os.mkdir("mine")
    open("mine/thesis.txt", "w").close()
    assert "error: rounds.folder 'mine' has other content" in error("--rounds.folder", "mine")


def test_another_round_goes_on_from_the_last(args, in_process):
    assert main([*args, "--rounds.count", "1"]) == 0
    in_process.clear()
    assert main(args) == 0
    assert in_process == [("sample", "rounds/round-2"), ("fit", "rounds/round-2"), ("sample", "rounds/round-2")]


def test_vllm_samples_where_rounds_name_its_command(args, in_process, tmp_path):
    args = [*args, "--rounds.count", "1", "--rounds.sft_epochs", "0", "--rounds.samples", "2"]
    assert main([*args, "--rounds.vllm", stand_in_command(tmp_path)]) == 0
    samples = lines("rounds/round-1/samples.jsonl")
    assert len(samples) == 18 and all(len(line["replies"]) == 2 for line in samples)
    assert all(one["text"] == other["text"] for one, other in (line["replies"] for line in samples)), "it is greedy"
    assert "loading" in open("rounds/round-1/vllm.log").read()
    assert all(reply["logp"] < 0 for line in samples for reply in line["replies"])


def test_rounds_on_prompts_without_answers_learn_from_the_models_own_right_replies(args, in_process, write_rows):
    rows = [{"question": row["question"], "context": row["context"]} for row in ROWS[1::2]]
    asked = write_rows(rows, "asked.jsonl")
    args = [*args, "--rounds.sft_epochs", "0", "--rounds.count", "1", "--rounds.prompt_dataset", asked]
    assert main(args) == 0
    samples, account = lines("rounds/round-1/samples.jsonl"), json.loads(open("rounds/round-1/pairs.json").read())
    assert len(samples) == len({row["question"] + row["context"] for row in rows})
    assert all(line["chosen"] == "" and "context" in line for line in samples)
    told_apart = [line for line in samples if {reply["score"] for reply in line["replies"]} == {0.0, 1.0}]
    assert account["pairs"] == len(told_apart) and account["left out"]["no right reply"]
    replies = {line["prompt"]: {reply["text"]: reply["score"] for reply in line["replies"]} for line in samples}
    for pair in lines("rounds/round-1/pairs.jsonl"):
        scores = replies[pair["prompt"]]
        assert scores[pair["chosen"]] == 1.0 and scores[pair["rejected"]] == 0.0
    assert all(line["wanted"] for line in lines("rounds/round-1/held-out.jsonl")), "held-out rows have answers"
    write_rows(rows[1:], "asked.jsonl")
    assert main(args) == 2


def test_without_a_wrong_reply_there_is_nothing_to_learn(args, in_process, caplog, model_folder):
    assert main([*args, "--rounds.judge", "round_judges:pleased", "--rounds.sft_epochs", "0"]) == 0
    assert "round 1: no prompt gives a pair to learn from (see rounds/round-1/pairs.json)" in caplog.text
    assert f"the model is {model_folder}" in caplog.text
    assert in_process == [("sample", "rounds/round-1")]


def test_the_best_epoch_is_the_one_with_the_best_replies(args, in_process):
    assert main([*args, "--rounds.count", "1", "--rounds.sft_epochs", "3"]) == 0
    start = json.loads(open("rounds/start/start.json").read())
    assert list(start["means"]) == [f"rounds/start/epoch{number}" for number in range(3)]
    assert start["means"][start["model"]] == max(start["means"].values())


@pytest.mark.parametrize(
    ("shares", "better"), [((2, 3, 1), 1), ((3, 1, 1), 0), ((1, 2, 2), None), ((0, 0, 0), None), ((1, 2, 2, 4), None)]
)
def test_a_round_that_made_replies_worse_is_named_with_the_model_to_use(tmp_path, shares, better):
    """Rounds after the last one asked for, which an earlier command made, do not count."""
    folders = [tmp_path / name for name in ("start", "round-1", "round-2", "round-3")][: len(shares)]
    for folder, right in zip(folders, shares, strict=True):
        folder.mkdir()
        replies = [HeldOut("p", "w", "r", True, float(number < right), {}) for number in range(4)]
        write_lines(folder / "held-out.jsonl", (reply._asdict() for reply in replies))
        (folder / "start.json").write_text(json.dumps({"model": f"{folder.name}/model"}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rounds.Loop(Rounds(folder=str(tmp_path), count=2), {})._conclude("round-2/model")
    worse = "round 2 is worse than {} (25.0% against 75.0% on the held-out prompts): use {}/model"
    expected = [] if better is None else [worse.format(["start", "round 1"][better], folders[better].name)]
    assert [str(warning.message) for warning in caught] == expected


# ------------------------------------------------------------------ whole commands


def command(args, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", *args], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | env,
    )  # fmt: skip


def stages_of(process):
    """The processes that a command has started and that still run."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "Z" not in line.split()[1]]


def wait_for(path, process):
    while not list(path.parent.glob(path.name)) and process.poll() is None:
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_in_each_stage_a_command_ends_with_the_same_weights(args, tmp_path):
    args = [*args, "--rounds.count", "1", "--rounds.sft_epochs", "1"]
    whole = command([*args, "--rounds.folder", "whole"], HF_DATASETS_CACHE=str(tmp_path / "other"))
    assert whole.wait() == 0
    checkpoint = "lightning_logs/version_*/checkpoints/last.ckpt"
    moments = [f"sft/{checkpoint}", "start/held-out.jsonl", f"round-1/{checkpoint}", "round-1/model"]
    for moment in moments:
        process = command(args)
        wait_for(tmp_path / "rounds" / moment, process)
        for pid in [*stages_of(process), process.pid]:
            with suppress(ProcessLookupError):  # a stage that has just ended
                os.kill(pid, signal.SIGKILL)
        process.wait()
    last = command(args)
    assert last.wait() == 0, last.stderr.read()
    expected = weights("whole", 1)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights("rounds", 1).items())
    assert lines("rounds/round-1/samples.jsonl") == lines("whole/round-1/samples.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_and_the_line_says_how_to_go_on(args, tmp_path, number):
    process = command(args)
    wait_for(tmp_path / "rounds/sft/lightning_logs/version_0/checkpoints/last.ckpt", process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    printed = process.stderr.read()
    assert re.search(
        r"to resume:\n    (python cli.py|python -m dpo_lightning|dpo-lightning) rounds --config", printed
    ), printed
    assert "--ckpt_path" not in printed.rpartition("to resume")[2]


@pytest.mark.slow
def test_a_stage_ends_when_only_its_command_is_killed(args, tmp_path):
    process = command(args)
    wait_for(tmp_path / "rounds/sft/lightning_logs/version_0/checkpoints/last.ckpt", process)
    stages = stages_of(process)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in stages) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert stages and not any(os.path.exists(f"/proc/{pid}") for pid in stages)


@pytest.mark.slow
def test_two_ranks_share_the_sampling(args, tmp_path):
    alone = command([*args, "--rounds.folder", "alone"], HF_DATASETS_CACHE=str(tmp_path / "other"))
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--rounds.count", "1", "--rounds.sft_epochs", "0"]
    assert alone.wait() == 0
    process = command([*args, *ranks])
    assert process.wait() == 0, process.stderr.read()
    samples = lines("rounds/round-1/samples.jsonl")
    assert len(samples) == 18 and all(len(line["replies"]) == 3 for line in samples)
