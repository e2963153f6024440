"""A loss from outside of the package: one function, named in the settings."""

import html
import re
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from test_losses import POLICY, REFERENCE

from attacked import LAST, command, error_line
from conftest import REPO
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.losses import LOSSES, Pairs, import_loss, loss
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.errors import UserError

TRAINER, _, LOSS, _ = re.findall(r"```python\n(.*?)```", (REPO / "docs" / "lightning.md").read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def only_the_packages_own(tmp_path, monkeypatch):
    """An empty working directory, and afterwards the losses and modules of before."""
    monkeypatch.chdir(tmp_path)
    known, modules = dict(LOSSES), set(sys.modules)
    yield
    LOSSES.clear()
    LOSSES.update(known)
    for name in set(sys.modules) - modules:
        if name.startswith("my_losses"):
            del sys.modules[name]


def test_the_loss_of_the_docs_has_its_own_settings():
    Path("my_losses.py").write_text(LOSS)
    import_loss("my_losses:cubed")
    logits = PreferenceLoss("sigmoid", beta=0.1)._pairs(POLICY, REFERENCE, None).logits(0.1)
    found = PreferenceLoss("my_losses:cubed", beta=0.1, options={"margin": 2.0})(POLICY, REFERENCE)
    torch.testing.assert_close(found, (2.0 - logits).clamp(min=0) ** 3)
    with pytest.raises(UserError, match="model.loss_options.margin is 'wide': it must be a number"):
        PreferenceLoss("my_losses:cubed", options={"margin": "wide"})


def test_a_decorated_function_keeps_its_flags_under_both_names():
    Path("my_losses_flagged.py").write_text(
        "from dpo_lightning.dpo.losses import loss\n"
        "@loss(reference_free=True)\ndef plain(pairs, *, power=2):\n    return pairs.nll ** power\n"
    )
    import_loss("my_losses_flagged:plain")
    for name in ("my_losses_flagged:plain", "plain"):
        assert not PreferenceLoss(name).needs_reference


def test_a_command_trains_with_it_and_a_checkpoint_imports_nothing(model_folder, capsys):
    Path("my_losses.py").write_text(LOSS)
    given = ("--model.loss_type", "[my_losses:cubed, sft]")
    assert command("fit", model_folder, *given, "--export.enabled", "false") == 0
    del LOSSES["my_losses:cubed"], sys.modules["my_losses"]
    assert command("test", model_folder, "--ckpt_path", str(LAST)) == 2
    assert "model.loss_type 'my_losses:cubed' is unknown" in error_line(capsys)
    assert main(["export", "--ckpt_path", str(LAST), "--output_dir", "model"]) == 0
    assert "my_losses:cubed" in html.unescape(Path("model/README.md").read_text())
    assert "my_losses" not in sys.modules
    assert command("test", model_folder, "--ckpt_path", str(LAST), *given) == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("bad = 3", "model.loss_type 'my_losses:bad' is int, not a function"),
        ("", "model.loss_type 'my_losses:bad' cannot be imported"),
        ("def bad(pairs, beta): ...", "model.loss_type 'my_losses:bad': beta must be keyword-only"),
        ("def bad(pairs, *, power): ...", "model.loss_options.power is missing"),
    ],
)
def test_what_cannot_be_a_loss_is_refused(code, words):
    Path("my_losses.py").write_text(code)
    with pytest.raises(UserError, match=re.escape(words)):
        import_loss("my_losses:bad")
        PreferenceLoss("my_losses:bad")


def test_a_loss_must_return_a_value_per_pair():
    Path("my_losses.py").write_text("def mean(pairs):\n    return pairs.nll.mean()\n")
    import_loss("my_losses:mean")
    with pytest.raises(UserError, match=r"the loss mean returns the shape \[\]: it must be \[2\]"):
        PreferenceLoss("my_losses:mean")(POLICY, REFERENCE)


def test_a_function_cannot_take_the_name_of_a_shipped_loss():
    with pytest.raises(UserError, match="there is already a loss called sigmoid"):

        @loss()
        def sigmoid(pairs: Pairs) -> torch.Tensor:
            return pairs.nll


def test_the_trainer_of_the_docs_leaves_what_its_callbacks_are_for(model_folder, rows_file, monkeypatch):
    steps = {"max_steps": 2, "accelerator": "cpu", "val_check_interval": 1}
    monkeypatch.setattr("lightning.pytorch.Trainer", lambda **given: Trainer(**given | steps))
    exec(TRAINER.replace('"gpt2"', repr(str(model_folder))).replace('"rows.jsonl"', repr(rows_file)), {})
    for name in ("report.html", "replies.jsonl", "checkpoints/last.ckpt", "huggingface/model.safetensors"):
        assert (LAST.parents[1] / name).is_file()
