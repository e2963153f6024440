import functools
import json
import math
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback, displacement_warnings, reply_warnings
from dpo_lightning.callbacks.replies import RepliesCallback, Showing
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.errors import UserError
from ranks import run_ranks


@pytest.fixture
def module(model_folder):
    return DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-4, warmup_steps=2)


@pytest.fixture
def data(tokenizer, rows_file):
    return PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)


@pytest.fixture
def fit(quiet_trainer, module, data):
    """Runs a few steps and gives what the guards said."""

    def run(*callbacks, guards=None, **options):
        defaults = {"max_steps": 6, "log_every_n_steps": 2, "limit_val_batches": 0, "gradient_clip_val": 1.0}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            quiet_trainer(callbacks=[guards or GuardsCallback(), *callbacks], **defaults | options).fit(module, data)
        return [str(warning.message) for warning in caught if "guards.py" in str(warning.filename)]

    return run


class At(Callback):
    """Does something right before a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step + 1 == self.step:
            self.action(pl_module)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", ["sigmoid", "sft"]])
@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_healthy_run_is_left_alone(fit, module, loss_type, lora, model_folder):
    module.__init__(str(model_folder), loss_type=loss_type, lora=lora, learning_rate=1e-4)
    assert fit(RepliesCallback(every_n_steps=2, num_prompts=2, num_shown=0)) == []


def change_weights(module):
    with torch.no_grad():
        for weight in module.policy.parameters():
            weight.mul_(1.2)


def test_a_policy_that_is_not_its_reference_is_noticed(fit):
    (warning,) = fit(At(1, change_weights), max_steps=2)
    assert "policy and reference are not the same model" in warning and "equal models give 0.6931" in warning
    assert "load both from the same weights" in warning


def test_dropout_that_nobody_sees_is_noticed(fit):
    def drop(module):
        module.policy.transformer.wte.register_forward_hook(
            lambda _, __, output: torch.nn.functional.dropout(output, 0.3)
        )

    (warning,) = fit(At(1, drop), max_steps=2)
    assert "drops something at random (dropout)" in warning and "set it to 0" in warning


def test_a_resumed_run_may_differ_from_its_reference(fit, module, data, quiet_trainer, tmp_path, model_folder):
    first = quiet_trainer(max_steps=4, callbacks=[ModelCheckpoint(tmp_path, "four", every_n_train_steps=4)],
                          enable_checkpointing=True, limit_val_batches=0)  # fmt: skip
    module.hparams.learning_rate = 1e-2
    first.fit(module, data)
    again = DPOModule(str(model_folder), learning_rate=1e-4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not the same model.*")
        trainer = quiet_trainer(max_steps=6, callbacks=[GuardsCallback()], limit_val_batches=0)
        trainer.fit(again, data, ckpt_path=tmp_path / "four.ckpt")


def test_nothing_to_train_is_an_error(fit, module):
    module.configure_model()
    module.policy.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is trainable.*unfreeze"):
        fit()


def test_completions_without_eos_are_counted(fit, data):
    data.setup("fit")
    data.datasets["train"] = data.datasets["train"].map(lambda row: {"chosen_ids": row["chosen_ids"][:-1]})
    (warning,) = fit(max_steps=1)
    assert warning.startswith("4 of the 4 pairs of the first batch") and "not taught to stop" in warning


def test_displacement_is_said_once_with_its_remedy(fit):
    said = fit(At(3, change_weights), max_steps=10)
    (warning,) = [warning for warning in said if "likelihood displacement" in warning]
    assert warning.startswith("step 4: the chosen completion of ")
    assert all(remedy in warning for remedy in ("model.learning_rate", "model.beta", "[sigmoid, sft]"))


def test_displacement_during_warmup_is_not_said(fit, module):
    module.hparams.warmup_steps = 100
    assert fit(At(3, change_weights), max_steps=10) == []


def test_a_schedule_of_ones_own_has_no_warmup(fit, module):
    module.hparams.warmup_steps = 100
    module.make_scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=100)
    assert any("likelihood displacement" in warning for warning in fit(At(3, change_weights), max_steps=10))


def change_beginnings(data):
    """Makes first tokens of chosen completions less likely, and all that they have in common more likely."""
    data.setup("fit")
    chosen = data.datasets["train"]["chosen_ids"][:]
    first = sorted({ids[0] for ids in chosen})
    common = sorted(set.intersection(*(set(ids[1:-1]) for ids in chosen)) - set(first))

    def change(module):
        def hook(_, __, logits):
            shift = torch.zeros(logits.shape[-1])
            shift[first], shift[common] = -3.0, 5.0
            return logits + shift

        module.causal_lm.get_output_embeddings().register_forward_hook(hook)

    return change


def test_a_displaced_first_token_is_said_once_though_the_margins_grow(fit, data):
    (warning,) = fit(At(3, change_beginnings(data)), max_steps=10)
    assert warning.startswith("step 4: the first token of the chosen completion has lost more than 1 nat")
    assert "[sigmoid, sft]" in warning and (REPO / "docs" / "troubleshooting.md").is_file()


@pytest.mark.parametrize(
    ("share", "margin", "kinds"), [(0.9, 1.0, {"first_token"}), (0.1, 1.0, set()), (0.9, -1.0, set())]
)
def test_a_first_token_counts_if_many_pairs_lose_it_while_margins_grow(share, margin, kinds):
    metrics = {"train/rewards/first_displaced": torch.tensor(share), "train/rewards/margins": torch.tensor(margin)}
    assert set(displacement_warnings(4, metrics, "dpop")) == kinds


# ---------------------------------------------------------------------- nothing left to learn


class QuietLoss(PreferenceLoss):
    factor = 1e-3

    def __call__(self, *args):
        return super().__call__(*args) * self.factor


def quiet(module):
    module.loss.__class__ = QuietLoss


def loud(module):
    module.loss.__class__ = PreferenceLoss


LONG = {"max_steps": 20, "max_epochs": -1, "log_every_n_steps": 2}


def test_a_loss_without_a_gradient_is_said_once_with_what_is_left_of_the_run(fit):
    (warning,) = fit(At(3, quiet), **LONG)
    assert warning.startswith("step 12: nothing is left to learn") and "0.1% of that at the first step" in warning
    assert "40% of the run is left; stop here (guards.stop_when_learned: true)" in warning
    assert "[sigmoid, sft]" in warning and "data.rejected: shuffled or generated" in warning


def test_two_per_cent_of_the_gradient_still_teach(fit, monkeypatch):
    # Measured: at 2 % replies became better for 10 steps more, at 1 % no longer (docs/troubleshooting.md).
    monkeypatch.setattr(QuietLoss, "factor", 2e-2)
    assert fit(At(3, quiet), **LONG) == []


def test_a_lull_is_not_the_end(fit):
    assert fit(At(3, quiet), At(11, loud), **LONG) == []


def test_the_end_of_a_run_is_not_worth_stopping_for(fit):
    assert fit(At(10, quiet), **LONG) == []


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_ends_where_nothing_is_left_to_learn(quiet_trainer, module, data, accumulated):
    trainer = quiet_trainer(
        callbacks=[GuardsCallback(stop_when_learned=True), At(3, quiet)], accumulate_grad_batches=accumulated, **LONG
    )
    with pytest.warns(match="the run ends here"):
        trainer.fit(module, data)
    assert trainer.global_step == 13, "the step in which it was noticed is finished"
    assert trainer.state.finished and "val/loss" in trainer.callback_metrics


def test_all_ranks_stop_at_the_same_step(quiet_trainer, module, data):
    def steps(rank):
        guards = GuardsCallback(stop_when_learned=True)
        trainer = quiet_trainer(
            callbacks=[guards, At(3 + 2 * rank, quiet)], devices=2, strategy="ddp", **LONG | {"max_steps": 30}
        )
        trainer.fit(module, data)
        return trainer.global_step

    assert run_ranks(2, steps) == [15, 15]


def test_a_run_that_ended_so_is_finished_when_it_is_resumed(
    model_folder, rows_file, tmp_path, monkeypatch, caplog, recwarn
):
    monkeypatch.chdir(tmp_path)
    calls = []

    def call(self, policy, *args):
        calls.append(policy.token_logps.requires_grad)
        return scored(self, policy, *args) * (1e-3 if sum(calls) > 2 else 1.0)

    scored = PreferenceLoss.__call__
    monkeypatch.setattr(PreferenceLoss, "__call__", call)

    def run(*args):
        argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", rows_file, "--data.val_size", "4", "--data.test_size", "4"]
        argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.max_new_tokens", "4"]
        argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "3"]
        argv += ["--trainer.log_every_n_steps", "2", "--replies.num_prompts", "2", *args]
        assert main(argv) == 0
        return torch.load("lightning_logs/version_0/checkpoints/last.ckpt", weights_only=True)

    ended = run("--guards.stop_when_learned", "true")
    folder = tmp_path / "lightning_logs" / "version_0"
    assert ended["global_step"] == 13 and (folder / "huggingface").is_dir()
    assert "Finished after 13 steps" in (folder / "report.html").read_text()
    assert {json.loads(line)["step"] for line in (folder / "replies.jsonl").read_text().splitlines()} == {0, 13}
    again = run("--guards.stop_when_learned", "true", "--ckpt_path", "last", "--export.enabled", "false")
    assert "this run is finished: at step 12 nothing was left to learn" in caplog.text
    assert again["global_step"] == 13
    on = run("--ckpt_path", "last", "--export.enabled", "false")
    assert on["global_step"] > 13
    assert sum("nothing is left to learn" in str(warning.message) for warning in recwarn) == 1


def showings(*values):
    return [(10 * i, {"reply/eos_rate": eos, "reply/repetition": rep}) for i, (eos, rep) in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ([(0.0, 0.8), (0.5, 0.4), (1.0, 0.0), (0.94, 0.05)], set()),  # a base model rambles at first
        ([(0.0, 0.8)], set()),
        ([(1.0, 0.0), (0.6, 0.0)], {"eos"}),
        ([(0.0, 0.6), (1.0, 0.0), (0.9, 0.35)], {"repetition"}),
        ([(0.0, 0.7), (0.0, 0.95)], {"repetition"}),
        ([(0.9, 0.1), (0.0, 0.9)], {"eos", "repetition"}),
    ],
)
def test_replies_that_go_wrong_are_told_from_those_that_start_badly(values, kinds):
    found = reply_warnings(showings(*values))
    assert set(found) == kinds
    assert all(
        "lower model.learning_rate" in text and f"step {10 * (len(values) - 1)}" in text for text in found.values()
    )


def test_bad_replies_are_said_once(fit):
    class Fakes(RepliesCallback):
        def _show(self, trainer, module):
            healthy = trainer.global_step < 2
            shares = {"reply/eos_rate": 1.0 if healthy else 0.0, "reply/repetition": 0.0 if healthy else 0.9}
            self.showings.append(Showing(trainer.global_step, [], [], shares))

    said = fit(Fakes(every_n_steps=1))
    assert len(said) == 2
    assert "only 0% of the replies end by themselves" in said[0] and "replies repeat themselves" in said[1]


# ---------------------------------------------------------------------- NaN


class NaNLoss(PreferenceLoss):
    def __call__(self, *args):
        return super().__call__(*args) * math.nan


def nan_loss(module):
    module.loss.__class__ = NaNLoss


def inf_gradient(module):
    weight = next(module.policy.parameters())
    weight.register_hook(lambda grad: grad * math.inf)


@pytest.mark.parametrize(("harm", "name"), [(nan_loss, "loss is nan"), (inf_gradient, "gradient norm is")])
def test_nan_stops_the_run_and_names_step_rows_and_checkpoint(fit, data, tmp_path, harm, name, rows_file):
    seen = []

    class Notes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(batch.pair_ids.tolist())

    saves = ModelCheckpoint(tmp_path, "step{step}", every_n_train_steps=2, save_last=True)
    with pytest.raises(UserError) as caught:
        fit(Notes(), At(5, harm), saves, enable_checkpointing=True)
    message = str(caught.value)
    assert name in message and "at step 5" in message and f"{tmp_path}/last.ckpt" in message and rows_file in message
    named = [int(row) for row in re.findall(r"rows.jsonl, line (\d+)", message)]
    assert named == sorted(data.row_numbers("train", seen[-1]))
    texts = {pair.chosen.strip() for pair in data.pairs("train", seen[-1])}
    assert {ROWS[row - 1]["answer"] for row in named} == texts, "row numbers are those of the file"


def test_without_a_look_at_every_step_no_checkpoint_is_written_of_a_bad_policy(fit, module, tmp_path, monkeypatch):
    # As on a GPU, where losses are looked at only at logging steps and before a checkpoint.
    monkeypatch.setattr(DPOModule, "device", property(lambda self: torch.device("meta")))
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(UserError, match="loss is nan at step 3"):
        fit(At(3, nan_loss), saves, enable_checkpointing=True, log_every_n_steps=100)
    assert {path.name for path in tmp_path.glob("*.ckpt")} == {"step=1.ckpt", "step=2.ckpt"}


def test_losses_are_looked_at_together_at_logging_steps(fit, monkeypatch):
    monkeypatch.setattr(DPOModule, "device", property(lambda self: torch.device("meta")))
    with pytest.raises(UserError, match="loss is nan at step 2, .*no checkpoint was written before"):
        fit(At(2, nan_loss), log_every_n_steps=5)
