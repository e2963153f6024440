import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen2MoeConfig

from dpo_lightning.data.batching import EncodedPair, collate, to_packed
from dpo_lightning.dpo import block_attention, packing
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.packing import PACKED, Plan, attend_in_blocks, attend_padded, attend_varlen
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.models.generate import evaluating

VOCABULARY = 97
BASE = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = BASE | {"initializer_range": 0.4, "intermediate_size": 64, "max_position_embeddings": 64}
GROUPED |= {"num_key_value_heads": 2}
MIXED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": Qwen2Config(**GROUPED, **MIXED),
    # has its window in no argument of the attention function
    "qwen2_moe": Qwen2MoeConfig(**GROUPED, **MIXED, **EXPERTS, shared_expert_intermediate_size=32),
}
# Prompt, chosen, rejected: the second rejected completion is EOS alone.
LENGTHS = [(5, 4, 2), (20, 9, 1), (17, 1, 12), (3, 2, 3)]


def make_model(name, attention="eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()


def make_batch(lengths=LENGTHS):
    ids = [torch.randint(3, VOCABULARY, (sum(each),)).tolist() for each in lengths]
    pairs = [EncodedPair(i[:p], i[p : p + c], i[p + c :]) for i, (p, c, _) in zip(ids, lengths, strict=True)]
    return collate(pairs, range(len(pairs)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


def by_sequence(query, key, value, cumulative_queries, cumulative_keys, scale, window):
    """Attention one sequence after the other, from the definition."""
    outputs = []
    edges = zip(cumulative_queries, cumulative_queries[1:], cumulative_keys, cumulative_keys[1:], strict=False)
    for q0, q1, k0, k1 in edges:
        share = query.shape[1] // key.shape[1]
        q, k, v = query[q0:q1], key[k0:k1].repeat_interleave(share, 1), value[k0:k1].repeat_interleave(share, 1)
        own, other = torch.arange(k1 - k0)[-len(q) :, None], torch.arange(k1 - k0)
        seen = (other <= own) & (other > own - (window or 1000))
        scores = torch.einsum("qhd,khd->hqk", q, k).mul(scale).masked_fill(~seen, -math.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def tensors_for(sequences, heads, key_heads):
    sizes = (int(sequences.queries.sum()), heads, 8), (int(sequences.keys.sum()), key_heads, 8)
    query, key, value = (torch.randn(*size, requires_grad=True) for size in (sizes[0], sizes[1], sizes[1]))
    return query, key, value


@pytest.fixture(params=["at once", "in small blocks"])
def blocks(request, monkeypatch):
    if request.param == "in small blocks":
        for name, value in {"QUERIES": 4, "SCORES": 300, "KEPT": 0}.items():
            monkeypatch.setattr(block_attention, name, value)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [LENGTHS, [(5, 4, 1), (20, 9, 1)]])
def test_attention_in_blocks_and_its_gradients_are_those_of_single_sequences(key_heads, window, lengths, blocks):
    plan = Plan(to_packed(make_batch(lengths)))
    tokens = int(plan.rows.lengths.sum())
    inputs = [torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, key_heads, key_heads)]
    first = int(plan.tokens.sum())
    expected = [by_sequence(*(x[:first] for x in inputs), *edges_of(plan.chosen), 0.3, window)]
    if plan.rejected:
        keys, values = (x[plan.rejected.key_index] for x in inputs[1:])
        expected.append(by_sequence(inputs[0][first:], keys, values, *edges_of(plan.rejected), 0.3, window))
    check(attend_in_blocks(*inputs, plan.rows, 0.3, window), torch.cat(expected), inputs)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("part", ["chosen", "rejected"])
def test_padded_attention_and_its_gradients_are_those_of_single_sequences(key_heads, window, part):
    sequences = getattr(Plan(to_packed(make_batch())), part)
    inputs = tensors_for(sequences, 4, key_heads)
    expected = by_sequence(*inputs, *edges_of(sequences), 0.3, window)
    check(attend_padded(*inputs, sequences, 0.3, window), expected, inputs)


def edges_of(sequences):
    return [numbers.tolist() for numbers in sequences.cumulative]


def check(found, expected, inputs):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    factor = torch.randn_like(expected)
    for a, b in zip(*(torch.autograd.grad(output, inputs, factor) for output in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("part", ["chosen", "rejected"])
def test_flash_attention_is_given_the_same_sequences(part, window, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def reference(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert cu_q.dtype == cu_k.dtype == torch.int32 and enable_gqa
        assert all(tensor.is_contiguous() for tensor in (query, key, value))
        assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
        left, right = window_size
        assert right == 0  # causal, counted from the last query and key
        return by_sequence(query, key, value, cu_q.tolist(), cu_k.tolist(), scale, left + 1)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    sequences = getattr(Plan(to_packed(make_batch())), part)
    inputs = tensors_for(sequences, 4, 2)
    found, expected = (attend(*inputs, sequences, 0.3, window) for attend in (attend_varlen, attend_padded))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_is_chosen_by_device_and_dtype(monkeypatch):
    class OnCuda:
        device, is_cuda, shape = torch.device("cuda"), True, (5, 4, 64)

        def __init__(self, dtype):
            self.dtype = dtype

    for there, dtype, expected in [
        (True, torch.bfloat16, True),
        (True, torch.float32, False),
        (False, torch.bfloat16, False),
    ]:
        monkeypatch.setattr(packing, "has_varlen", lambda device, there=there: there)
        assert packing._takes_varlen(OnCuda(dtype), OnCuda(dtype)) is expected


@pytest.mark.parametrize("attend", [attend_padded, attend_varlen])
@torch.no_grad()
def test_the_kernels_of_other_devices_agree_with_the_cpus(attend, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def reference(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        return by_sequence(query, key, value, cu_q.tolist(), cu_k.tolist(), scale, window_size[0] + 1)

    monkeypatch.setattr(varlen, "varlen_attn", reference)
    model, batch = make_model("qwen2"), make_batch()
    truth = pair_logps(model, batch, Scoring(packed=True)).token_logps

    def elsewhere(query, key, value, rows, scale, window):
        found = packing.attend_in_pieces(attend, query, key, value, plans[0], scale, window)
        return found

    plans = [Plan(to_packed(batch))]
    monkeypatch.setattr(packing, "attend_in_blocks", elsewhere)
    torch.testing.assert_close(pair_logps(model, batch, Scoring(packed=True)).token_logps, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_packed_row_has_the_log_probs_and_gradients_of_separate_forwards(name, checkpointing):
    model, batch = make_model(name), make_batch()
    scoring = choose_scoring(model, batch)
    assert scoring.packed and batch.position_ids.max() > 8, "past the window"
    results = []
    for used, attention in ((scoring, PACKED), (Scoring(shared=False, gathered=False), "eager")):
        model.set_attn_implementation(attention)
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        found = pair_logps(model, batch, used)
        (found.sums[:, 0] - found.sums[:, 1]).sigmoid().log().sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((found.token_logps, gradient))
    for packed, separate in zip(*results, strict=True):
        assert (packed - separate).norm() <= 1e-5 * separate.norm()


@torch.no_grad()
def test_the_model_reads_real_tokens_alone_and_makes_no_mask():
    model, batch = make_model("llama", "sdpa"), make_batch()
    seen = []
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["hidden_states"].shape, kwargs["attention_mask"].numel())),
        with_kwargs=True,
    )
    pair_logps(model, batch, Scoring(packed=True))
    assert seen == [((1, sum(p + c - 1 + r - 1 for p, c, r in LENGTHS), 32), 0)]


@torch.no_grad()
def test_all_rejected_empty_needs_one_piece():
    model, batch = make_model("llama"), make_batch([(5, 3, 1), (9, 4, 1)])
    assert Plan(to_packed(batch)).rejected is None
    truth = pair_logps(model, batch, Scoring(shared=False, gathered=False)).token_logps
    torch.testing.assert_close(pair_logps(model, batch, Scoring(packed=True)).token_logps, truth, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_wrong_plan_is_found_out_and_the_model_keeps_its_own_attention(monkeypatch):
    class SeesTheChosenPart(Plan):
        def __init__(self, batch):
            super().__init__(batch)
            self.rows.tokens = self.rows.prompt

    monkeypatch.setattr(packing, "Plan", SeesTheChosenPart)
    model = make_model("llama")
    scoring = choose_scoring(model, make_batch())
    assert scoring.shared and not scoring.packed
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_a_packed_model_generates_and_saves_as_before(tmp_path):
    model = make_model("llama", "sdpa")
    prompts = torch.randint(3, VOCABULARY, (2, 6))
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0

    def replies():
        with evaluating(model):
            return model.generate(prompts, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)

    before = replies()
    assert choose_scoring(model, make_batch()).packed and model.config._attn_implementation == PACKED
    assert torch.equal(replies(), before)
    model.save_pretrained(tmp_path)
    assert PACKED not in (tmp_path / "config.json").read_text()


@torch.no_grad()
def test_a_plan_that_does_not_arrive_is_an_error():
    # A model that keeps its forward's arguments to itself must not attend to all that stands before in the row.
    model, batch = make_model("llama"), make_batch()
    layer = model.model.layers[0].self_attn
    forward = layer.forward
    layer.forward = lambda **kwargs: forward(**{k: v for k, v in kwargs.items() if k != "plan"})
    with pytest.raises(RuntimeError, match="mask"):
        pair_logps(model, batch, Scoring(packed=True))
    scoring = choose_scoring(model, batch)
    assert scoring.shared and not scoring.packed


@torch.no_grad()
def test_bfloat16_autocast_stays_as_close_as_unpacked():
    model, batch = make_model("llama"), make_batch()
    exact = pair_logps(model, batch).token_logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [
            (pair_logps(model, batch, Scoring(packed=packed)).token_logps - exact).abs().mean()
            for packed in (False, True)
        ]
    assert errors[1] < 1.5 * errors[0]
