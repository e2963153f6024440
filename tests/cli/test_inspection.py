"""`inspect` through the command line: what it prints is what training gets."""

import numpy as np
import pytest
import yaml

from conftest import REPO, ROWS
from dpo_lightning import PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.cli.inspect import histogram, padding


@pytest.fixture
def inspect(tmp_path, monkeypatch, model_folder, write_rows, capsys):
    """Runs the command on the founding rows and some that are not right; gives what it printed."""
    monkeypatch.chdir(tmp_path)
    path = write_rows([*ROWS, ROWS[3], "{", ROWS[0] | {"answer": None}])

    def call(*args, code=0):
        argv = ["inspect", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", path, "--data.val_size", "4", "--data.test_size", "4"]
        argv += ["--data.batch_size", "4", "--data.max_length", "64", "--trainer.accelerator", "cpu"]
        assert main([*argv, *args]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


def test_it_says_what_will_be_trained_on(inspect, tokenizer, tmp_path):
    printed = inspect(
        "--data.on_bad_row", "skip", "--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2"
    )
    rows = f"{tmp_path}/rows.jsonl"
    assert f"{rows}: 51 rows read, 48 pairs\n" in printed
    assert (
        f"  skipped: 1 repeated row\n    {rows}, line 49\n  skipped: 1 not JSON\n    {rows}, line 50: not valid"
        in printed
    )
    assert f"  skipped: 1 null\n    {rows}, line 51, column 'answer': found null" in printed
    assert "train: 40 pairs, 20 different contexts" in printed and "val: 4 pairs, 2 different contexts" in printed
    assert "train, tokens of rejected: 1 to 1, median 1, mean 1.0, 40 in total" in printed
    assert "prompts cut to fit data.max_length = 64: 0 (0.0%)" in printed
    assert f"⟦<|endoftext|>⟧\n{rows}, line " in printed and printed.count("  chosen    ⟦ SELECT ") == 3
    assert "an epoch has 10 batches of 4 pairs on each of 1 devices; at 2 per step the run has 15 steps" in printed
    assert "--time true" in printed and "warning:" not in printed
    assert not list(tmp_path.glob("lightning_logs"))


def test_steps_with_a_number_of_tokens_per_batch_are_those_of_the_sampler(inspect, tokenizer, write_rows):
    printed = inspect(
        "--data.on_bad_row", "skip", "--data.batch_tokens", "150", "--trainer.max_epochs", "3", "--rows", "0"
    )
    data = PreferenceDataModule(tokenizer, write_rows(ROWS), val_size=4, test_size=4, max_length=64, batch_tokens=150)
    data.setup("fit")
    sizes = [batch.num_pairs for batch in data.train_dataloader()]
    assert sum(sizes) == 40 and len(set(sizes)) > 1
    words = f"an epoch has {len(sizes)} batches of up to 150 tokens on each of 1 devices; at 1 per step the run has"
    assert f"{words} {3 * len(sizes)} steps" in printed


def test_a_pair_that_is_longer_than_a_batch_is_named(inspect, tmp_path):
    line = inspect("--data.on_bad_row", "skip", "--data.batch_tokens", "20", code=2)
    assert f"error: data.batch_tokens is 20, but the pair of {tmp_path}/rows.jsonl, line " in line
    assert "set it to " in line and line.count("\n") == 1


def test_several_data_sets_can_be_named_in_yaml_and_on_the_command_line(inspect, tmp_path, write_rows):
    write_rows([{"prompt": f"p {i}", "chosen": "c", "rejected": "r"} for i in range(20)], "other.jsonl")
    (tmp_path / "mix.yaml").write_text("data:\n  train_dataset: {rows.jsonl: 0.5, other.jsonl: 2}\n")
    by_yaml = inspect("--data.on_bad_row", "skip", "--data.train_dataset", "null", "--config", "mix.yaml")
    assert "rows.jsonl: 51 rows read, 48 pairs" in by_yaml and "other.jsonl: 20 rows read, 20 pairs" in by_yaml
    by_hand = inspect("--data.on_bad_row", "skip", "--data.train_dataset", "[rows.jsonl, other.jsonl]")
    assert "train: 60 pairs" in by_hand and "train: 60 pairs" not in by_yaml


def test_prompts_that_end_in_a_blank_are_pointed_out(inspect):
    settings = yaml.safe_load((REPO / "configs" / "founding.yaml").read_text())["data"]
    templates = {f"--data.{name}": settings[name] for name in ("prompt_template", "completion_template")}
    printed = inspect("--data.on_bad_row", "skip", *(part for pair in templates.items() for part in pair))
    assert "warning: the prompts of 40 of 40 rows (100%) end in a blank" in printed
    assert 'data.completion_template: " {answer}"' in printed


def test_a_bad_row_ends_it_as_it_would_end_training(inspect, tmp_path):
    assert f"error: {tmp_path}/rows.jsonl, line 50: not valid JSON" in inspect(code=2)


def test_time_is_measured_on_real_steps(inspect):
    printed = inspect(
        *"--data.on_bad_row skip --time true --rows 0 --trainer.max_steps 7 --trainer.precision 32-true".split()
    )
    assert "the run has 7 steps; about " in printed and "s a step (measured over 4 steps" in printed
    assert "this model takes batches with padding" in printed
    assert "⟦" not in printed


def test_cut_shares_and_padding_are_those_of_the_batches(tokenizer, rows_file):
    data = PreferenceDataModule(tokenizer, rows_file, val_size=0, test_size=0, batch_size=5, max_length=30)
    data.setup("fit")
    real, read = 0, 0
    for batch in data.train_dataloader():
        real += int((batch.segment_ids >= 0).sum())
        read += batch.segment_ids.numel()
    assert padding(data) == pytest.approx(1 - real / read)


def test_histogram_counts_every_value_once():
    title, *lines = histogram("lengths", np.array([1, 1, 1, 2]))
    assert title == "lengths: 1 to 2, median 1, mean 1.2, 5 in total"
    assert [line.split() for line in lines] == [["1", "3", "█" * 40], ["2", "1", "█" * 14]]
    values = np.arange(5, 105)
    assert sum(int(line.split()[1]) for line in list(histogram("", values))[1:]) == 100
