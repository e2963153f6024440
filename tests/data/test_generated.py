"""rejected: generated: the model's own replies are what is trained against, sampled once and found again."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import REPO, ROWS
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.entry import main
from dpo_lightning.data import generated
from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.data.generated import stored_weights
from dpo_lightning.errors import UserError
from dpo_lightning.models.generate import generate
from dpo_lightning.models.policy import load_policy
from ranks import run_ranks

FEW = ROWS[::2]


@pytest.fixture
def rows_file(write_rows):
    """Fewer than elsewhere: here a model answers all of them."""
    return write_rows(FEW)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of each test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "dpo_lightning"


@pytest.fixture
def data(tokenizer, model_folder, rows_file):
    """Sets up a datamodule with generated rejected completions."""

    def make(rows=rows_file, model=model_folder, stage="fit", trainer=None, generates=True, **options):
        generation = {"name_or_path": str(model), "max_new_tokens": 6} | options.pop("generation", {})
        settings = {"batch_size": 4, "val_size": 2, "test_size": 2, "max_length": 100} | options
        module = PreferenceDataModule(tokenizer, rows, rejected="generated", generation=generation, **settings)
        module.trainer, module.generates = trainer, generates
        module.setup(stage)
        return module

    return make


def replies(module):
    """Prompt -> rejected text and tokens, of all pairs."""
    return {
        pair["prompt"]: (pair["rejected"], tuple(pair["rejected_ids"]))
        for pairs in module.datasets.values()
        for pair in pairs
    }


@pytest.fixture
def no_model(monkeypatch):
    """From now on loading a model fails the test; give the fixture's value to start that."""
    return lambda: monkeypatch.setattr(generated, "load_policy", lambda *a, **k: pytest.fail("a model was loaded"))


def test_rejected_is_what_the_model_says_to_the_prompt(data, model_folder, tokenizer, caplog):
    """At a temperature near 0 sampling is greedy decoding, which is known."""
    module = data(generation={"temperature": 1e-4})
    model = load_policy(str(model_folder))
    pairs = module.datasets["train"][:8]
    for prompt, ids, text in zip(pairs["prompt_ids"], pairs["rejected_ids"], pairs["rejected"], strict=True):
        (greedy,) = generate(model, *collate_prompts([prompt], [0])[:2], tokenizer, 6)
        assert (text, ids) == (greedy.text, [*greedy.token_ids, tokenizer.eos_token_id])
    assert "the rejected completions of its 24 pairs are replies of" in caplog.text


def test_a_second_run_finds_them_whatever_its_batches_and_loads_no_model(data, no_model):
    first = data()
    no_model()
    assert replies(data(batch_size=7, val_size=1)) == replies(first)
    assert replies(data(stage="test")) == replies(first)


def test_a_reply_does_not_hang_on_batches_or_the_order_of_rows(data, write_rows):
    first = replies(data(test_size=0))
    assert replies(data(write_rows(FEW[::-1], "other.jsonl"), batch_size=9, test_size=0)) == first
    assert len({text for text, _ in first.values()}) > len(first) / 2, "each prompt has draws of its own"


def test_an_interrupted_pass_goes_on_where_it_stopped(data, cache, monkeypatch):
    answered = []
    lines = generated.RejectedGenerator.lines

    def stopping(self, model, pairs, positions):
        if sum(answered) == 12:
            raise KeyboardInterrupt
        answered.append(len(positions))
        return lines(self, model, pairs, positions)

    monkeypatch.setattr(generated.RejectedGenerator, "lines", stopping)
    with pytest.raises(KeyboardInterrupt):
        data()
    (half,) = cache.glob("*.partial/*.jsonl")
    half.write_bytes(half.read_bytes()[:-5])  # as a kill leaves the last line
    monkeypatch.setattr(
        generated.RejectedGenerator,
        "lines",
        lambda self, model, pairs, positions: answered.append(len(positions)) or lines(self, model, pairs, positions),
    )
    resumed = data()
    assert sum(answered) == 24 + 1, "only the half line's pair is answered again"
    assert not list(cache.glob("*.partial"))
    for path in sorted(cache.glob("*/*")):
        path.unlink()
    assert replies(data()) == replies(resumed)


def test_two_ranks_share_the_work_and_find_the_same(data, quiet_trainer, cache, model_folder, tokenizer, rows_file):
    alone = replies(data(test_size=0))
    for path in cache.glob("*/*"):
        path.unlink()
    shares = []
    lines = generated.RejectedGenerator.lines

    def rank(number):
        generated.RejectedGenerator.lines = lambda self, model, pairs, positions: (
            shares.append(len(positions)) or lines(self, model, pairs, positions)
        )
        module = PreferenceDataModule(
            *(tokenizer, rows_file), rejected="generated", batch_size=4, val_size=4, test_size=0, max_length=100,
            generation={"name_or_path": str(model_folder), "max_new_tokens": 6},
        )  # fmt: skip
        trainer = quiet_trainer(devices=2, strategy="ddp", max_steps=2, limit_val_batches=0)
        trainer.fit(DPOModule(str(model_folder)), module)
        return sum(shares), replies(module)

    assert run_ranks(2, rank) == [(12, alone)] * 2


def test_what_replies_hang_on_is_in_their_key(data, tmp_path, model_folder):
    data()
    model = load_policy(str(model_folder))
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    assert not data(generates=False).not_generated
    for change in (
        {"model": tmp_path / "other"},
        *(
            {"generation": {name: value}}
            for name, value in {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 7}.items()
        ),
        *({name: value} for name, value in {"seed": 1, "max_length": 90, "completion_template": "{answer}"}.items()),
        {"prompt_template": "{context} {question}"},
    ):
        changed = data(generates=False, **change)
        assert changed.not_generated, change
        assert set(changed.datasets["train"]["rejected"][:]) == {""}


def test_a_moved_model_or_a_touched_file_has_the_same_key(data, tmp_path, model_folder, write_rows):
    first = replies(data())
    shutil.copytree(model_folder, tmp_path / "moved")
    moved = data(write_rows(FEW, "copied.jsonl"), model=tmp_path / "moved", generates=False)
    assert not moved.not_generated and replies(moved) == first


def test_an_adapter_answers_as_itself(tmp_path, model_folder, data):
    policy = load_policy(str(model_folder), lora={"r": 2})
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    policy.save_pretrained(tmp_path / "sft")
    assert stored_weights(str(tmp_path / "sft")).endswith(stored_weights(str(model_folder)))
    adapted, base = replies(data(model=tmp_path / "sft")), replies(data())
    merged = AutoModelForCausalLM.from_pretrained(model_folder)
    merged = type(policy).from_pretrained(merged, tmp_path / "sft").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    same = sum(reply == adapted[prompt] for prompt, reply in replies(data(model=tmp_path / "merged")).items())
    assert same > 0.9 * len(adapted) > 5 * sum(reply == base[prompt] for prompt, reply in adapted.items())


def test_the_chosen_completion_is_asked_for_again_and_then_said(data, write_rows, monkeypatch, recwarn):
    calls = []

    def parrot(model, input_ids, attention_mask, tokenizer, max_new_tokens, draws):
        from dpo_lightning.models.generate import Reply

        calls.append(len(input_ids))
        ids = input_ids[:, -1].tolist()
        return [Reply(" good" if calls[-1] < 3 or len(calls) == 1 else " bad", [i], True) for i in ids]

    monkeypatch.setattr("dpo_lightning.models.generate.generate", parrot)
    rows = [{"prompt": f"question {i}?", "completion": " good" if i < 2 else " other"} for i in range(4)]
    module = data(write_rows(rows), val_size=0, test_size=0)
    assert calls == [4, 2, 2, 2]
    assert [pair["rejected"] == pair["chosen"] for pair in module.datasets["train"]] == [True, True, False, False]
    assert any("2 of 4 pairs teach nothing but are kept: 4 times" in str(w.message) for w in recwarn)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (None, "data.generation has no name_or_path"),
        ({"temprature": 1}, "data.generation has no 'temprature': it has name_or_path, temperature"),
        ({"temperature": 0}, "data.generation: temperature is 0: it must be a number above 0"),
        ({"temperature": "hot"}, "data.generation: temperature is 'hot': it must be a number above 0"),
        ({"top_p": 1.5}, "data.generation: top_p is 1.5: it must be a number above 0 and at most 1"),
        ({"max_new_tokens": 99}, "max_new_tokens is 99: it must be a whole number, at least 1, that leaves room"),
        ({"max_new_tokens": 2.5}, "max_new_tokens is 2.5: it must be a whole number"),
    ],
)
def test_wrong_settings_are_one_line(tokenizer, rows_file, generation, message):
    generation = generation and {"name_or_path": "gpt2"} | generation
    with pytest.raises(UserError, match=message):
        PreferenceDataModule(tokenizer, rows_file, rejected="generated", generation=generation, max_length=100)


def test_rows_with_a_rejected_completion_are_refused(data, write_rows):
    rows = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(9)]
    with pytest.raises(UserError, match="has rejected completions of its own: leave data.rejected out"):
        data(write_rows(rows))


# ------------------------------------------------------------------ the command line


@pytest.fixture
def run(tmp_path, monkeypatch, model_folder, rows_file):
    monkeypatch.chdir(tmp_path)

    def call(command, *args):
        argv = [command, "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        argv += ["--data.train_dataset", rows_file, "--data.val_size", "4", "--data.test_size", "4"]
        argv += ["--data.batch_size", "4", "--data.max_length", "100", "--trainer.accelerator", "cpu"]
        argv += ["--data.rejected", "generated", "--data.generation", '{"max_new_tokens": 5}']
        return main([*argv, *args])

    return call


def test_the_command_line_inspects_generates_and_trains(run, capsys, model_folder, no_model, caplog, cache):
    assert run("inspect") == 0
    printed = capsys.readouterr().out
    assert "`fit` will first generate its rejected completions with " in printed
    fit = ["fit", "--trainer.max_steps", "2", "--trainer.max_epochs", "-1", "--trainer.precision", "32-true"]
    fit += ["--export.enabled", "false", "--replies.num_prompts", "1", "--trainer.limit_val_batches", "1"]
    assert run(*fit) == 0
    assert f"rejected completions of its 24 pairs are replies of {model_folder} (temperature 1.0" in caplog.text
    (note,) = (n for n in map(json.loads, (p.read_text() for p in cache.glob("*/note.json"))) if "key" in n)
    assert note["key"]["max_new_tokens"] == 5 and note["model"] == str(model_folder)
    no_model()
    assert run("inspect") == 0
    printed = capsys.readouterr().out
    assert "will first generate" not in printed and "tokens of rejected: 1 to 1," not in printed
    first, second = (
        torch.load(f"lightning_logs/version_{i}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for i in (0, 1)
        if i == 0 or run(*fit) == 0
    )
    assert all(torch.equal(weight, second[name]) for name, weight in first.items()), "as without generating"


def test_a_wrong_setting_is_one_line_on_the_command_line(run, capsys):
    assert run("fit", "--data.generation", '{"top_p": 0}') == 2
    assert "error: data.generation: top_p is 0: it must be" in capsys.readouterr().err
