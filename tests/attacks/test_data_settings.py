"""Settings of `data` that fail late, fill the memory or pass in silence: each is one line at the start."""

import logging
import math
import sys

import lightning
import pytest
import torch

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.errors import UserError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "data.seed is -1: it must be from 0 to 4294967295"),
        ({"seed": 2**40}, "data.seed is 1099511627776"),
        ({"val_size": math.nan}, "data.val_size is nan: it must be a share below 1 or a number of pairs"),
        ({"val_size": math.inf}, "data.val_size is inf"),
        ({"test_size": math.nan}, "data.test_size is nan"),
        ({"max_length": 10**20}, "data.max_length is 100000000000000000000"),
        ({"max_length": 0}, "data.max_length is 0: it must be at least 8"),
        ({"num_workers": 10**6}, "data.num_workers is 1000000: it must be from 0 to"),
        ({"eval_batch_size": 0}, "data.eval_batch_size is 0: it must be at least 1"),
        ({"eval_batch_size": -3}, "data.eval_batch_size is -3"),
        ({"batch_size": 10**12}, "data.batch_size is 1000000000000"),
    ],
)
def test_a_number_out_of_range_is_refused_at_once(tokenizer, options, message):
    with pytest.raises(UserError) as error:
        PreferenceDataModule(tokenizer, "rows.jsonl", **options)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


TEMPLATES = (
    "{question:d}",
    "{question:>9999999999}",
    "{question!r}",
    "{question!x}",
    "{question.__class__}",
    "{question[0]}",
    "{}",
    "{0}",
    "{question:{context}}",
    "{question",
    "question}",
    "{ question }",
)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("key", ["prompt_template", "completion_template"])
def test_a_template_holds_plain_fields_only(tokenizer, key, template):
    with pytest.raises(UserError, match=f"data.{key}") as error:
        PreferenceDataModule(tokenizer, "rows.jsonl", **{key: template})
    assert "\n" not in str(error.value)


def test_braces_of_the_text_are_written_twice(tokenizer, rows_file):
    template = '{{"context": {context}}} {question}'
    data = PreferenceDataModule(tokenizer, rows_file, prompt_template=template, val_size=2, test_size=2)
    data.setup("fit")
    assert data.pairs("train", [0])[0].prompt.startswith('{"context": CREATE TABLE')


@pytest.fixture
def fit(tmp_path, monkeypatch, model_folder, rows_file, capsys):
    """A run of one step on the command line; gives its exit code and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*args, command="fit"):
        argv = [command, "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
        argv += ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--model.max_new_tokens", "4"]
        argv += ["--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"]
        code = main([*argv, *args])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("args", [["--data.seed", "-1"], ["--data.prompt_template", "{question:d}"]])
def test_the_command_line_says_it_in_one_line(fit, args):
    code, _, err = fit(*args)
    assert code == 2 and f"error: {args[0][2:]}" in err


@pytest.mark.parametrize("command", ["fit", "inspect"])
def test_more_tokens_than_the_model_has_positions_are_refused(fit, command):
    code, _, err = fit("--data.max_length", "129", command=command)
    assert code == 2
    assert "error: data.max_length is 129, but this model has 128 positions: lower it to 128" in err


def test_a_length_that_nobody_set_is_lowered_and_said(fit, caplog):
    with caplog.at_level(logging.INFO):
        code, out, _ = fit(command="inspect")
    assert code == 0 and "to fit data.max_length = 128" in out
    assert "data.max_length: 128 tokens, which is what the tokenizer and the model can take" in caplog.text
    assert fit("--trainer.limit_val_batches", "0")[0] == 0


@pytest.fixture
def hint(tokenizer):
    """Changes what the tokenizer says of its length, for a test."""
    before = tokenizer.model_max_length
    yield lambda length: setattr(tokenizer, "model_max_length", length)
    tokenizer.model_max_length = before


def test_the_models_positions_count_and_the_tokenizers_number_is_a_hint(
    tokenizer, hint, rows_file, model_folder, quiet_trainer
):
    def trained(**options):
        data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=0, test_size=4, **options)
        quiet_trainer(max_steps=1).fit(DPOModule(str(model_folder)), data)
        return data.max_length

    hint(10**30)
    assert trained() == 128  # of the model
    with pytest.raises(UserError, match="data.max_length is 200, but this model has 128 positions"):
        trained(max_length=200)
    hint(64)
    assert trained() == 64
    assert trained(max_length=100) == 100  # asked for, and the model has room


def test_the_shipped_configurations_ask_for_no_more_than_their_models_have(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(REPO)
    demo = [
        "--config",
        "configs/demo.yaml",
        "--trainer.default_root_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
    ]
    assert main(["inspect", *demo]) == 0
    assert "to fit data.max_length = 512" in capsys.readouterr().out


SPEC = {"class_path": "strangers_class.Own"}


@pytest.mark.parametrize("settings", [{"tokenizer": SPEC}, {"generation": {"name_or_path": SPEC}}])
def test_no_class_that_a_checkpoint_names_is_imported(settings, tmp_path, monkeypatch):
    """With `_instantiator`, which LightningCLI writes, its parser would make the module and import such classes."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "strangers_class.py").write_text("class Own:\n    pass\n")
    settings |= {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
    checkpoint = {"pytorch-lightning_version": lightning.__version__, "datamodule_hyper_parameters": settings}
    torch.save(checkpoint, tmp_path / "given.ckpt")
    PreferenceDataModule.load_from_checkpoint(tmp_path / "given.ckpt")
    assert sys.modules.pop("strangers_class", None) is None
