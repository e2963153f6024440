import json
import re

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.export.callback import ExportCallback, export_policy
from dpo_lightning.callbacks.export.model_card import _name, _table, model_card
from dpo_lightning.callbacks.methods import METHODS
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.dpo.losses import LOSSES
from dpo_lightning.errors import UserError

IDS = torch.arange(5, 25)[None]


def load(folder):
    """Loads with the attention kernel that the policy used; another one would round differently."""
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def train(model_folder, tokenizer, rows_file, quiet_trainer):
    def run(*callbacks, **settings):
        module = DPOModule(str(model_folder), learning_rate=1e-3, **settings)
        data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
        quiet_trainer(callbacks=list(callbacks), max_steps=5, val_check_interval=5).fit(module, data)
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


def test_a_previous_export_is_replaced_whole(train, tokenizer, tmp_path):
    module = train(lora={"r": 4})
    export_policy(module, tokenizer, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_config.json").exists()
    export_policy(module, tokenizer, tmp_path / "out", merge=True)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_callback_writes_at_the_end_of_fit(train, tmp_path):
    module = train(ExportCallback(str(tmp_path / "a")), ExportCallback(str(tmp_path / "b"), enabled=False))
    assert not (tmp_path / "b").exists()
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "a")(IDS).logits, module.causal_lm(IDS).logits)


# ---------------------------------------------------------------------- serving


def dtypes(folder):
    """Tensor name -> dtype and file, as a server that reads the safetensors files finds them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: (file.get_slice(name).get_dtype(), path.name) for name in file.keys()}
    return found


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_dtype_and_shards_as_chosen(train, tokenizer, tmp_path, lora):
    module = train(lora=lora)
    before = {name: weight.clone() for name, weight in module.policy.state_dict().items()}
    export_policy(module, tokenizer, tmp_path / "out", merge=True, dtype="bfloat16", max_shard_size="40KB")
    files = dtypes(tmp_path / "out")
    assert {dtype for dtype, _ in files.values()} == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert index["weight_map"] == {name: path for name, (_, path) in files.items()}
    loaded = load(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits.float(), module.causal_lm(IDS).logits, rtol=0.1, atol=0.2)
    for name, weight in module.policy.state_dict().items():  # the run goes on with what it had
        assert weight.dtype == torch.float32 and torch.equal(weight, before[name])


@torch.no_grad()
def test_an_adapter_over_16_bits_is_merged_into_the_weights_as_they_were(train, model_folder, tokenizer, tmp_path):
    module = train(lora={"r": 4}, dtype="bfloat16")
    export_policy(module, tokenizer, tmp_path / "adapter")
    export_policy(module, tokenizer, tmp_path / "exact", merge=True, dtype="float32")
    export_policy(module, tokenizer, tmp_path / "out", merge=True)
    expected = PeftModel.from_pretrained(load(model_folder), tmp_path / "adapter").merge_and_unload().state_dict()
    found, rounded = (load(tmp_path / name).state_dict() for name in ("exact", "out"))
    assert {dtype for dtype, _ in dtypes(tmp_path / "out").values()} == {"BF16"}
    for name, weight in expected.items():
        assert torch.equal(found[name], weight) and torch.equal(rounded[name], weight.bfloat16())


def test_an_unknown_dtype_is_refused_before_anything_is_written(train, tokenizer, tmp_path):
    with pytest.raises(UserError, match="export.dtype is 'int3': it must be one of float32, bfloat16, float16"):
        ExportCallback(dtype="int3")
    with pytest.raises(UserError, match="export.dtype is 'int3'"):
        export_policy(train(), tokenizer, tmp_path / "out", dtype="int3")
    assert not (tmp_path / "out").exists()


def test_the_folder_is_what_servers_and_pipelines_load(train, tokenizer, tmp_path):
    export_policy(train(), tokenizer, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    # What vLLM reads: architecture, sampling defaults, tokenizer, weights under transformers' names.
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "model.safetensors" in names and "README.md" in names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["model_type"] == "gpt2"
    assert "lm_head.weight" not in dtypes(tmp_path / "out"), "the tied head is the embedding"
    generate = pipeline("text-generation", str(tmp_path / "out"))
    (reply,) = generate("SELECT", max_new_tokens=4, return_full_text=False)
    assert isinstance(reply["generated_text"], str)


def test_the_card_has_data_settings_metrics_and_replies(train, tmp_path, monkeypatch, capsys):
    replies = RepliesCallback(every_n_steps=0, num_prompts=2)
    train(replies, ExportCallback(str(tmp_path / "out")), beta=0.25)
    card = (tmp_path / "out" / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata and "datasets" not in metadata, "names of this machine's files mean nothing"
    assert str(tmp_path) not in card
    for row in ("beta | 0.25", "train_dataset | rows.jsonl", "optimizer steps | 5", "valid SQL | 0% | on 2 questions"):
        assert f"| {row} |" in text
    assert "| val/rewards/margins |" in text and "&#" not in text
    assert "# tiny-gpt2, trained with DPO\n" in text and "DPO ([Rafailov et al. 2023](https://arxiv.org/abs/" in text
    assert f"```text\n{replies.pairs[0].prompt}\n```" in text and replies.pairs[0].chosen.strip() in text
    monkeypatch.chdir(tmp_path / "out")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert len(capsys.readouterr().out) > 1, "the example of the card runs and prints a reply"


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_card_names_the_loss_and_its_paper(model_folder, loss):
    options = {"label_smoothing": 0.001} if loss == "exo_pair" else {}
    card = model_card(DPOModule(str(model_folder), loss_type=loss, **options), {}, adapter=False)
    method = METHODS[loss]
    assert f"trained with {method.name}\n" in card and f"({method.arxiv})" not in card
    assert f"[{method.authors}](https://arxiv.org/abs/{method.arxiv})" in card
    assert f"arXiv {method.arxiv}" in LOSSES[loss].function.__doc__, "the paper of the loss's own docstring"


def test_names_in_a_card_are_not_interpreted():
    hostile = ["](http://x) <img src=x> |", "`code` ``", "# head", "www.example.com", "a _b_ c", "http://127.0.0.1"]
    for name in [*hostile, "`", "", "|`|", "a\n# b"]:
        cell = _name(name)
        fence = re.match("`+", cell)[0]
        inner = cell.removeprefix(fence).removesuffix(fence)
        assert fence not in re.findall("`+", inner) and "\n" not in cell
        row = _table(("a",), [(name,)]).splitlines()[2]
        assert len(re.findall(r"(?<!\\)\|", row)) == 2, "one cell"
    assert [_name(name) for name in ("gpt2", "a/b-c_d", "0% → 86%", "AdamW, learning rate 0.1, linear, warm-up 5")] == [
        "gpt2", "a/b-c_d", "0% → 86%", "AdamW, learning rate 0.1, linear, warm-up 5"
    ]  # fmt: skip


def test_the_card_of_hub_names_links_them(model_folder):
    module = DPOModule("openai-community/gpt2", lora={"r": 4})
    card = model_card(module, {"train_dataset": "b-mc2/sql-create-context:train[:100]"}, adapter=True)
    metadata = yaml.safe_load(card.split("---\n", 2)[1])
    assert metadata["base_model"] == "openai-community/gpt2" and metadata["library_name"] == "peft"
    assert metadata["datasets"] == ["b-mc2/sql-create-context"]
