"""What `internals/transformers.py` uses is as it was in the version of transformers that is installed."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from contracts import contract
from huggingface_hub import constants
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, GPT2Config, GPT2LMHeadModel

from dpo_lightning.data.generated import stored_weights
from dpo_lightning.internals import transformers as internals

holds = functools.partial(contract, "transformers")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def config() -> GPT2Config:
    return GPT2Config(vocab_size=10, n_embd=4, n_layer=1, n_head=1, n_positions=8)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_in_use(config, attention):
    with holds("config._attn_implementation", "the mask of a prompt that is read once, silently wrong otherwise"):
        model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
        assert internals.attention_in_use(model) == attention


def test_an_attention_of_our_own(config):
    calls = []

    def attention(module, query, key, value, attention_mask, plan=None, **others):
        calls.append((query.shape, attention_mask.shape, plan))
        return value.transpose(1, 2), None

    with holds("AttentionInterface, 4D masks or the arguments of a forward pass", "packed batches (dpo/packing.py)"):
        AttentionInterface.register("contract", attention)
        AttentionMaskInterface.register("contract", AttentionMaskInterface()["sdpa"])
        model, plan = GPT2LMHeadModel._from_config(config, attn_implementation="eager"), object()
        model.set_attn_implementation("contract")
        assert internals.attention_in_use(model) == "contract"
        ids = torch.arange(3)[None]
        model(ids, attention_mask=ids.new_empty(1, 1, 0, 0), position_ids=ids, plan=plan, use_cache=False)
        assert calls == [((1, 1, 3, 4), (1, 1, 0, 0), plan)]
        assert "contract" not in model.config.to_json_string()  # exported folders load without this package
        model.set_attn_implementation("eager")
        assert internals.attention_in_use(model) == "eager"


def test_hub_commit(config, monkeypatch, tmp_path):
    with holds("the hub's cache", "the cache of generated completions, which would outlive a model's update"):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        assert internals.hub_commit("a/b") is None
        config.save_pretrained(tmp_path / "models--a--b" / "snapshots" / COMMIT)
        (tmp_path / "models--a--b" / "refs").mkdir()
        (tmp_path / "models--a--b" / "refs" / "main").write_text(COMMIT)
        assert AutoConfig.from_pretrained("a/b").n_embd == config.n_embd
        assert internals.hub_commit("a/b") == COMMIT
        assert stored_weights("a/b") == f"a/b@{COMMIT}"


def test_block_classes(config):
    with holds("model._no_split_modules", "sharding by FSDP2: without blocks all weights are gathered at once"):
        assert internals.block_classes(GPT2LMHeadModel(config)) == {"GPT2Block"}


def test_load_balancing_loss():
    with holds("Mixtral's load_balancing_loss_func", "model.router_aux_loss_coef"):
        logits = torch.tensor([[30.0, 0, 0], [30, 0, 0], [0, 30, 0]])  # the third token is padding
        real = torch.tensor([[True, True, False]])
        # All tokens to one of three experts: 3 x (share of tokens = 1) x (mean probability = 1).
        assert internals.load_balancing_loss((logits,), 3, 1, real).item() == pytest.approx(3, rel=1e-4)


def test_code_that_comes_with_a_model_is_never_run(tmp_path):
    """In a process of its own: there is no way back."""
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    auto_map = {"AutoTokenizer": ["evil.Evil", None], "AutoConfig": "evil.Evil"}
    for name in ("tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    code = f"""
import sys
from transformers import AutoConfig, AutoTokenizer
from dpo_lightning.internals.transformers import never_run_remote_code
if sys.argv[1] == "never":
    never_run_remote_code()
for auto in (AutoConfig, AutoTokenizer):
    try:
        auto.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
    except Exception:
        pass
"""
    with holds("dynamic_module_utils.get_class_in_module", "no code of a model's folder in llama.cpp's converter"):
        for how in ("never", "as usual"):
            subprocess.run([sys.executable, "-c", code, how], check=True, capture_output=True)
            assert ran.exists() is (how == "as usual")
