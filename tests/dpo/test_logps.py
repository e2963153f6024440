import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
)

from dpo_lightning.data.batching import EncodedPair, collate
from dpo_lightning.dpo import head, logps, shared_prompt
from dpo_lightning.dpo.head import head_logps
from dpo_lightning.dpo.logps import Scoring, pair_logps, within_window
from dpo_lightning.dpo.reference import FrozenCopy
from dpo_lightning.dpo.shared_prompt import choose_scoring, scoring_from_config

VOCABULARY = 97
# A large initial spread: with the usual 0.02 a tiny model hardly looks at its context and any mask would pass.
BASE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SPREAD = BASE | {"initializer_range": 0.4, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED = SPREAD | {"num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "gpt_neox": GPTNeoXConfig(**SPREAD),
    "opt": OPTConfig(**BASE, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64, init_std=0.3),
    "phi": PhiConfig(**SPREAD),
    "cohere": CohereConfig(**GROUPED),  # scales its logits
    "granite": GraniteConfig(**GROUPED, logits_scaling=4.0),  # divides them
    "gemma2": Gemma2Config(**GROUPED, head_dim=8),  # caps them
    "qwen2-mixed": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "mamba": MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3
    ),
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
}
SHARES = ("gpt2", "llama", "qwen2", "gpt_neox", "opt", "phi")
BY_FULL_LOGITS = Scoring(shared=False, gathered=False)


def make_model(name, attention="eager"):
    torch.manual_seed(0)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()


def make_batch(pairs=5):
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return collate([EncodedPair(ids(3 + 2 * i), ids(2 + i), ids(1 + 3 * i % 5)) for i in range(pairs)], range(pairs))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", SHARES)
@torch.no_grad()
def test_shared_prefix_equals_separate_forwards(name, attention, packed):
    model, batch = make_model(name, attention), make_batch()
    truth = pair_logps(model, batch, BY_FULL_LOGITS)
    scoring = choose_scoring(model, batch, may_pack=packed)
    assert scoring.shared and scoring.gathered and scoring.packed == packed
    shared = pair_logps(model, batch, scoring)
    assert (shared.sums - truth.sums).abs().max() <= 1e-4
    assert truth.sums.std() > 1, "the log-probs must differ enough for the comparison to mean something"


def test_gradients_are_equal_too():
    model, batch = make_model("gpt2"), make_batch()
    gradients = []
    for scoring in (Scoring(), BY_FULL_LOGITS):
        model.zero_grad()
        sums = pair_logps(model, batch, scoring).sums
        (sums[:, 0] - sums[:, 1]).sigmoid().log().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2"])
@torch.no_grad()
def test_heads_that_change_their_logits_are_followed(name):
    model, batch = make_model(name), make_batch()
    scoring = choose_scoring(model, batch)
    assert scoring.gathered
    torch.testing.assert_close(
        pair_logps(model, batch, scoring).sums, pair_logps(model, batch, BY_FULL_LOGITS).sums, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["mamba", "bloom"])
@torch.no_grad()
def test_models_that_cannot_share_fall_back_and_say_so(name):
    model, batch = make_model(name), make_batch()
    scoring = choose_scoring(model, batch)
    assert not scoring.shared
    assert name in scoring.reason
    torch.testing.assert_close(pair_logps(model, batch, scoring).sums, pair_logps(model, batch, BY_FULL_LOGITS).sums)


@torch.no_grad()
def test_a_model_that_is_wrongly_listed_is_found_out(monkeypatch):
    # The mask would be ignored or refused: the comparison on real pairs must notice either.
    monkeypatch.setattr(shared_prompt, "SHARED_PREFIX_MODEL_TYPES", {"mamba", "bloom"})
    for name in ("mamba", "bloom"):
        scoring = choose_scoring(make_model(name), make_batch())
        assert not scoring.shared
        assert "differ from those of separate forwards" in scoring.reason


@torch.no_grad()
def test_an_empty_rejected_does_not_blind_the_check(monkeypatch):
    # With EOS alone rejected a row is plainly causal, so only probing with real completions can show a wrong mask.
    monkeypatch.setattr(
        logps,
        "shared_prefix_mask",
        lambda segments: (
            torch.ones(1, 1, 1, 1).bool().expand(len(segments), 1, segments.shape[1], segments.shape[1]).tril()
        ),
    )
    batch = collate([EncodedPair([5, 6 + i], [7, 8 + i, 2], [2]) for i in range(3)], range(3))
    assert not choose_scoring(make_model("gpt2"), batch, may_pack=False).shared


@pytest.mark.parametrize("name", ["mistral", "qwen2-mixed"])
@torch.no_grad()
def test_rows_longer_than_a_sliding_window_are_exact(name, monkeypatch):
    # One mask for all layers, and a mask for each kind of layer. The rejected part begins far from its prompt.
    model, batch = make_model(name), make_batch()
    scoring = scoring_from_config(model.config)
    assert scoring == Scoring(window=8) and batch.position_ids.max() > 8
    truth = pair_logps(model, batch, BY_FULL_LOGITS).sums
    torch.testing.assert_close(pair_logps(model, batch, scoring).sums, truth, rtol=1e-4, atol=1e-4)
    without = pair_logps(model, batch, scoring._replace(window=None)).sums
    assert (without - truth).abs().max() > 0.1, "the window must matter"


def test_a_window_is_counted_on_positions():
    # prompt of 2, chosen 2, rejected 2: the rejected part's positions run on from the prompt
    found = within_window(torch.tensor([[0, 1, 2, 3, 2, 3]]), 2)[0, 0]
    assert found[4].tolist() == [False, True, True, True, True, True]
    assert found[3].tolist() == [False, False, True, True, True, True]


def test_alibi_and_switched_off_windows_are_read_from_the_config():
    assert not scoring_from_config(type(CONFIGS["gpt2"])(alibi=True)).shared
    assert scoring_from_config(Qwen2Config(**GROUPED, sliding_window=8, use_sliding_window=False)).window is None


def head_results(model, hidden, targets, factors):
    """Log-probs by the head, and the gradients of hidden states and weights."""
    model.zero_grad()
    hidden = hidden.clone().requires_grad_()
    values = head_logps(model, hidden, targets)
    (values * factors).sum().backward()
    return values.detach(), hidden.grad, model.lm_head.weight.grad


@pytest.mark.parametrize("plain", [True, False])
def test_logits_are_computed_again_where_they_take_too_much_memory(plain, monkeypatch):
    if not plain:
        monkeypatch.setattr(head, "plain_head", lambda model: None)
    monkeypatch.setattr(head, "LEAST_PART", 40)  # of the 97 tokens
    monkeypatch.setattr(head, "LOGITS_IN_CACHE", 1)
    model, hidden = make_model("gpt2"), torch.randn(50, 32)
    inputs = model, hidden, torch.randint(0, VOCABULARY, (50,)), torch.randn(50)
    at_once = head_results(*inputs)
    monkeypatch.setattr(head, "LOGITS_KEPT", 7 * VOCABULARY * 4)
    for one, other in zip(at_once, head_results(*inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_head_in_parts_is_that_of_cross_entropy(name, monkeypatch):
    monkeypatch.setattr(head, "LEAST_PART", 40)
    monkeypatch.setattr(head, "LOGITS_IN_CACHE", 1)
    model, hidden, factors = make_model(name), torch.randn(11, 32), torch.randn(11)
    targets = torch.tensor([0, 39, 40, 79, 80, 96, 5, 5, 5, 12, 60])  # at the edges of the parts, and repeated
    found = head_results(model, hidden, targets, factors)
    model.zero_grad()
    hidden.requires_grad_()
    values = -F.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    (values * factors).sum().backward()
    for one, other in zip(found, (values.detach(), hidden.grad, model.lm_head.weight.grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_in_16_bits_a_head_in_parts_is_closer_to_float32(monkeypatch):
    model = make_model("llama").bfloat16().float()  # so that the logits alone are rounded
    hidden = torch.randn(1000, 32).bfloat16().float()
    targets = torch.multinomial(model.lm_head(hidden).softmax(-1), 1).squeeze(1)
    exact = head_results(model, hidden, targets, torch.ones(1000))
    errors = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(head, "plain_head", lambda model: None)
        with torch.autocast("cpu", torch.bfloat16):
            found = head_results(model, hidden, targets, torch.ones(1000))
        errors.append([float((one - other).abs().mean()) for one, other in zip(found, exact, strict=True)])
    in_parts, whole = errors
    assert in_parts[0] < 0.7 * whole[0]
    assert in_parts[1] < 1.1 * whole[1] and in_parts[2] < 1.1 * whole[2]


def gradients(model, scoring, value=lambda logps: logps.square().sum()):
    """Gradients of all parameters, with two backward passes added up."""
    model.zero_grad()
    for batch in (make_batch(), make_batch(4)):
        value(pair_logps(model, batch, scoring).token_logps).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def pad_with_a_token(model):
    model.transformer.wte.padding_idx = int(make_batch().input_ids[0, 0])  # its row gets no gradient from the embedding


def scale_in_a_hook(model):
    model.transformer.wte.register_forward_hook(lambda module, inputs, output: 2 * output)


def freeze_the_embedding(model):
    model.transformer.wte.weight.requires_grad_(False)


CHANGES = [lambda model: None, untie, pad_with_a_token, scale_in_a_hook, freeze_the_embedding]


@pytest.mark.parametrize("change", CHANGES)
def test_the_embeddings_gradient_is_that_of_full_logits(change):
    model = make_model("gpt2")
    change(model)
    found, expected = (gradients(model, scoring) for scoring in (Scoring(), BY_FULL_LOGITS))
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-3, msg=name)


def test_of_a_tied_embedding_and_head_no_second_gradient_is_made():
    model, batch = make_model("gpt2"), make_batch()
    loss = pair_logps(model, batch, Scoring()).token_logps.sum()
    shape = list(model.transformer.wte.weight.shape)
    with torch.profiler.profile(record_shapes=True) as profiler:
        loss.backward()
    sums = ("aten::add", "aten::add_", "aten::zeros_like", "aten::embedding_dense_backward")
    assert not [event.key for event in profiler.events() if event.key in sums and shape in event.input_shapes]


def test_a_tied_heads_gradient_is_whole_where_the_embedding_has_none():
    model, hidden, targets = make_model("gpt2"), torch.randn(5, 32), torch.arange(5)
    with head.tied_embedding(model) as tied:
        pass  # nothing was embedded
    results = []
    for given in (tied, None):
        model.zero_grad()
        head_logps(model, hidden, targets, given).sum().backward()
        results.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*results)


def test_in_float16_the_loss_scale_keeps_the_gradients_of_unlikely_tokens():
    model, hidden, targets = make_model("gpt2"), torch.ones(1, 32), torch.tensor([0])
    with torch.no_grad():
        model.lm_head.weight.zero_()[0] = 18 / 32  # so that each other token has a probability of 1.5e-8
    gradients = []
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", torch.float16, enabled=dtype == torch.float16):
            gradients.append(head_results(model, hidden, targets, torch.tensor([2.0**16]))[2][1:])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0)
    assert (gradients[0] < 0).all()


@pytest.mark.parametrize("name", ["cohere", "granite", "gemma2", "phi"])
def test_a_head_that_is_more_than_a_product_is_called(name):
    assert head.plain_head(make_model(name)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_target_log_probs_and_their_gradient_are_those_of_cross_entropy(dtype, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_IN_CACHE", 3 * VOCABULARY)  # blocks of 3 rows, and one of 2
    targets, factors = torch.randint(0, VOCABULARY, (11,)), torch.randn(11)
    hidden, weight = torch.randn(11, 8).to(dtype), (3 * torch.randn(VOCABULARY, 8)).to(dtype).requires_grad_()
    (values := head.target_logps(hidden @ weight.T, targets)).backward(factors)
    found, weight.grad = weight.grad, None
    (expected := -F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")).backward(factors)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(found, weight.grad)


def test_logits_that_the_backward_pass_has_written_over_are_not_used_again():
    logits = torch.randn(4, VOCABULARY, requires_grad=True) * 1
    values = head.target_logps(logits, torch.arange(4)).sum()
    values.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.backward()


def test_the_head_sees_only_predicting_positions():
    model, batch = make_model("llama"), make_batch()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    pair_logps(model, batch)  # a hook is called, so the head is too
    assert seen == [(batch.targets.numel(), VOCABULARY)]


def test_lengths_count_eos():
    batch = collate([EncodedPair([5, 6], [7, 8, 2], [9, 2]), EncodedPair([5], [7, 2], [2])], [0, 1])
    assert pair_logps(make_model("gpt2"), batch).lengths.tolist() == [[3, 2], [2, 1]]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2", "gpt_neox", "opt", "phi", "mamba", "bloom"])
@torch.no_grad()
def test_a_reference_kept_in_the_dtype_of_its_products_is_bitwise_the_same(name):
    model, batch = make_model(name), make_batch()
    scoring = choose_scoring(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = pair_logps(model, batch, scoring)
    reference = FrozenCopy(model, torch.bfloat16)
    assert torch.equal(reference.logps(batch, scoring).token_logps, expected.token_logps)
    sizes = [sum(p.numel() * p.element_size() for p in m.parameters()) for m in (reference.model, model)]
    assert sizes[0] < 0.8 * sizes[1]


@torch.no_grad()
def test_bfloat16_autocast_stays_close_and_sums_in_float32():
    model, batch = make_model("gpt2"), make_batch()
    exact = pair_logps(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = pair_logps(model, batch)
    assert rounded.token_logps.dtype == torch.float32
    assert (exact.token_logps - rounded.token_logps).abs().max() < 0.2
