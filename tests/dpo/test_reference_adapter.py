"""References that are the policy's own earlier state: an SFT adapter's, and those that move (TR-DPO)."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.export.callback import export_policy
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.reference import AdapterCopy, FrozenCopy, MovingCopy, move, trained_weights
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import load_policy


@pytest.fixture(scope="module")
def sft_adapter(model_folder, tmp_path_factory):
    """An adapter that changes its base model, as one of supervised fine-tuning does; trained with dropout."""
    folder = tmp_path_factory.mktemp("adapter") / "sft"
    options = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=True, lora_dropout=0.1, task_type="CAUSAL_LM")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), options)
    torch.manual_seed(3)
    for name, weight in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tokenizer, write_rows):
    """A datamodule of a few pairs."""
    rows = write_rows(ROWS[:16])
    return lambda: PreferenceDataModule(tokenizer, rows, val_size=0, test_size=0, batch_size=4, rejected="shuffled")


def first_batch(data):
    loaded = data()
    loaded.setup("fit")
    return next(iter(loaded.train_dataloader()))


def test_an_sft_adapter_trains_on_and_is_its_own_reference(sft_adapter, data, quiet_trainer, tokenizer, tmp_path):
    module, batch = DPOModule(sft_adapter, learning_rate=1e-2, warmup_steps=0), first_batch(data)
    module.configure_model()
    start = copy.deepcopy(module.policy)
    with torch.no_grad():
        expected = pair_logps(start.get_base_model(), batch)
        with start.disable_adapter():
            bare = pair_logps(start.get_base_model(), batch)
    assert (expected.sums - bare.sums).abs().max() > 0.1
    quiet_trainer(max_steps=3).fit(module, data())

    reference = module.reference.logps(batch, Scoring())
    assert torch.equal(reference.token_logps, expected.token_logps)
    with torch.no_grad():
        policy = pair_logps(module.causal_lm, batch)
    assert (policy.sums - expected.sums).abs().max() > 0.1
    assert sum(weight.numel() for weight in module.state_dict().values()) == sum(
        weight.numel() for weight in trained_weights(module.policy).values()
    )
    export_policy(module, tokenizer, tmp_path / "out")
    again = load_policy(str(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(pair_logps(again.get_base_model(), batch).token_logps, policy.token_logps)


def test_scoring_the_reference_does_not_disturb_a_backward_pass(sft_adapter, data):
    policy, batch = load_policy(sft_adapter), first_batch(data)
    reference = AdapterCopy(policy)
    gradients = []
    for between in (lambda: None, lambda: reference.logps(batch, Scoring())):
        policy.zero_grad()
        loss = pair_logps(policy.get_base_model(), batch).sums.sum()
        with torch.no_grad():
            for weight in reference.weights.values():
                weight.zero_()
        between()
        loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in trained_weights(policy).values()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"adapter_config.json": "{"}, "is not a PEFT config"),
        ({"adapter_config.json": "{}"}, "does not name its base model"),
        ({"adapter_config.json": '{"base_model_name_or_path": "./gone"}'}, "'./gone' is a local path"),
    ],
)
def test_a_damaged_adapter_is_said_so(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        load_policy(str(tmp_path))


def test_an_adapter_and_another_one_on_top_is_refused(sft_adapter):
    with pytest.raises(UserError, match="is itself an adapter to train: leave model.lora out"):
        load_policy(sft_adapter, lora={"r": 2})


def test_the_command_line_starts_from_an_adapter_whose_tokenizer_is_with_its_model(
    sft_adapter, rows_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    args = ["fit", "--model.name_or_path", sft_adapter, "--data.train_dataset", rows_file, "--data.max_length", "128"]
    args += ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--replies.num_prompts", "2"]
    assert main([*args, "--model.max_new_tokens", "4", "--trainer.limit_val_batches", "1"]) == 0
    names = {path.name for path in (tmp_path / "lightning_logs" / "version_0" / "huggingface").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"} <= names


# ---------------------------------------------------------------------- moving


@pytest.mark.parametrize("kind", [MovingCopy, AdapterCopy])
def test_a_move_mixes_by_alpha(model_folder, kind):
    policy = load_policy(str(model_folder), {"r": 2} if kind is AdapterCopy else None)
    reference = kind(policy)
    with torch.no_grad():
        for weight in trained_weights(policy).values():
            weight.add_(1.0)
    start = {name: weight.clone() for name, weight in reference.weights.items()}
    move(reference, policy, 0.25)
    for name, weight in reference.weights.items():
        torch.testing.assert_close(weight, start[name] + 0.25)
    move(reference, policy, 1.0)
    assert all(torch.equal(weight, trained_weights(policy)[name]) for name, weight in reference.weights.items())


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_the_reference_moves_every_so_many_steps(model_folder, data, quiet_trainer, lora):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0, "lora": lora}
    module, batch = DPOModule(str(model_folder), learning_rate=1e-3, warmup_steps=0, **settings), first_batch(data)
    quiet_trainer(max_steps=4, accumulate_grad_batches=2, max_epochs=3).fit(module, data())
    module.eval()
    with torch.no_grad():  # 4 is a multiple of 2: the last step has made the reference the policy
        policy = pair_logps(module.causal_lm, batch, module.scoring)
    assert torch.equal(module.reference.logps(batch, module.scoring).token_logps, policy.token_logps)
    frozen = FrozenCopy(load_policy(str(model_folder)))
    assert not torch.equal(frozen.logps(batch, module.scoring).token_logps, policy.token_logps)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_resumed_run_has_the_same_reference(model_folder, data, quiet_trainer, tmp_path, lora):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5, "lora": lora}
    settings |= {"learning_rate": 1e-3, "warmup_steps": 0, "lr_scheduler_type": "constant"}

    def run(max_steps, ckpt_path=None):
        torch.manual_seed(0)
        module = DPOModule(str(model_folder), **settings)
        keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = quiet_trainer(max_steps=max_steps, max_epochs=5, callbacks=[keep], enable_checkpointing=True)
        trainer.fit(module, data(), ckpt_path=ckpt_path)
        return module

    whole = run(8)
    for step in (3, 5):  # at a move, and between two
        resumed = run(8, str(tmp_path / f"step={step}.ckpt"))
        for name, weight in whole.reference.weights.items():
            assert torch.equal(weight, resumed.reference.weights[name]), (step, name)
        for name, weight in whole.state_dict().items():
            assert torch.equal(weight, resumed.state_dict()[name]), (step, name)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha is 0.0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
        ({"sync_ref_model": True, "loss_type": "simpo"}, "moves a reference, but this model.loss_type has none"),
    ],
)
def test_settings_without_meaning_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        DPOModule("gpt2", **settings)
