"""Every loss in a training run: what the first step costs, what is in memory, what the data may ask for."""

import gc
import warnings

import pytest
import torch
from test_losses import AT_ZERO
from test_module import Record

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.dpo.losses import LOSSES
from dpo_lightning.errors import UserError


@pytest.fixture
def module(model_folder):
    def make(loss_type, **options):
        settings = {"learning_rate": 1e-3, "warmup_steps": 0, "loss_type": loss_type}
        return DPOModule(str(model_folder), **settings | options)

    return make


@pytest.fixture
def fit(tokenizer, write_rows, quiet_trainer):
    """Trains on rows and gives the losses of the steps; a warning of the guards is an error."""

    def run(dpo, rows=ROWS[:16], **options):
        data = PreferenceDataModule(
            tokenizer, write_rows(rows), batch_size=4, val_size=4, test_size=0, shuffle=False, rejected="shuffled"
        )
        record = Record(dpo)
        trainer = quiet_trainer(callbacks=[GuardsCallback()], **{"max_steps": 3, "log_every_n_steps": 3} | options)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*before the first step|.*drops something")
            trainer.fit(dpo, data)
        return record.losses, trainer.callback_metrics

    return run


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_from_the_value_of_its_equation(module, fit, name):
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].parameters else 0.0
    losses, metrics = fit(module(name, label_smoothing=smoothing))
    assert len(losses) == 3 and all(map(torch.isfinite, map(torch.tensor, losses)))
    if name in AT_ZERO:
        assert losses[0] == pytest.approx(AT_ZERO[name], rel=1e-4)
    assert ("train/kl" in metrics) == (name in AT_ZERO)


def test_weighted_mixture_with_every_option_trains(module, fit):
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3, "ld_alpha": 0.5}
    dpo = module(
        ["sigmoid", "discopop", "sft"],
        loss_weights=[1.0, 0.5, 0.1],
        loss_options=options | {"use_weighting": True, "discopop_tau": 0.1},
    )
    _, metrics = fit(dpo, max_steps=-1, max_epochs=4)
    assert metrics["train/rewards/margins"] > 0


def bytes_of_weights():
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) is torch.nn.Parameter  # isinstance asks a metaclass, millions of times
    }
    return sum(storages.values())


def test_without_a_reference_only_the_policy_is_in_memory(module):
    models, before = [], bytes_of_weights()
    for name, copies in {"simpo": 1, "orpo": 1, "sigmoid": 2}.items():
        dpo = module(name)
        dpo.configure_model()
        models.append(dpo)
        one = sum({weight.data_ptr(): weight.nbytes for weight in dpo.policy.parameters()}.values())
        now = bytes_of_weights()
        assert now - before == copies * one
        before = now


def test_a_reference_free_run_resumes(module, fit, quiet_trainer, tmp_path):
    dpo = module("simpo", beta=2.0)
    fit(dpo)
    dpo.trainer.save_checkpoint(tmp_path / "simpo.ckpt")
    loaded = DPOModule.load_from_checkpoint(tmp_path / "simpo.ckpt", weights_only=True)
    assert loaded.reference is None
    for name, value in dpo.policy.state_dict().items():
        assert torch.equal(value, loaded.policy.state_dict()[name])


@pytest.mark.parametrize(("column", "loss_type"), [("weight", "aot"), ("margin", "ipo")])
def test_a_column_without_meaning_for_the_loss_stops_the_run(module, fit, column, loss_type):
    rows = [row | {column: 0.5} for row in ROWS[:16]]
    with pytest.raises(UserError, match=f"column `{column}` of the data.* has no meaning for the loss {loss_type}"):
        fit(module(loss_type), rows)


def test_weights_and_margins_of_the_data_reach_the_loss(module, fit):
    plain, _ = fit(module("hinge"))
    weighted, _ = fit(module("hinge"), [row | {"weight": 0.25, "margin": 1.0} for row in ROWS[:16]])
    assert plain[0] == pytest.approx(1.0, abs=1e-5)
    assert weighted[0] == pytest.approx(0.25 * (1 + 1.0), abs=1e-5)
