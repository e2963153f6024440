"""Tiny random models of many families train three steps and export; the table in docs/models.md is what was found.

`DPO_WRITE_DOCS=1 pytest tests/models/test_models.py` writes the table.
"""

import functools
import json
import logging
import os
import re
from typing import NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.export.callback import export_policy
from dpo_lightning.data.batching import EncodedPair, collate, to_separate
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.shared_prompt import SHARED_PREFIX_MODEL_TYPES, UNPACKED_MODEL_TYPES, choose_scoring
from dpo_lightning.errors import UserError
from dpo_lightning.models import policy
from dpo_lightning.models.policy import load_policy

DOC = REPO / "docs" / "models.md"
TABLE = re.compile(r"(<!-- made by tests/models/test_models.py -->\n).*?(<!-- end -->)", re.S)
WINDOW = 16  # tokens, fewer than a row has

# A large initial spread: with the usual 0.02 a tiny model hardly looks at its context and any mask would pass.
BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
PLAIN = BASE | {"intermediate_size": 64, "max_position_embeddings": 128}
GROUPED = PLAIN | {"num_key_value_heads": 2}
OLD = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}

# Name in the table -> model type, settings.
FAMILIES = {
    "GPT-2": ("gpt2", OLD),
    "GPT-J": ("gptj", OLD | {"rotary_dim": 4}),
    "GPT-Neo": ("gpt_neo", BASE | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}),
    "GPT-NeoX, Pythia": ("gpt_neox", PLAIN),
    "GPT-OSS": ("gpt_oss", GROUPED | LOCAL | {"head_dim": 8, "sliding_window": WINDOW}),
    "OPT": ("opt", BASE | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 128, "init_std": 0.3}),
    "BLOOM": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}),
    "Falcon": ("falcon", BASE | {"alibi": False, "max_position_embeddings": 128}),
    "Falcon with ALiBi": ("falcon", BASE | {"alibi": True}),
    "Llama, SmolLM2": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "SmolLM3": ("smollm3", GROUPED),
    "Mistral": ("mistral", GROUPED | {"sliding_window": WINDOW}),
    "Mixtral": ("mixtral", GROUPED | LOCAL),
    "Qwen2, Qwen2.5": ("qwen2", GROUPED | WINDOWED | {"max_window_layers": 1}),
    "Qwen2-MoE": ("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 32}),
    "Qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "Qwen3-MoE": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 8}),
    "Gemma": ("gemma", GROUPED | {"head_dim": 8}),
    "Gemma 2": ("gemma2", GROUPED | MIXED | {"head_dim": 8, "final_logit_softcapping": 2.0}),
    "Gemma 3, text": ("gemma3_text", GROUPED | MIXED | {"head_dim": 8}),
    "Phi": ("phi", PLAIN),
    "Phi-3": ("phi3", GROUPED | {"sliding_window": WINDOW}),
    "StarCoder2": ("starcoder2", GROUPED | {"sliding_window": WINDOW}),
    "StableLM": ("stablelm", GROUPED),
    "OLMo 2": ("olmo2", GROUPED),
    "OLMo 3": ("olmo3", GROUPED | MIXED),
    "Cohere": ("cohere", GROUPED),
    "Cohere 2": ("cohere2", GROUPED | MIXED),
    "Granite": ("granite", GROUPED | {"logits_scaling": 4.0}),
    "Granite-MoE": ("granitemoe", GROUPED | LOCAL),
    "Mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.3}),
}


class Found(NamedTuple):
    """What training a family has shown."""

    model_type: str
    tied: bool
    scoring: Scoring
    router: bool
    error: float  # nats: largest difference of a completion's log-prob from that of separate forwards


@pytest.fixture(scope="session")
def found(tokenizer, tmp_path_factory):
    """Trains a family once per session and checks what it leaves behind."""

    @functools.cache
    def train(name: str) -> Found:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        model_type, settings = FAMILIES[name]
        folder = tmp_path_factory.mktemp("family")
        eos = tokenizer.eos_token_id
        ids = {"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos, "pad_token_id": eos}
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **settings | ids)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        module = DPOModule(str(folder / "model"), learning_rate=1e-3, warmup_steps=0)
        data = PreferenceDataModule(
            tokenizer, str(rows), rejected="shuffled", val_size=0, test_size=0, batch_size=2, max_length=128
        )
        trainer = Trainer(
            max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, data)
        module.eval()

        batch = next(iter(data.train_dataloader()))
        with torch.no_grad():
            policy = pair_logps(module.causal_lm, batch, module.scoring)
            truth = pair_logps(module.causal_lm, batch, Scoring(shared=False, gathered=False))
            reference = module.reference.logps(batch, module.scoring)
        assert batch.position_ids.max() >= WINDOW, "rows must reach past the window"
        assert (policy.sums - reference.sums).abs().max() > 1e-3, "three steps must have changed the policy"

        export_policy(module, tokenizer, folder / "out")
        loaded = AutoModelForCausalLM.from_pretrained(folder / "out").eval()
        with torch.no_grad():
            expected, logits = (model(batch.input_ids).logits for model in (module.causal_lm, loaded))
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        config = module.causal_lm.config
        fastest = choose_scoring(module.causal_lm, batch)  # packed, if the model can be
        with torch.no_grad():
            again = pair_logps(module.causal_lm, batch, fastest)
        assert fastest._replace(packed=False) == module.scoring
        error = max((found.sums - truth.sums).abs().max().item() for found in (policy, again))
        return Found(config.model_type, config.tie_word_embeddings, fastest, policy.router_loss is not None, error)

    rows = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    return train


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_exports_and_its_log_probs_are_exact(found, name):
    family = found(name)
    assert family.error < 1e-3
    assert family.scoring.shared == (family.model_type in SHARED_PREFIX_MODEL_TYPES and "ALiBi" not in name)
    assert family.scoring.packed == (family.scoring.shared and family.model_type not in UNPACKED_MODEL_TYPES)
    assert family.scoring.gathered
    assert family.router == ("output_router_logits" in FAMILIES[name][1])


def table(found) -> str:
    """The families as a markdown table."""
    lines = [
        "| Family | `model_type` | The prompt is read | Head | Sliding window | Router loss |",
        "|---|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        family = found(name)
        once = "once per pair, packed" if family.scoring.packed else "once per pair"
        reads = once if family.scoring.shared else f"twice: {family.scoring.reason}"
        window = "kept" if "sliding_window" in FAMILIES[name][1] else ""
        head = "tied" if family.tied else "own"
        router = "added" if family.router else ""
        lines.append(f"| {name} | `{family.model_type}` | {reads} | {head} | {window} | {router} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_was_found(found):
    text = DOC.read_text()
    made = TABLE.sub(lambda match: match[1] + table(found) + match[2], text)
    if os.environ.get("DPO_WRITE_DOCS"):
        DOC.write_text(made)
    assert TABLE.search(made) and text == made, "run it with DPO_WRITE_DOCS=1"


# ---------------------------------------------------------------------- experts and quantized weights


@pytest.fixture
def experts(tokenizer, tmp_path):
    """A tiny Mixtral whose config asks for the router loss with a weight of 0.5."""
    settings = FAMILIES["Mixtral"][1] | {"vocab_size": len(tokenizer), "router_aux_loss_coef": 0.5}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **settings))
    model.save_pretrained(tmp_path / "experts")
    return str(tmp_path / "experts")


def batch_of(pairs):
    return collate([EncodedPair([5, 6, 7 + i], [8, 9 + i, 2], [2]) for i in range(pairs)], range(pairs))


def test_the_router_loss_is_the_models_own(experts):
    model, batch = load_policy(experts), to_separate(batch_of(3))
    mask = (batch.segment_ids >= 0).long()
    expected = model(batch.input_ids, attention_mask=mask).aux_loss
    for gathered in (True, False):
        found = pair_logps(model, batch_of(3), Scoring(shared=False, gathered=gathered)).router_loss
        torch.testing.assert_close(found, 0.5 * expected)
    found.backward()
    assert model.model.layers[0].mlp.gate.weight.grad.abs().sum() > 0


def test_the_router_loss_is_part_of_the_training_loss(experts, tokenizer, write_rows, quiet_trainer):
    losses, balances = [], []
    for weight in (None, 0.0, 1.0):
        module = DPOModule(experts, router_aux_loss_coef=weight)
        data = PreferenceDataModule(tokenizer, write_rows(ROWS[:8]), val_size=0, test_size=0, batch_size=8)
        trainer = quiet_trainer(max_steps=1)
        trainer.fit(module, data)
        batch = next(iter(data.train_dataloader()))
        losses.append(module.eval().training_step(batch, 0).item())
        balances.append(module.router_loss)
    assert balances[1] is None
    assert losses[0] - losses[1] == pytest.approx(balances[0].item(), abs=0.02)
    assert balances[2] == pytest.approx(2 * balances[0].item(), rel=0.02)


def test_a_router_loss_of_a_model_without_a_router_is_refused(model_folder):
    with pytest.raises(UserError, match="'gpt2' has no router: leave model.router_aux_loss_coef out"):
        load_policy(str(model_folder), router_aux_loss_coef=0.1)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_an_adapter_on_quantized_weights_trains_and_exports_merged(
    quantization, tokenizer, write_rows, quiet_trainer, tmp_path
):
    pytest.importorskip("bitsandbytes")
    settings = FAMILIES["Llama, SmolLM2"][1] | {"vocab_size": len(tokenizer), "hidden_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(tmp_path / "llama")
    module = DPOModule(str(tmp_path / "llama"), lora={"r": 4}, quantization=quantization, learning_rate=1e-2)
    data = PreferenceDataModule(tokenizer, write_rows(ROWS[:8]), val_size=0, test_size=0, batch_size=4)
    quiet_trainer(max_steps=3).fit(module, data)
    dtypes = {weight.dtype for weight in module.policy.parameters()}
    assert (torch.uint8 if quantization == "4bit" else torch.int8) in dtypes
    assert all("lora_" in name for name in module.state_dict())
    export_policy(module, tokenizer, tmp_path / "out", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    (a,), (b,) = (
        [w for n, w in module.state_dict().items() if f"layers.0.self_attn.q_proj.lora_{x}" in n] for x in "AB"
    )
    torch.testing.assert_close(merged[name] - before[name], 2 * b @ a, rtol=1e-4, atol=1e-6)  # lora_alpha 8 over r 4


def test_quantization_is_refused_where_it_cannot_work(model_folder, monkeypatch):
    with pytest.raises(UserError, match="4bit weights cannot be trained themselves: set model.lora"):
        load_policy(str(model_folder), quantization="4bit")
    with pytest.raises(UserError, match="'3bit' is unknown: one of 4bit, 8bit"):
        load_policy(str(model_folder), lora={"r": 2}, quantization="3bit")
    monkeypatch.setattr(policy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes, which is not installed: `pip install"):
        load_policy(str(model_folder), lora={"r": 2}, quantization="8bit")
