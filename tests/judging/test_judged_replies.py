"""Judged replies of a model: samples with their log-probs, greedy ones with their verdicts."""

import json

import pytest
import torch

from conftest import ROWS
from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.data.generated import Generation, draw_seed
from dpo_lightning.judging.judge import find_score
from dpo_lightning.judging.sampling import JudgedReplies, ScoredDraws
from dpo_lightning.models.generate import generate
from dpo_lightning.models.policy import load_policy
from dpo_lightning.models.reply import Reply


def test_a_log_prob_is_that_of_the_whole_reply_whatever_the_temperature(model_folder, tokenizer, pairs):
    model, generation = load_policy(str(model_folder)), Generation(str(model_folder), 0.5, 0.9, 8)
    prompts = pairs["prompt_ids"][:3]
    # EOS is made likely, so that some replies end by themselves.
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] *= 3
    draws = ScoredDraws([draw_seed(n) for n in range(12)], generation, tokenizer.eos_token_id)
    replies = generate(model, *collate_prompts(prompts, range(3))[:2], tokenizer, 8, draws, samples=4)
    assert {reply.stopped for reply in replies} == {True, False}
    for prompt, reply, logp in zip([p for p in prompts for _ in range(4)], replies, draws.logps.tolist(), strict=True):
        ids = reply.token_ids + [tokenizer.eos_token_id] * reply.stopped
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None]).sum()
        assert logp == pytest.approx(expected.item(), abs=1e-3)


def test_greedy_replies_come_with_verdicts_and_are_found_again(
    model_folder, tokenizer, pairs, quiet_trainer, monkeypatch
):
    def make():
        maker = JudgedReplies(Generation(str(model_folder), max_new_tokens=6), tokenizer, 100, 1, 0, "sql")
        return maker.make(pairs, "replies", 4, quiet_trainer())

    results, model = make(), load_policy(str(model_folder))
    for result, prompt in zip(results, pairs["prompt_ids"], strict=True):
        (reply,) = result["replies"]
        (greedy,) = generate(model, *collate_prompts([prompt], [0])[:2], tokenizer, 6)
        assert reply["text"] == greedy.text and reply["score"] == 0.0
        assert reply["verdicts"]["sql/valid"] is False and reply["verdicts"]["reply/length"] == len(greedy.token_ids)
    monkeypatch.setattr("dpo_lightning.data.generated.load_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    assert json.dumps(make()) == json.dumps(results)


def test_a_sql_score_is_right_wrong_or_unknown(pairs):
    from dpo_lightning.data.pair import PreferencePair

    pair = PreferencePair("p", " SELECT name FROM singer WHERE age = 3", "", ROWS[0]["context"])
    score = find_score("sql")
    for text, expected in (
        (" select name from singer where age = 3", 1.0),
        (" SELECT name FROM singer WHERE 3 = age", 1.0),
        (" SELECT name FROM singer", 0.0),
        (" Paris", 0.0),
    ):
        assert score(Reply(text, [1], True), pair) == expected, text
    assert score(Reply(" Paris", [1], True), pair._replace(context="")) is None
