import json
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.evaluation import EvaluationCallback
from dpo_lightning.callbacks.predictions import ReplyWriter
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import find_judges, verdicts
from dpo_lightning.judging.views import fold, show_replies
from dpo_lightning.models.generate import Reply, generate


@pytest.fixture(scope="module")
def model(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder).train()


def greedy(model, ids, eos, limit):
    """Greedy decoding spelled out, without padding or cache."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) - start < limit:
            token = model.eval()(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == eos:
                return ids[start:], True
            ids.append(token)
    return ids[start:], False


def test_batched_replies_equal_greedy_decoding_one_by_one(model, tokenizer):
    prompts = [tokenizer(text)["input_ids"] for text in ("SELECT", "Which name has age 3?", "CREATE TABLE flight (")]
    model.train()
    replies = generate(model, *collate_prompts(prompts, range(3))[:2], tokenizer, max_new_tokens=12)
    assert model.training, "the model is handed back as it was"
    for prompt, reply in zip(prompts, replies, strict=True):
        assert (reply.token_ids, reply.stopped) == greedy(model, prompt, tokenizer.eos_token_id, 12)
        assert reply.text == tokenizer.decode(reply.token_ids)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("trained", [True, False])
def test_in_mixed_precision_each_weight_is_cast_once(model, tokenizer, monkeypatch, context, trained):
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "_to_copy" in func.name() and args[0].shape == model.transformer.h[0].mlp.c_fc.weight.shape:
                casts.append(args[0])
            return func(*args, **kwargs or {})

    prompt = collate_prompts([tokenizer("SELECT")["input_ids"]], [0])[:2]
    model.requires_grad_(trained)
    with context(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Casts():
            replies = generate(model, *prompt, tokenizer, max_new_tokens=8)
        assert len(casts) == len(model.transformer.h)
        monkeypatch.setattr("dpo_lightning.models.generate.weights_cast_once", lambda model: nullcontext())
        assert generate(model, *prompt, tokenizer, max_new_tokens=8) == replies
    assert all(weight.requires_grad == trained for weight in model.parameters())
    model.requires_grad_(True)


def test_a_reply_ends_at_eos(model, tokenizer):
    prompt = tokenizer("SELECT name")["input_ids"]
    first = generate(model, *collate_prompts([prompt], [0])[:2], tokenizer, 1)[0].token_ids[0]
    silent = AutoModelForCausalLM.from_config(model.config)
    silent.load_state_dict(model.state_dict())
    with torch.no_grad():  # EOS now looks the same to the head as the token that was first, and a little larger
        silent.lm_head.weight.data = silent.lm_head.weight.data.clone()
        silent.lm_head.weight[tokenizer.eos_token_id] = 1.5 * silent.lm_head.weight[first]
    reply = generate(silent, *collate_prompts([prompt], [0])[:2], tokenizer, 12)[0]
    assert reply.stopped and len(reply.token_ids) < 12
    assert tokenizer.eos_token_id not in reply.token_ids


def test_a_prompt_that_leaves_no_room_is_cut_from_the_left(model, tokenizer):
    prompt = (tokenizer("SELECT name FROM singer ")["input_ids"] * 40)[:128]
    assert len(prompt) == 128 == model.config.n_positions
    full = generate(model, *collate_prompts([prompt], [0])[:2], tokenizer, 16)
    assert full == generate(model, *collate_prompts([prompt[16:]], [0])[:2], tokenizer, 16)


PAIRS = [
    PreferencePair("p", " SELECT a FROM t", "", "CREATE TABLE t (a INT)"),
    PreferencePair("p", " SELECT b FROM u", "", "CREATE TABLE u (b INT)"),
    PreferencePair("p", " SELECT a FROM t", "", "this context is no SQL"),
]
TEXTS = (" SELECT a FROM t", " SELECT a FROM t", "select A from t")


def test_judging_uses_each_pairs_own_context():
    judges = find_judges("sql")
    judged = [verdicts(judges, Reply(text, [1, 2], True), pair) for text, pair in zip(TEXTS, PAIRS, strict=True)]
    assert [found["sql/valid"] for found in judged] == [True, False, None]
    assert "sql/valid" not in verdicts(judges, Reply("hello", [1], False), PreferencePair("p", "no SQL here", ""))


def test_shown_replies_cannot_style_the_console(capsys):
    show_replies("now", ["p"], {"before": ["[red]x[/red]\x1b[31m"], "wanted": ["w"]}, {"sql/valid": 0.5})
    printed = capsys.readouterr().out
    assert "[red]x[/red]\\x1b[31m" in "".join(printed.split()).replace("│", "")
    assert "\x1b" not in printed and "valid SQL 50%" in printed and "All " not in printed


def test_a_caption_says_of_how_many_replies_its_means_are(capsys):
    means = {"sql/valid": 0.001, "sql/unjudged": 0.0, "regex/unjudged": 0.25, "reply/length": 9.5, "mine/score": 1234.5}
    show_replies("now", ["p"], {"before": ["a", "b", "c"]}, means)
    caption = " ".join(capsys.readouterr().out.split("┘")[1].split())
    assert caption == "All 3 replies: valid SQL <1%, replies on which regex failed 25%, mine/score 1234"


def test_long_text_is_folded():
    assert fold("a" * 1000, 30) == "a" * 20 + " … " + "a" * 10
    assert fold("short\nlines\tand tabs") == "short\nlines\\tand tabs"


@pytest.fixture
def run(model_folder, tokenizer, rows_file):
    module = DPOModule(str(model_folder), max_new_tokens=8, learning_rate=1e-3)
    data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
    return module, data


def test_replies_are_shown_before_during_and_after(run, quiet_trainer, capsys):
    trainer = quiet_trainer(callbacks=[RepliesCallback(every_n_steps=4, num_prompts=2, num_shown=1)], max_steps=10)
    trainer.fit(*run)
    printed = capsys.readouterr().out
    titles = [line.strip() for line in printed.splitlines() if "Replies, " in line]
    assert titles == [f"Replies, {title}" for title in ("before training", "step 4", "step 8", "step 10")]
    assert "now" in printed and "wanted" in printed and "before" in printed


def test_accumulated_batches_show_a_step_once(run, quiet_trainer, capsys):
    callback = RepliesCallback(every_n_steps=1, num_prompts=1, num_shown=1)
    quiet_trainer(callbacks=[callback], max_steps=3, accumulate_grad_batches=2).fit(*run)
    assert capsys.readouterr().out.count("Replies, step") == 3


def test_testing_judges_the_whole_split(run, quiet_trainer):
    trainer = quiet_trainer(callbacks=[EvaluationCallback()])
    (result,) = trainer.test(*run, verbose=False)
    assert {"test/loss", "test/sql/valid", "test/reply/eos_rate", "test/reply/length"} <= set(result)
    assert result["test/sql/valid"] == 0.0


def test_predictions_are_written_in_order(run, quiet_trainer, tmp_path):
    module, data = run
    output = tmp_path / "sub" / "replies.jsonl"
    quiet_trainer(callbacks=[ReplyWriter(str(output))]).predict(module, data, return_predictions=False)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["row"] for line in lines] == data.row_numbers("test", range(len(data.datasets["test"])))
    for line, pair in zip(lines, data.pairs("test", range(len(lines))), strict=True):
        assert (line["prompt"], line["wanted"], line["context"]) == (pair.prompt, pair.chosen, pair.context)
        assert isinstance(line["reply"], str) and isinstance(line["stopped"], bool)


def test_a_place_that_cannot_be_written_is_found_before_the_work(run, quiet_trainer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="replies cannot be written to"):
        quiet_trainer(callbacks=[ReplyWriter(str(tmp_path / "file" / "replies.jsonl"))]).predict(*run)
