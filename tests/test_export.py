import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.export import ExportCallback, export_policy

IDS = torch.arange(5, 25)[None]


def load(folder):
    """Loads with the attention kernel that the policy used; another one would round differently."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def train(model_folder, tokenizer, rows_file, quiet_trainer):
    def run(*callbacks, **settings):
        module = DPOModule(str(model_folder), learning_rate=1e-3, **settings)
        data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
        quiet_trainer(callbacks=list(callbacks), max_steps=5).fit(module, data)
        return module.eval()

    return run


@pytest.mark.parametrize(("lora", "merge"), [(None, False), ({"r": 4}, False), ({"r": 4}, True)])
@torch.no_grad()
def test_written_model_gives_identical_logits(train, tokenizer, tmp_path, lora, merge):
    module = train(lora=lora)
    export_policy(module, tokenizer, tmp_path / "out", merge)
    loaded = load(tmp_path / "out")
    expected, found = module.causal_lm(IDS).logits, loaded(IDS).logits
    if lora:  # merged, W x + B A x is summed in another order; apart, the base model comes with its own GELU kernel
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_model.safetensors" if lora and not merge else "model.safetensors") in names
    assert ("config.json" in names) == (lora is None or merge)
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("SELECT name")["input_ids"]
        == tokenizer("SELECT name")["input_ids"]
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == generation["pad_token_id"] == tokenizer.eos_token_id


def test_an_existing_folder_is_replaced_whole(train, tokenizer, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.txt").touch()
    export_policy(train(), tokenizer, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]


def test_callback_writes_at_the_end_of_fit(train, tmp_path):
    module = train(ExportCallback(str(tmp_path / "a")), ExportCallback(str(tmp_path / "b"), enabled=False))
    assert not (tmp_path / "b").exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(IDS).logits, module.causal_lm(IDS).logits)
