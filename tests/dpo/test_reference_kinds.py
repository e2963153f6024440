"""A kind of reference from outside of the package: one function, named in the settings."""

import sys

import pytest
import torch
from lightning.pytorch import Callback

from attacked import LAST, command, error_line
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.dpo.reference import REFERENCES, FrozenCopy, reference
from dpo_lightning.errors import UserError

CODE = """
import torch
from dpo_lightning.dpo.reference import FrozenCopy

def zeroed(start):
    made = FrozenCopy(start.policy, start.autocast_dtype)
    torch.nn.init.zeros_(made.model.get_output_embeddings().weight)  # every token is as likely as any other
    return made
"""


@pytest.fixture(autouse=True)
def only_the_packages_own():
    known = dict(REFERENCES)
    yield
    REFERENCES.clear()
    REFERENCES.update(known)


def test_a_registered_kind_is_used_and_never_cached(model_folder, tokenizer, rows_file, quiet_trainer):
    made = []

    @reference("watched")
    def watched(start):
        made.append(FrozenCopy(start.policy, start.autocast_dtype))
        return made[-1]

    module = DPOModule(str(model_folder), reference="watched")
    data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
    quiet_trainer(max_epochs=2, limit_train_batches=2).fit(module, data)
    assert [module.reference] == made


def test_a_function_of_the_users_own_is_named_in_the_settings(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_references.py").write_text(CODE)
    args = ["--model.reference", "my_references:zeroed", "--export.enabled", "false"]
    with pytest.warns(UserWarning, match="policy and reference are not the same model"):  # as the preflight finds
        assert command("fit", model_folder, *args) == 0
    checkpoint = torch.load(LAST, weights_only=True)
    assert checkpoint["hyper_parameters"]["reference"] == "my_references:zeroed"
    assert command("fit", model_folder, "--ckpt_path", "last", "--trainer.max_steps", "3", *args) == 0
    del REFERENCES["my_references:zeroed"], sys.modules["my_references"]
    assert command("test", model_folder, "--ckpt_path", str(LAST)) == 2
    assert "model.reference is 'my_references:zeroed': it must be one of online, cached" in error_line(capsys)
    assert "my_references" not in sys.modules


def test_what_is_no_function_is_one_line(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reference.py").write_text("zeroed = 3\n")
    for name, words in (
        ("broken_reference:zeroed", "model.reference 'broken_reference:zeroed' is int, not a function"),
        ("no_such_module:zeroed", "model.reference 'no_such_module:zeroed' cannot be imported"),
        ("onlin", "did you mean 'online'?"),
    ):
        assert command("fit", model_folder, "--model.reference", name) == 2
        assert words in error_line(capsys)


def test_a_kind_that_nothing_asks_is_refused(model_folder):
    reference("other")(lambda start: None)
    with pytest.raises(UserError, match="model.reference is other, but model.sync_ref_model moves it"):
        DPOModule(str(model_folder), reference="other", sync_ref_model=True)
    with pytest.raises(UserError, match="model.reference is other, but this model.loss_type has no reference"):
        DPOModule(str(model_folder), reference="other", loss_type="simpo")


class Scored(Callback):
    """Counts the batches that the reference scores in validations, and keeps what these log."""

    def __init__(self):
        self.calls, self.logged = 0, []

    def on_fit_start(self, trainer, pl_module):
        score = pl_module.reference.logps

        def counted(batch, scoring):
            self.calls += not trainer.training
            return score(batch, scoring)

        pl_module.reference.logps = counted

    def on_validation_end(self, trainer, pl_module):
        values = trainer.callback_metrics.items()
        self.logged.append({name: float(value) for name, value in values if name.startswith("val/")})


@pytest.mark.parametrize(
    ("options", "calls"),
    [({}, 2), ({"lora": {"r": 4}}, 2), ({"sync_ref_model": True, "ref_model_sync_steps": 1}, 1 + 4 * 2)],
    ids=["copy", "adapter off", "moving"],
)
def test_a_validation_pair_is_scored_by_a_fixed_reference_once(
    model_folder, tokenizer, rows_file, quiet_trainer, monkeypatch, options, calls
):
    def fit():
        scored = Scored()
        module = DPOModule(str(model_folder), learning_rate=1e-2, warmup_steps=0, **options)
        data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0, eval_batch_size=2)
        torch.manual_seed(1)
        intervals = {"val_check_interval": 2, "max_steps": 8, "num_sanity_val_steps": 1}
        quiet_trainer(**intervals, callbacks=[scored]).fit(module, data)
        return scored

    once = fit()
    monkeypatch.setattr("dpo_lightning.dpo.policy_module.FIXED", ())
    again = fit()
    assert (once.calls, again.calls) == (calls, 1 + 4 * 2)  # a batch before training, and four validations of two
    assert once.logged == again.logged and once.logged[-1]["val/kl"] > 0
