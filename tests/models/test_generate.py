"""Replies: those of transformers' own `generate`, whatever the batch, its samples and the rows that leave it."""

import copy
import functools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from test_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.models.generate import generate
from dpo_lightning.models.sampling import Draws
from dpo_lightning.models.sharding import shard
from ranks import run_ranks

VOCABULARY, LENGTH = 60, 24
PROMPTS = collate_prompts([[i + 2, *range(5, 5 + n)] for i, n in enumerate((20, 3, 11, 1, 7, 2, 16, 5))], range(8))[:2]


@functools.cache
def family(name):
    """A tiny random model; no token ends its replies yet."""
    model_type, settings = FAMILIES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings, vocab_size=VOCABULARY, eos_token_id=None, pad_token_id=None)
    return AutoModelForCausalLM.from_config(config).eval()


def ended_by(eos):
    """A tokenizer, as far as replies need one."""
    return SimpleNamespace(eos_token_id=eos, decode=lambda ids, **_: " ".join(map(str, ids)))


def plain(model, ids, mask, eos, length=LENGTH):
    """Replies of transformers' `generate` to one batch: token ids up to EOS, and whether there was one."""
    config = GenerationConfig(max_new_tokens=length, do_sample=False, eos_token_id=eos, pad_token_id=0)
    routed = {"output_router_logits": False} if "output_router_logits" in model.config.to_dict() else {}
    rows = model.generate(ids, attention_mask=mask, generation_config=config, **routed)[:, ids.shape[1] :].tolist()
    return [(row[: row.index(eos)], True) if eos in row else (row, False) for row in rows]


def found(replies):
    return [(reply.token_ids, reply.stopped) for reply in replies]


@functools.cache
def scattered_eos(name):
    """The token that ends the replies of a family at most different lengths, and those lengths."""
    replies = plain(family(name), *PROMPTS, None)
    lengths = {t: {row.index(t) if t in row else None for row, _ in replies} for t in range(VOCABULARY)}
    eos = max(lengths, key=lambda t: len(lengths[t]))
    return eos, lengths[eos]


@contextmanager
def steps(model):
    """The shapes of the tokens that a model is given: [(rows, tokens)]."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple((kwargs.get("input_ids") if not args else args[0]).shape)),
        with_kwargs=True,
    )
    try:
        yield shapes
    finally:
        hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_replies_are_those_of_transformers(name):
    model = family(name)
    eos, lengths = scattered_eos(name)
    assert len(lengths) > 1
    with steps(model) as shapes:
        replies = generate(model, *PROMPTS, ended_by(eos), LENGTH)
    assert found(replies) == plain(model, *PROMPTS, eos)
    assert shapes[0][0] == 8
    if sum(reply.stopped for reply in replies) > 1:
        assert (shapes[-1][0] < 8) == (name != "Mamba"), "finished rows leave the batch"


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_those_of_prompts_that_come_several_times(name):
    model = family(name)
    eos, _ = scattered_eos(name)
    ids, mask = (tensor[[0, 1, 2, 4]] for tensor in PROMPTS)
    seeds = range(12)
    with steps(model) as shapes:
        replies = generate(model, ids, mask, ended_by(eos), LENGTH, Draws(seeds, 1.0, 1.0, LENGTH), samples=3)
    assert shapes[:2] == ([(4, 20), (12, 1)] if name != "Mamba" else [(12, 21), (12, 1)]), "a prompt is read once"
    repeated = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    assert replies == generate(model, *repeated, ended_by(eos), LENGTH, Draws(seeds, 1.0, 1.0, LENGTH))
    assert len({reply.text for reply in replies}) > 6


def test_a_sample_does_not_hang_on_its_batch():
    model, (eos, _) = family("Llama, SmolLM2"), scattered_eos("Llama, SmolLM2")
    together = generate(model, *PROMPTS, ended_by(eos), LENGTH, Draws(range(16), 1.0, 0.9, LENGTH), samples=2)
    assert {reply.stopped for reply in together} == {True, False}
    for row, (ids, mask) in enumerate(zip(*PROMPTS, strict=True)):
        ids, mask = ids[mask.bool()][None], mask[mask.bool()][None]
        for sample in (2 * row, 2 * row + 1):
            draws = Draws([sample], 1.0, 0.9, LENGTH)
            assert generate(model, ids, mask, ended_by(eos), LENGTH, draws) == [together[sample]]


def test_prompts_of_one_token_have_samples_too():
    model = family("GPT-2")
    for prompts in ([[7], [8]], [[7], [8, 9, 10]]):
        ids, mask = collate_prompts(prompts, [0, 1])[:2]
        replies = generate(model, ids, mask, ended_by(0), 4, samples=2)
        assert found(replies) == [reply for reply in plain(model, ids, mask, 0, 4) for _ in range(2)]


def test_a_batch_whose_replies_all_end_at_once():
    model = family("GPT-2")
    ids, mask = collate_prompts([[7, 8]] * 3, range(3))[:2]
    ((reply, _),) = {(tuple(tokens), stopped) for tokens, stopped in plain(model, ids, mask, None)}
    assert found(generate(model, ids, mask, ended_by(reply[0]), LENGTH)) == [([], True)] * 3


def test_replies_end_at_the_last_position():
    model = family("GPT-2")
    ids = torch.arange(130)[None] % VOCABULARY
    (reply,) = generate(model, ids, torch.ones_like(ids), ended_by(VOCABULARY), 400)
    assert len(reply.token_ids) == 127 and not reply.stopped
    (cut,) = generate(model, ids[:, -1:], torch.ones(1, 1, dtype=torch.int64), ended_by(VOCABULARY), 400)
    assert reply == cut


def test_a_criterion_of_the_callers_ends_a_batch_at_once():
    model = family("GPT-2")
    eos, _ = scattered_eos("GPT-2")
    calls = []

    def stop(input_ids, scores, **kwargs):
        calls.append(len(input_ids))
        return torch.full((len(input_ids),), len(calls) == 2)

    replies = generate(model, *PROMPTS, ended_by(eos), LENGTH, stopping_criteria=[stop])
    assert [tokens for tokens, _ in found(replies)] == [tokens[:2] for tokens, _ in plain(model, *PROMPTS, eos)]


def test_ranks_with_a_sharded_model_wait_for_each_others_replies():
    model, (eos, _) = family("GPT-2"), scattered_eos("GPT-2")
    replies = plain(model, *PROMPTS, eos)
    short = min(range(8), key=lambda row: len(replies[row][0]))
    long = max(range(8), key=lambda row: len(replies[row][0]))

    def rank(number):
        torch.distributed.init_process_group("gloo")
        sharded = copy.deepcopy(model)
        shard(sharded, torch.distributed.init_device_mesh("cpu", (2,)), lambda self: None)
        ids, mask = (tensor[[(short, long)[number]]] for tensor in PROMPTS)
        twice = generate(sharded, ids, mask, ended_by(eos), LENGTH, samples=2)
        return found(twice)

    assert run_ranks(2, rank) == [[replies[short]] * 2, [replies[long]] * 2]
