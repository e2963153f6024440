"""Another optimizer or schedule than AdamW with a warm-up: it trains as `model.*` says, and resumes bitwise."""

import functools
import sys

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR
from transformers.optimization import Adafactor

from attacked import LAST, command, edited, error_line
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.optimization import PlateauSchedule, make_optimizer
from dpo_lightning.dpo.resume import KEY, Resume
from dpo_lightning.errors import UserError

STAND_IN = """
import torch
class AdamW8bit(torch.optim.AdamW):  # bitsandbytes' signature
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, amsgrad=False, optim_bits=32):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(model, *args, steps=2):
    assert command("fit", model, "--trainer.max_steps", str(steps), "--export.enabled", "false", *args) == 0
    return torch.load(LAST, weights_only=True)


def groups(checkpoint):
    return checkpoint["optimizer_states"][0]["param_groups"]


# ---------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("RMSprop", []),
        ("RMSprop", ["--optimizer.lr", "0.01", "--optimizer.weight_decay", "0.2"]),  # its default, given on purpose
        ("torch.optim.Adafactor", []),
        ("transformers.optimization.Adafactor", []),
        ("standin8bit.AdamW8bit", []),
        ("AdamW", []),
    ],
)
def test_a_class_trains_with_the_runs_learning_rate_and_weight_decay(
    name, own, model_folder, elsewhere, tmp_path, monkeypatch
):
    (tmp_path / "standin8bit.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    constant = ["--model.learning_rate", "3e-4", "--model.weight_decay", "0.1", "--model.warmup_steps", "0"]
    checkpoint = run(model_folder, "--optimizer", name, *constant, *own)
    matrices, others = groups(checkpoint)
    assert {matrices["lr"], others["lr"]} == {0.01 if own else 3e-4}
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.2 if own else 0.1, 0.0)
    assert name != "AdamW" or matrices["fused"]
    assert not {"optimizer", "lr_scheduler"} & set(checkpoint["hyper_parameters"])
    written = yaml.safe_load((LAST.parent.parent / "config.yaml").read_text())
    assert ("lr" in written["optimizer"]["init_args"]) is bool(own), "a written config fixes no default"


def test_one_line_of_yaml_is_enough(model_folder, elsewhere, tmp_path):
    (tmp_path / "rmsprop.yaml").write_text("optimizer: RMSprop\n")
    checkpoint = run(model_folder, "--config", "rmsprop.yaml")
    assert checkpoint[KEY]["optimization"]["optimizer"] == "torch.optim.rmsprop.RMSprop"
    assert checkpoint[KEY]["optimization"]["optimizer.lr"] == 1e-5
    assert main(["export", "--ckpt_path", str(LAST), "--output_dir", "out"]) == 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizer", "RMSpro"], "did you mean 'RMSprop'?"),
        (["--optimizer", "SGD", "--optimizer.momentun", "0.9"], "optimizer.momentun: did you mean momentum?"),
        (["--optimizer", "SGD", "--optimizer.lr", "fast"], "optimizer.lr is 'fast': it must be a number"),
        (["--optimizer", "Rprop", "--model.weight_decay", "0.1"], "Rprop has no weight decay: set it to 0"),
        (["--optimizer", "LBFGS"], "the optimizer cannot be made: LBFGS doesn't support per-parameter options"),
        (["--model.optimizer", "SGD"], "there is no setting model.optimizer: did you mean optimizer?"),
        (["--lr_scheduler", "ReduceLROnPlateau"], "lr_scheduler.monitor is missing"),
        (["--lr_scheduler", "StepLR"], "lr_scheduler.step_size is missing"),
        (
            ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/loss", "--data.val_size", "0"],
            "ReduceLROnPlateau, which follows validations, but this run has none",
        ),
        (
            ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/los", "--trainer.max_steps", "8"],
            "lr_scheduler.monitor is 'val/los': it must be one of",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(args, words, model_folder, elsewhere, capsys):
    assert command("fit", model_folder, "--export.enabled", "false", *args) == 2
    assert words in error_line(capsys)


# ---------------------------------------------------------------------- resuming

COSINE = ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "6"]
PLATEAU = ["--lr_scheduler", "ReduceLROnPlateau", "--lr_scheduler.monitor", "val/loss", "--lr_scheduler.patience", "0"]


@pytest.mark.parametrize("args", [["--optimizer", "RMSprop"], COSINE, ["--optimizer", "SGD", *PLATEAU]])
def test_a_resumed_run_is_bitwise_the_same(args, model_folder, tmp_path, monkeypatch):
    args = [*args, "--model.learning_rate", "1e-3", "--trainer.val_check_interval", "2"]
    ends = []
    for name, stops in (("whole", [5]), ("resumed", [2, 5])):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        for steps in stops:
            more = ["--ckpt_path", "last"] if steps != stops[0] else []
            # the length of the run is that of the schedule, which none of these asks for
            checkpoint = run(model_folder, *args, *more, "--model.lr_scheduler_type", "constant", steps=steps)
        ends.append(checkpoint)
    assert ends[0]["global_step"] == ends[1]["global_step"] == 5
    for name, weight in ends[0]["state_dict"].items():
        assert torch.equal(weight, ends[1]["state_dict"][name]), name
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]


def test_another_optimizer_than_the_checkpoints_is_refused(model_folder, elsewhere, capsys):
    run(model_folder, "--optimizer", "RMSprop")
    for args, words in (
        ([], "optimizer was torch.optim.rmsprop.RMSprop, now it is torch.optim.adamw.AdamW"),
        (["--optimizer", "RMSprop", "--optimizer.momentum", "0.9"], "optimizer.momentum was 0.0, now it is 0.9"),
        (["--optimizer", "RMSprop", *COSINE], "lr_scheduler was torch.optim.lr_scheduler.LambdaLR, now it is"),
    ):
        assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "3", *args) == 2
        assert words in error_line(capsys)


def test_a_checkpoint_from_before_is_of_adamw(model_folder, tmp_path, elsewhere, capsys):
    saved = torch.load(edited(model_folder, tmp_path / "a.ckpt"), weights_only=True)[KEY]
    given = edited(model_folder, tmp_path / "b.ckpt", **{KEY: {n: v for n, v in saved.items() if n != "optimization"}})
    args = ["--ckpt_path", given, "--trainer.max_steps", "3", "--export.enabled", "false"]
    assert command("fit", model_folder, *args, "--optimizer", "RMSprop") == 2
    assert "optimizer was torch.optim.adamw.AdamW, now it is torch.optim.rmsprop.RMSprop" in error_line(capsys)
    assert command("fit", model_folder, *args) == 0


@pytest.mark.parametrize("setting", ["optimizer", "lr_scheduler", "reference"])
@pytest.mark.parametrize("name", ["fit", "test", "export"])
def test_a_checkpoint_names_no_class_to_import(setting, name, model_folder, tmp_path, elsewhere, monkeypatch, capsys):
    (tmp_path / "strangers.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef Own(*args): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    value = "strangers:Own" if setting == "reference" else "strangers.Own"
    given = edited(model_folder, tmp_path / "given.ckpt", {setting: value})
    if name == "export":
        code = main(["export", "--ckpt_path", given, "--output_dir", "out"])
        assert code == (0 if setting == "reference" else 2)  # it makes none
    else:
        assert command(name, model_folder, "--ckpt_path", given, "--trainer.max_steps", "3") == 2
        line = error_line(capsys)
        assert setting in line and (
            "has the unknown setting" in line
            or "must be one of online, cached" in line.replace("cached, online", "online, cached")
        )
    assert "strangers" not in sys.modules and not (tmp_path / "ran").exists()
    with pytest.raises(UserError, match=f"model.{setting} is "):
        DPOModule.load_from_checkpoint(given, map_location="cpu")
    assert "strangers" not in sys.modules


# ---------------------------------------------------------------------- Python


@pytest.fixture
def fit(model_folder, tokenizer, rows_file, quiet_trainer):
    def call(ckpt_path=None, module=None, callbacks=(), max_steps=3, sanity=0, **settings):
        module = module or DPOModule(str(model_folder), learning_rate=1e-3, warmup_steps=0, **settings)
        data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
        options = {"log_every_n_steps": 1, "num_sanity_val_steps": sanity}
        trainer = quiet_trainer(max_steps=max_steps, callbacks=list(callbacks), **options)
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return trainer

    return call


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (torch.optim.RMSprop, 1e-3),
        (functools.partial(torch.optim.SGD, lr=0.5), 0.5),
        (lambda params: torch.optim.SGD(params, lr=0.25), 0.25),  # whose default is the user's own business
        (Adafactor, 1e-3),
        (functools.partial(Adafactor, relative_step=True), None),
    ],
)
def test_an_optimizer_is_a_class_or_a_function(fit, optimizer, rate):
    trainer = fit(optimizer=optimizer, lr_scheduler=functools.partial(StepLR, step_size=100))
    assert trainer.optimizers[0].param_groups[0]["lr"] == rate
    assert trainer.callback_metrics.get("train/learning_rate") == (None if rate is None else pytest.approx(rate))


def test_configure_optimizers_may_be_overridden(fit, model_folder):
    class Own(DPOModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.policy.parameters(), lr=0.1)

    trainer = fit(module=Own(str(model_folder)))
    assert trainer.callback_metrics["train/learning_rate"] == pytest.approx(0.1)
    assert trainer.global_step == 3


def test_fused_only_where_it_is_known():
    def fused(kind):
        return make_optimizer(kind, torch.nn.Linear(2, 2), 1e-3, 0.0).defaults.get("fused")

    assert fused(torch.optim.AdamW) and fused(torch.optim.SGD)
    assert not fused(torch.optim.RMSprop) and not fused(functools.partial(torch.optim.Adam, foreach=True))


def test_a_plateau_moves_the_rate_once_a_validation(fit):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss", patience=0, factor=0.5, threshold=1e9)
    trainer = fit(optimizer=torch.optim.SGD, lr_scheduler=plateau, max_steps=11)  # one epoch, one validation
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_a_misspelt_validation_metric_is_refused_before_training(fit):
    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            pytest.fail("training started")

    with pytest.raises(UserError, match=r"lr_scheduler.monitor is 'val/los': .*; did you mean 'val/loss'"):
        fit(lr_scheduler=functools.partial(ReduceLROnPlateau, monitor="val/los"), sanity=1, callbacks=[Watch()])


def test_callbacks_are_restored_before_loops_and_the_module_brings_its_own(fit, tmp_path):
    order = []

    class Watch(Callback):
        def on_load_checkpoint(self, trainer, pl_module, checkpoint):
            order.append(("callback", trainer.global_step))

        def on_train_start(self, trainer, pl_module):
            order.append(("start", trainer.global_step))

    trainer = fit(callbacks=[Watch()], max_steps=2)
    assert [type(c) for c in trainer.callbacks if type(c) in (Resume, PlateauSchedule)] == [Resume, PlateauSchedule]
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    fit(ckpt_path=tmp_path / "two.ckpt", callbacks=[Watch()])
    assert order == [("start", 0), ("callback", 0), ("start", 2)]


def test_the_schedule_is_stepped_with_the_optimizer(fit):
    trainer = fit(lr_scheduler=functools.partial(CosineAnnealingLR, T_max=3))
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3
