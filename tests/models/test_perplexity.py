"""Perplexity and KL on a text are those that transformers and the definition give."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.models.perplexity import compare, predictions, windows


@pytest.fixture
def models(model_folder):
    """A tiny model, and another one."""
    own, other = (AutoModelForCausalLM.from_pretrained(model_folder).eval() for _ in range(2))
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    return own, other


def numbers(model, other, ids):
    texts = windows(ids, model)
    return compare(partial(predictions, model), other and partial(predictions, other), texts)


IDS = torch.randint(256, (300,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.no_grad()
def test_perplexity_is_that_of_transformers_loss(models):
    own, other = models
    ids = torch.tensor([IDS[:100]])
    found = numbers(own, other, IDS[:100])
    assert found["perplexity"] == pytest.approx(own(ids, labels=ids).loss.exp().item(), rel=1e-5)
    assert found["reference_perplexity"] == pytest.approx(other(ids, labels=ids).loss.exp().item(), rel=1e-5)


@torch.no_grad()
def test_kl_is_that_of_its_definition(models):
    own, other = models
    ids = torch.tensor([IDS[:100]])
    p, q = (model(ids).logits[0, :-1].double().softmax(-1) for model in models)
    assert numbers(own, other, IDS[:100])["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_a_model_is_not_far_from_itself_and_alone_has_only_its_perplexity(models):
    own, _ = models
    found = numbers(own, own, IDS[:100])
    assert found["kl"] == 0 and found["perplexity"] == found["reference_perplexity"]
    assert numbers(own, None, IDS[:100]) == {"perplexity": found["perplexity"]}


@torch.no_grad()
def test_a_long_text_is_read_in_pieces_that_fit_the_models_positions(models):
    own, _ = models  # 128 positions
    assert [len(piece) for piece in windows(IDS, own)] == [128, 128, 44]
    assert [len(piece) for piece in windows(IDS[:257], own)] == [128, 128], "one token alone predicts nothing"
    pieces = [torch.tensor([IDS[start : start + 128]]) for start in (0, 128, 256)]
    total = sum(own(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in pieces) / (127 + 127 + 43)
    assert numbers(own, None, IDS)["perplexity"] == pytest.approx(total.exp().item(), rel=1e-5)
