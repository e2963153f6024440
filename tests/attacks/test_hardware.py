"""Whatever the machine is (Windows, an Apple, a GPU with TF32, several GPUs), it is named right and nothing is lost."""

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.callbacks.report.facts import costs
from dpo_lightning.cli import trainer as commands
from dpo_lightning.cli.entry import main
from dpo_lightning.data.batching import EncodedPair, collate
from dpo_lightning.dpo import logps, shared_prompt
from dpo_lightning.dpo.shared_prompt import choose_scoring
from dpo_lightning.errors import UserError
from dpo_lightning.models import hardware

# ---------------------------------------------------------------------- Windows


@pytest.fixture
def fit(quiet_trainer, model_folder, tokenizer, rows_file, tmp_path):
    """A short run, and its report."""

    def run(**options):
        data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
        trainer = quiet_trainer(max_steps=1, limit_val_batches=0, callbacks=[ReportCallback()], **options)
        trainer.fit(DPOModule(str(model_folder)), data)
        return (tmp_path / "report.html").read_text()

    return run


def test_a_run_ends_well_where_python_has_no_resource_module(fit, monkeypatch):
    monkeypatch.setattr(hardware, "LINUX_STATUS", REPO / "nowhere")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    report = fit()
    assert "peak memory" not in report and "<th>machine</th><td>CPU, " in report
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: type("Info", (), {"peak_wset": 3 * 2**30})())
    monkeypatch.setitem(sys.modules, "psutil", psutil)
    assert "<th>peak memory</th><td>3.00 GiB of the process</td>" in fit()


def test_peak_memory_is_that_of_the_process(fit):
    assert hardware.peak_memory(torch.device("cpu")) > 2**25
    assert "GiB of the process" in fit()


def test_peak_memory_is_not_that_of_the_process_before():
    """getrusage's peak outlives the exec of a new program, and is then that of the one which started it."""
    held = bytearray(os.urandom(2**20)) * 2**10  # 1 GiB, really in memory
    program = "import torch; from dpo_lightning.models.hardware import peak_memory as m; print(m(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 2**25 < int(done.stdout) < len(held)


# ---------------------------------------------------------------------- Apple


def test_apples_gpu_is_not_taken_for_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "cpu_flags", lambda: {"amx_bf16"})
    assert hardware.fastest_precision("auto")[0] == "bf16-mixed"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for accelerator in ("auto", "gpu", "mps"):
        precision, why = hardware.fastest_precision(accelerator)
        assert precision == "32-true" and "Apple" in why and "CPU" not in why
    assert hardware.fastest_precision("cpu")[0] == "bf16-mixed"
    assert hardware.fastest_attention("mps", bf16=True, row_length=70) is None


def test_a_report_of_a_run_on_apples_gpu_names_it(monkeypatch):
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5 * 2**30)
    found = costs(SimpleNamespace(profiler=None, callbacks=[]), torch.device("mps"), 1.0, {})
    assert found["peak memory"] == "5.00 GiB on the GPU"
    assert "Apple" in found["machine"] and "CPU" not in found["machine"]


# ---------------------------------------------------------------------- several GPUs


@pytest.mark.parametrize("strategy", [
    ["fsdp"], ["fsdp_cpu_offload"], ["deepspeed"], ["deepspeed_stage_3_offload"],
    ["lightning.pytorch.strategies.FSDPStrategy"], ["lightning.pytorch.strategies.DeepSpeedStrategy"],
    ["FSDPStrategy"],
])  # fmt: skip
def test_fsdp1_and_deepspeed_are_refused_for_fsdp2(strategy, model_folder, rows_file, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreferenceDataModule, "setup", lambda *_: pytest.fail("data are read"))
    monkeypatch.setattr(commands, "load_config", lambda *_, **__: pytest.fail("a model is looked for"))
    argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
    argv += ["--data.train_dataset", rows_file, "--trainer.devices", "2", "--trainer.strategy", *strategy]
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "is not supported" in line and "ModelParallelStrategy" in line and "configs/fsdp.yaml" in line


def test_fsdp1_is_refused_without_the_command_too(quiet_trainer, model_folder, tokenizer, rows_file, monkeypatch):
    monkeypatch.setattr(PreferenceDataModule, "setup", lambda *_: pytest.fail("data are read"))
    like_lightnings = type("FSDPStrategy", (SingleDeviceStrategy,), {})  # a GPU is needed to make a real one
    trainer = quiet_trainer(strategy=type("Mine", (like_lightnings,), {})(device=torch.device("cpu")))
    with pytest.raises(UserError, match=r"trainer.strategy Mine is not supported: .*configs/fsdp.yaml"):
        trainer.fit(DPOModule(str(model_folder)), PreferenceDataModule(tokenizer, rows_file))


# ---------------------------------------------------------------------- TF32

VOCABULARY = 97
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=6, n_head=4, n_positions=64, initializer_range=0.1),
    "llama": LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, initializer_range=0.15, **WIDE),
    "untrained": GPT2Config(vocab_size=VOCABULARY, n_embd=128, n_layer=12, n_head=4, n_positions=64),
}


def make_model(name, attention="sdpa"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention).eval()


def make_batch():
    generator = torch.Generator().manual_seed(1)

    def ids(length):
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return collate([EncodedPair(ids(8 + 3 * i), ids(6 + i), ids(9 - i)) for i in range(5)], range(5))


@pytest.fixture
def matmul_precision():
    """Sets torch's precision of float32 products, for the test."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_shared_prompt_survives_fast_float32_products(name, precision, matmul_precision):
    # On a GPU either is TF32. On a CPU with bfloat16 products "medium" is those, where the old check failed.
    matmul_precision(precision)
    scoring = choose_scoring(make_model(name), make_batch())
    assert scoring.shared and scoring.gathered, scoring.reason
    assert torch.get_float32_matmul_precision() == precision, "set back"


@pytest.mark.parametrize("api", ["legacy", "of each backend"])
def test_the_comparison_is_made_in_float32_and_what_was_set_comes_back(api, matmul_precision, monkeypatch):
    backends, seen = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul), []
    try:
        if api == "legacy":
            matmul_precision("high")
        else:
            backends[0].fp32_precision = "tf32"
        before = [backend.fp32_precision for backend in backends]
        score = shared_prompt.pair_logps
        monkeypatch.setattr(
            shared_prompt,
            "pair_logps",
            lambda *args: (seen.extend(b.fp32_precision for b in backends), score(*args))[1],
        )
        choose_scoring(make_model("gpt2"), make_batch())
        assert set(seen) == {"ieee"} and [backend.fp32_precision for backend in backends] == before
    finally:
        torch.set_float32_matmul_precision("highest")


def to_tf32(tensor):
    """Rounds float32 to the 10 bits of mantissa that TF32 reads."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32(monkeypatch):
    """Hardware that computes in TF32 whatever it is told, and adds each layout's sums in another order.

    Another order is worth about 1e-6, which is then enough to tip the rounding of inputs over, from layer to layer.
    """
    linear, addmm, generator = F.linear, torch.addmm, torch.Generator().manual_seed(0)

    def shaken(product):
        return product * (1 + 5e-6 * torch.randn(product.shape, generator=generator))

    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: shaken(linear(to_tf32(x), to_tf32(weight), bias)))
    monkeypatch.setattr(torch, "addmm", lambda bias, x, weight: shaken(addmm(bias, to_tf32(x), to_tf32(weight))))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_noise_as_large_as_that_of_tf32_passes(name, tf32):
    scoring = choose_scoring(make_model(name), make_batch())
    assert scoring.shared and scoring.gathered, scoring.reason


def causal_only(segments):
    width = segments.shape[1]
    return torch.ones(len(segments), 1, width, width, dtype=torch.bool).tril()


def last_chosen_seen(segments):
    """Right but for one column: the rejected part also looks at the last token of the chosen one."""
    mask, rejected = logps_mask(segments), segments == logps.PROMPT + 2
    last = (segments == logps.PROMPT + 1).cumsum(1).argmax(1)
    for row, column in enumerate(last.tolist()):
        mask[row, 0, rejected[row], column] = True
    return mask


def first_prompt_token_hidden(segments):
    mask = logps_mask(segments)
    first = (segments == logps.PROMPT).int().argmax(1)
    for row, column in enumerate(first.tolist()):
        mask[row, 0, column + 1 :, column] = False
    return mask


logps_mask = logps.shared_prefix_mask


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("wrong", [causal_only, last_chosen_seen, first_prompt_token_hidden])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_wrong_mask_is_caught(name, wrong, attention, monkeypatch):
    model, batch = make_model(name, attention), make_batch()
    assert choose_scoring(model, batch, may_pack=False).shared
    monkeypatch.setattr(logps, "shared_prefix_mask", wrong)
    assert not choose_scoring(model, batch, may_pack=False).shared


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("wrong", [causal_only, last_chosen_seen])
def test_a_wrong_mask_is_caught_through_the_noise_too(name, wrong, tf32, monkeypatch):
    monkeypatch.setattr(logps, "shared_prefix_mask", wrong)
    assert not choose_scoring(make_model(name), make_batch(), may_pack=False).shared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_wrong_mask_is_caught_in_16_bits_too(name, dtype, monkeypatch):
    model = make_model(name).to(dtype)
    assert choose_scoring(model, make_batch(), may_pack=False).shared
    monkeypatch.setattr(logps, "shared_prefix_mask", causal_only)
    assert not choose_scoring(model, make_batch(), may_pack=False).shared


def test_a_wrong_position_is_caught(monkeypatch):
    inputs = logps._inputs

    def off_by_one(model, batch, window):
        found = inputs(model, batch, window)
        return found if not batch.shared else found | {"position_ids": found["position_ids"] + (batch.segment_ids == 2)}

    monkeypatch.setattr(logps, "_inputs", off_by_one)
    assert not choose_scoring(make_model("gpt2"), make_batch(), may_pack=False).shared


def test_not_a_number_agrees_with_nothing():
    model = make_model("gpt2")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    assert not choose_scoring(model, make_batch(), may_pack=False).shared
