import pytest
import torch
import torch.nn.functional as F
from test_packing import make_batch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dpo_lightning.dpo import logps, products
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.dpo.products import MULTIPLE, ONE_THREAD, ROWS_AT_ONCE, linear, spans

LENGTHS = [(15, 14, 9), (30, 9, 1), (20, 5, 12)]
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, initializer_range=0.2,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def matrix_units(monkeypatch):
    """The way of CPUs with AMX, on any CPU."""
    monkeypatch.setattr(products, "has_matrix_units", lambda: True)
    torch.manual_seed(0)


def make_model(name):
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()


@pytest.mark.parametrize("rows", [641, 700, 1024, 1025, 1303, 1535])
def test_spans_cover_all_rows_in_a_few_widths(rows):
    found = spans(rows)
    assert sorted({row for span in found for row in range(rows)[span]}) == list(range(rows))
    assert all(0 <= s.start < s.stop <= rows and s.stop - s.start <= ROWS_AT_ONCE for s in found)
    assert not any((s.stop - s.start) % MULTIPLE for s in found)
    assert sum(s.stop - s.start for s in found) - rows < MULTIPLE * len(found)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(100, 64, 256), (ONE_THREAD[0] + 100, 160, 96), (700, 96, 200)])
def test_a_linear_layer_and_its_gradients_are_as_exact_as_autocast_makes_them(rows, inner, columns, bias, transposed):
    inputs = torch.randn(1, rows, inner)
    weight = torch.randn(*((inner, columns) if transposed else (columns, inner)))
    offset = torch.randn(columns) if bias else None
    slopes = torch.randn(1, rows, columns)

    def results(layer, dtype):
        given = [None if t is None else t.to(dtype).requires_grad_() for t in (inputs, weight, offset)]
        output = layer(*given)
        output.backward(slopes.to(output.dtype))
        return [output.detach(), *(t.grad for t in given if t is not None)]

    def plain(inputs, weight, bias):
        return F.linear(inputs, weight.t() if transposed else weight, bias)

    def autocast(*given):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(*given)

    exact = results(plain, torch.float64)
    ours = results(lambda *given: linear(*given, transposed=transposed), torch.float32)
    for truth, found, usual in zip(exact, ours, results(autocast, torch.float32), strict=True):
        assert found.dtype == usual.dtype and found.shape == usual.shape
        assert (found - truth).norm() <= 1.05 * (usual - truth).norm()


def test_frozen_weights_get_no_gradient_and_keep_no_inputs():
    inputs, weight = torch.randn(70, 64, requires_grad=True), torch.randn(128, 64)
    output = linear(inputs, weight)
    assert output.grad_fn.saved_tensors[0] is None
    output.sum().backward()
    assert inputs.grad is not None and weight.grad is None


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_computes_its_layers_this_way_and_stays_as_exact(name, monkeypatch):
    model, batch, seen = make_model(name), make_batch(LENGTHS), []

    def record(inputs, weight, *others, **options):
        seen.append(inputs.shape[:-1].numel())
        return linear(inputs, weight, *others, **options)

    monkeypatch.setattr(products, "linear", record)

    def gradients(dtype):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found = pair_logps(model, batch, Scoring(packed=True))
        (found.sums[:, 0] - found.sums[:, 1]).sum().backward()
        return torch.cat([found.token_logps.detach(), *(weight.grad.flatten() for weight in model.parameters())])

    exact = gradients(torch.float32)
    assert not seen, "in float32 nothing changes"
    ours = gradients(torch.bfloat16)
    tokens = sum(map(sum, batch.lengths))
    assert tokens % MULTIPLE and set(seen) == {tokens + -tokens % MULTIPLE}
    assert len(seen) == 2 * (4 if name == "gpt2" else 7)
    monkeypatch.setattr(products, "has_matrix_units", lambda: False)
    assert (ours - exact).norm() <= 1.2 * (gradients(torch.bfloat16) - exact).norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_at_the_end_of_a_packed_row_changes_nothing(name, monkeypatch):
    model, batch = make_model(name), make_batch(LENGTHS)

    def results():
        model.zero_grad()
        found = pair_logps(model, batch, Scoring(packed=True))
        (found.sums[:, 0] - found.sums[:, 1]).sum().backward()
        return [found.token_logps.detach(), *(weight.grad for weight in model.parameters())]

    expected = results()
    monkeypatch.setattr(logps, "padding_for", lambda model, rows: 13)
    for found, truth in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)


def test_gradient_checkpoints_keep_the_layers_of_the_model():
    model, batch = make_model("llama"), make_batch(LENGTHS)
    model.gradient_checkpointing_enable()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        found = pair_logps(model, batch, Scoring(packed=True))
    found.token_logps.sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters())
