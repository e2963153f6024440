"""Overlays say only what they change: in whatever order they are laid, none undoes another's settings unasked."""

import itertools

import pytest
import yaml

from conftest import REPO
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.dpo.preference_loss import PreferenceLoss

CONFIGS = REPO / "configs"
OVERLAYS = sorted(path for path in CONFIGS.rglob("*.yaml") if "Overlay" in path.read_text())
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}


def stacked(*names):
    """The settings that `fit` reads from configs laid over each other."""

    class ParseOnly(DPOCLI):
        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

    args = [part for name in names for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    return configured(ParseOnly, ["fit", *args], run=True).config.fit


def leaves(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_repeats_nothing_of_the_run_it_is_laid_over(overlay):
    base = dict(leaves(yaml.safe_load((CONFIGS / "gpt2.yaml").read_text())))
    settings = dict(leaves(yaml.safe_load(overlay.read_text())))
    resets = {"model.loss_weights", "model.loss_options"}  # a loss of its own wants none of another overlay's
    assert not [key for key, value in settings.items() if key in base and base[key] == value and key not in resets]


@pytest.mark.parametrize("order", itertools.permutations(("lora", "dpop")), ids="-".join)
@pytest.mark.parametrize("between", ["ddp", "fsdp", "loggers/csv", "local"])
def test_lora_stays_lora_in_each_order(order, between):
    for names in (("gpt2", *order, between), ("gpt2", between, *order), ("gpt2", order[0], between, order[1])):
        settings = stacked(*names)
        model = settings.model
        assert (model.learning_rate, model.lr_scheduler_type, model.beta) == (2e-4, "linear", 0.1), names
        assert model.lora == LORA
        assert settings.data.batch_size == (8 if between in ("ddp", "fsdp") else 16), names
        assert model.loss_type == "dpop"


@pytest.mark.parametrize("order", itertools.permutations(("lora", "dpop", "simpo"), 2), ids="-".join)
def test_two_overlays_with_a_loss_make_a_loss_that_can_be_trained(order):
    model = stacked("gpt2", *order).model
    loss = PreferenceLoss(model.loss_type, model.loss_weights, model.beta, model.label_smoothing, model.loss_options)
    last = [name for name in order if name != "lora"][-1]  # which has no loss of its own
    assert loss.needs_reference == (last != "simpo")
    if "lora" in order:
        assert model.learning_rate == 2e-4 and model.lora == LORA


def test_the_demo_keeps_its_rate_under_an_overlay():
    assert stacked("demo", "dpop").model.learning_rate == 2e-4
