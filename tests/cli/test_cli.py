"""The command line as a user meets it: whole runs, and mistakes that end in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from attacked import error_line
from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.losses import LOSSES
from dpo_lightning.errors import UserError
from dpo_lightning.models import hardware

GPT2 = str(REPO / "configs" / "gpt2.yaml")
LORA = str(REPO / "configs" / "lora.yaml")


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, rows_file):
    """Runs a command in an empty folder with the founding configuration, the tiny model and the small rows."""
    monkeypatch.chdir(tmp_path)

    def call(command, *args, configs=(GPT2,)):
        argv = [command, *(arg for config in configs for arg in ("--config", config))]
        argv += ["--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
        argv += ["--data.val_size", "4", "--data.test_size", "4", "--data.batch_size", "4", "--data.max_length", "128"]
        argv += ["--model.max_new_tokens", "8", "--trainer.accelerator", "cpu"]
        return main([*argv, *args])

    return call


def test_fit_leaves_everything_behind_and_the_rest_works_on_it(run, tmp_path, capsys, caplog):
    assert run("fit") == 0
    printed = capsys.readouterr().out
    assert "precision: " in caplog.text
    assert "Replies, before training" in printed and "Replies, step 10" in printed
    folder = tmp_path / "lightning_logs" / "version_0"
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "last.ckpt" in names and len(names) == 2
    assert (folder / "config.yaml").is_file()
    last = str(folder / "checkpoints" / "last.ckpt")
    assert not any("reference" in key for key in torch.load(last, weights_only=True)["state_dict"])

    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "val/loss", "train/rewards/margins", "train/pairs_per_second", "replies/sql/valid"} <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == [4, 9]

    model = AutoModelForCausalLM.from_pretrained(folder / "huggingface")
    assert main(["export", "--ckpt_path", last, "--output_dir", str(tmp_path / "exported")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())

    for command in ("validate", "test"):
        assert run(command, "--ckpt_path", last) == 0
    assert "test/rewards/margins" in capsys.readouterr().out
    assert run("predict", "--ckpt_path", last, "--predictions.output", "replies.jsonl") == 0
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) >= 4


def test_rows_that_may_have_been_trained_on_are_not_tested_without_a_warning(run, tmp_path, recwarn):
    assert run("fit", "--trainer.max_steps", "1", "--replies.num_prompts", "1") == 0
    last = str(tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt")
    assert run("test", "--ckpt_path", last) == 0
    assert not [w for w in recwarn if "trained on" in str(w.message)]
    assert run("test", "--ckpt_path", last, "--data.test_size", "8") == 0
    assert [str(w.message) for w in recwarn if "trained on" in str(w.message)] == [
        "some rows of this test may have been trained on, because they are split off otherwise than in the run of "
        f"'{last}': data.test_size was 4.0 and is 8.0"
    ]


def test_lora_overlay_writes_an_adapter_and_its_checkpoint_needs_no_overlay(run, tmp_path, caplog):
    assert run("fit", "--export.merge", "true", configs=(GPT2, LORA)) == 0
    folder = tmp_path / "lightning_logs" / "version_0"
    last = folder / "checkpoints" / "last.ckpt"
    assert (folder / "huggingface" / "model.safetensors").is_file()
    assert all("lora_" in key for key in torch.load(last, weights_only=True)["state_dict"])
    assert run("test", "--ckpt_path", str(last)) == 0
    assert "lora = {'r': 16, 'lora_alpha': 32, 'target_modules': 'all-linear'}" in caplog.text


def test_a_second_run_gets_a_folder_of_its_own(run, tmp_path):
    for _ in range(2):
        assert run("fit", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "0") == 0
    assert {path.name for path in (tmp_path / "lightning_logs").iterdir()} == {"version_0", "version_1"}


def test_without_validation_data_the_last_checkpoint_is_kept(run, tmp_path):
    assert run("fit", "--data.val_size", "0", "--trainer.max_steps", "2") == 0
    assert (tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model.betaa", "0.2"], ["betaa"]),
        (["--model.beta", "much"], ["beta", "much"]),
        (["--model.beta", "0"], ["model.beta is 0", "above 0"]),
        (["--model.loss_type", "sigmoyd"], ["sigmoyd", f"it is one of {', '.join(LOSSES)}"]),
        (["--data.train_dataset", "nowhere.jsonl"], ["nowhere.jsonl", "no such file"]),
        (["--data.train_dataset", "someone/some-data"], ["dataset 'someone/some-data'", "hub cannot be reached"]),
        (["--model.name_or_path", "./nowhere"], ["'./nowhere'", "no such folder"]),
        (["--model.name_or_path", "gpt2"], ["'gpt2'", "hub cannot be reached", "download", "local"]),
        (["--data.format", "preference"], ["column 'prompt', 'chosen', 'rejected' is missing"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
        (["--trainer.precision", "bf17"], ["precision", "bf17"]),
        (["--trainer.accelerator", "abacus"], ["abacus"]),
        (["--replies.num_prompts", "0"], ["replies.num_prompts is 0: it must be at least 1"]),
        (["--data.max_length", "1024", "--data.tokenizer", "./nowhere"], ["tokenizer './nowhere'", "no such folder"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(run, capsys, args, words):
    assert run("fit", *args) == 2
    line = error_line(capsys)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "fit",
            "model.name_or_path is missing: give --config NAME or FILE, such as --config gpt2, or --model.name_or_path",
        ),
        ("chat", "model is missing: give --model VALUE"),
        ("export", "ckpt_path is missing: give --ckpt_path VALUE"),
    ],
)
def test_a_command_without_what_it_needs_says_so(capsys, command, words):
    assert main([command]) == 2
    assert words in error_line(capsys)


def test_a_missing_column_names_file_and_columns(run, capsys, write_rows):
    path = write_rows([{"question": "q", "sql": "s"}], "bad.jsonl")
    assert run("fit", "--data.train_dataset", path) == 2
    line = error_line(capsys)
    assert path in line and "'question', 'sql'" in line


def test_a_damaged_checkpoint_is_one_line(run, capsys, tmp_path):
    (tmp_path / "bad.ckpt").write_bytes(b"not a checkpoint")
    assert run("test", "--ckpt_path", "bad.ckpt") == 2
    assert "'bad.ckpt' is not a readable checkpoint" in error_line(capsys)
    assert main(["export", "--ckpt_path", "bad.ckpt", "--output_dir", "out"]) == 2
    assert "bad.ckpt" in error_line(capsys)


def test_debug_shows_the_traceback(run):
    with pytest.raises(UserError):
        run("fit", "--model.beta", "0", "--debug")


def test_help_and_a_mistyped_command_import_nothing_heavy():
    code = "\n".join(
        [
            "import sys",
            "from dpo_lightning.cli.entry import main",
            "status = main(sys.argv[1:])",
            "assert 'torch' not in sys.modules",
            "sys.exit(status)",
        ]
    )
    for args, status, words in (
        (["--help"], 0, "predict"),
        ([], 2, "usage: "),
        (["fti"], 2, "error: unknown command 'fti': did you mean fit?"),
        (["dance"], 2, "it is one of demo, "),
    ):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        assert words in done.stdout + done.stderr


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, precision in (({"avx2"}, "32-true"), ({"amx_bf16"}, "bf16-mixed"), ({"avx512_bf16"}, "bf16-mixed")):
        monkeypatch.setattr(hardware, "cpu_flags", lambda flags=flags: flags)
        assert hardware.fastest_precision()[0] == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert hardware.fastest_precision()[0] == "32-true"
    assert hardware.fastest_precision("cpu")[0] == "bf16-mixed"


def test_download_then_local_overlay_runs_without_the_hub(run, tmp_path, model_folder, capsys):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "hub" / "sql-create-context"))
    (tmp_path / "hub" / "gpt2").symlink_to(model_folder)
    names = ["--model.name_or_path", "hub/gpt2", "--data.train_dataset", "hub/sql-create-context"]
    assert main(["download", "--config", GPT2, "--output_dir", "offline", *names]) == 0
    printed = capsys.readouterr().out
    for folder in ("tokenizer/hub/gpt2", "model/hub/gpt2", "dataset/hub/sql-create-context"):
        assert (tmp_path / "offline" / folder).is_dir()
        assert f"written to offline/{folder}" in printed
    saved = ["--model.name_or_path", "offline/model/hub/gpt2", "--data.tokenizer", "offline/tokenizer/hub/gpt2"]
    saved += ["--data.train_dataset", "offline/dataset/hub/sql-create-context", "--trainer.max_steps", "1"]
    assert run("fit", *saved) == 0


def start(*args, cwd, **env):
    return subprocess.Popen(
        [sys.executable, str(REPO / "cli.py"), *args],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
        # A test run in the background of a shell would hand "ignore Ctrl-C" down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_an_unreachable_hub_is_said_within_15_seconds(tmp_path):
    # No HF_HUB_OFFLINE: the probe itself must find out. The address is this machine's own discard port.
    began = time.monotonic()
    process = start("fit", "--config", GPT2, cwd=tmp_path, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in stderr
    assert "hub cannot be reached" in last and "download" in last and "local" in last
    print(f"took {time.monotonic() - began:.1f} s")  # told, not asserted: the machine may be busy


def test_ctrl_c_ends_without_a_traceback_or_half_an_export(tmp_path, model_folder, write_rows):
    rows = write_rows(ROWS * 20)
    process = start(
        "fit", "--config", GPT2, "--model.name_or_path", str(model_folder), "--data.train_dataset", rows,
        "--data.max_length", "128", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1000", cwd=tmp_path,
    )  # fmt: skip
    for line in process.stdout:
        if "Replies, step 20" in line:
            break
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in stderr and "which is saved; to resume:" in stderr
    assert list(Path(tmp_path).glob("lightning_logs/*/checkpoints/last.ckpt"))
    assert not list(Path(tmp_path).glob("lightning_logs/*/huggingface*"))


def test_config_written_by_a_run_can_be_run_again(run, tmp_path):
    assert run("fit", "--trainer.max_steps", "1") == 0
    config = tmp_path / "lightning_logs" / "version_0" / "config.yaml"
    assert main(["fit", "--config", str(config)]) == 0
    assert (tmp_path / "lightning_logs" / "version_1" / "huggingface").is_dir()
