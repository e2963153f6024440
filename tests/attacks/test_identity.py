"""A run is resumed from the weights that it began with, or not at all."""

import pytest
import torch

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.models.policy import load_policy
from ranks import run_ranks

FSDP = (
    "--trainer.devices", "2", "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1",
    "--trainer.strategy.save_distributed_checkpoint", "false",
)  # fmt: skip
DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
LORA = ("--model.lora", "{r: 2}")
MOVING = ("--model.sync_ref_model", "true", "--model.ref_model_sync_steps", "1")


@pytest.fixture
def model(tmp_path, model_folder, tokenizer):
    """A model folder of the test's own."""
    load_policy(str(model_folder)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def nudge(folder):
    """Changes one weight of a model by a little, and leaves all that a name or a date tells as it is."""
    policy = load_policy(str(folder))
    with torch.no_grad():
        policy.transformer.h[0].mlp.c_fc.weight[3, 5] += 1e-4
    policy.save_pretrained(folder)


@pytest.fixture
def fit(tmp_path, write_rows, monkeypatch):
    """Trains to a number of steps, with a checkpoint at its end."""
    monkeypatch.chdir(tmp_path)
    rows = write_rows(ROWS)

    def run(name, steps, *args, ranks=1):
        argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(name)]
        argv += ["--data.train_dataset", rows, "--data.val_size", "0", "--data.test_size", "0"]
        argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
        argv += ["--data.tokenizer", str(tmp_path / "model"), "--model.lr_scheduler_type", "constant"]
        argv += ["--model.warmup_steps", "0", "--replies.num_prompts", "1", "--export.enabled", "false"]
        argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        argv += ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps), *args]
        return main(argv) if ranks == 1 else run_ranks(ranks, lambda rank: main(argv))

    return run


def last(folder):
    (path,) = folder.rglob("last.ckpt")
    return path, torch.load(path, weights_only=True)


@pytest.mark.parametrize("args", [(), LORA, MOVING, ("--model.reference", "cached")], ids=str)
def test_another_starting_point_is_refused_in_one_line(fit, model, tmp_path, capsys, args):
    assert fit(model, 2, *args) == 0
    before = last(tmp_path)[0].read_bytes()
    nudge(model)
    assert fit(model, 4, *args, "--ckpt_path", "last") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"error: cannot resume: the weights of the model '{model}' have")
    assert "put the former weights back, or start anew without --ckpt_path" in line
    assert last(tmp_path)[0].read_bytes() == before


def test_the_same_weights_in_other_files_are_the_same(fit, model, tmp_path):
    assert fit(model, 2) == 0
    load_policy(str(model)).save_pretrained(model, max_shard_size="20KB")
    (model / "model.safetensors").unlink(missing_ok=True)
    assert fit(model, 4, "--ckpt_path", "last") == 0
    assert last(tmp_path)[1]["global_step"] == 4


@pytest.mark.parametrize("changed", ["adapter", "base"])
def test_an_adapter_that_trains_on_is_part_of_the_start(fit, model, tmp_path, capsys, changed):
    policy = load_policy(str(model), lora={"r": 2})
    policy.save_pretrained(tmp_path / "adapter")
    assert fit(tmp_path / "adapter", 2) == 0
    assert fit(tmp_path / "adapter", 3, "--ckpt_path", "last") == 0
    if changed == "base":
        nudge(model)
    else:
        with torch.no_grad():
            next(weight for name, weight in policy.named_parameters() if "lora_B" in name)[0, 0] += 1e-3
        policy.save_pretrained(tmp_path / "adapter")
    assert fit(tmp_path / "adapter", 4, "--ckpt_path", "last") == 2
    assert f"the weights of the model '{tmp_path / 'adapter'}' have changed" in capsys.readouterr().err


def test_a_checkpoint_without_a_starting_point_still_resumes(fit, model, tmp_path):
    """As they were written before there was one."""
    assert fit(model, 2) == 0
    path, checkpoint = last(tmp_path)
    assert checkpoint["dpo_lightning"].pop("start")
    torch.save(checkpoint, path)
    assert fit(model, 4, "--ckpt_path", "last") == 0
    assert last(tmp_path)[1]["dpo_lightning"]["start"]


@pytest.mark.parametrize("args", [DDP, FSDP, FSDP + LORA], ids=["ddp", "fsdp2", "fsdp2-lora"])
def test_several_processes_refuse_it_too_and_else_go_on(fit, model, tmp_path, args):
    assert fit(model, 2, *args, ranks=2) == [0, 0]
    assert fit(model, 3, *args, "--ckpt_path", "last", ranks=2) == [0, 0]
    nudge(model)
    assert fit(model, 4, *args, "--ckpt_path", "last", ranks=2) == [2, 2]
    assert last(tmp_path)[1]["global_step"] == 3


def test_a_model_that_was_loaded_before_the_trainer_has_its_starting_point(model, quiet_trainer, rows_file, tmp_path):
    digests = []
    for early in (True, False):
        module = DPOModule(str(model), warmup_steps=0)
        if early:
            module.configure_model()
        data = PreferenceDataModule(str(model), rows_file, batch_size=4, max_length=128, val_size=0, test_size=0)
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / "kept.ckpt")
        digests.append(torch.load(tmp_path / "kept.ckpt", weights_only=True)["dpo_lightning"]["start"])
    assert digests[0] and digests[0] == digests[1]
