"""Two processes train as one does: DDP and FSDP2 on the CPU, and torchrun over two hosts."""

import copy
import csv
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from test_logps import make_batch, make_model
from transformers import AutoModelForCausalLM

from conftest import REPO, ROWS
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.logps import FAST, compute_pair_logps, pair_logps
from dpo_lightning.errors import UserError
from dpo_lightning.models.policy import add_lora
from dpo_lightning.models.sharding import data_parallel_mesh, gathered, shard
from ranks import TIMEOUT, run_ranks

DDP = ("--trainer.strategy", "ddp")
FSDP = (
    "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1",
    "--trainer.strategy.save_distributed_checkpoint", "false",
)  # fmt: skip


@pytest.fixture
def fit(tmp_path, model_folder, write_rows, monkeypatch):
    """Trains through the CLI on a number of processes and gives train/loss of each step."""
    rows = write_rows(ROWS[:37])  # 29 to train on: neither 8 nor 2 divides them

    def run(ranks, folder, *args, strategy=DDP, batch=8):
        monkeypatch.chdir(tmp_path)
        where = tmp_path / folder
        argv = ["fit", "--model.name_or_path", str(model_folder), "--data.train_dataset", rows]
        argv += ["--data.val_size", "0.1", "--data.test_size", "0.1", "--data.max_length", "128"]
        argv += ["--data.batch_size", str(batch // ranks), "--data.rejected", "shuffled"]
        argv += ["--model.learning_rate", "1e-3", "--model.warmup_steps", "0", "--model.max_new_tokens", "4"]
        argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.max_epochs", "1"]
        argv += ["--trainer.log_every_n_steps", "1", "--trainer.gradient_clip_val", "1.0"]
        argv += ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", str(where)]
        argv += ["--replies.num_prompts", "2", "--replies.every_n_steps", "0"]
        argv += ["--trainer.enable_progress_bar", "false", "--export.folder", str(where / "out")]
        if ranks > 1:
            argv += ["--trainer.devices", str(ranks), *strategy]
        argv += args
        if ranks == 1:
            assert main(argv) == 0
        else:
            # A group that outlives its command can abort the process at exit (`leave_process_group`).
            assert run_ranks(ranks, lambda rank: (main(argv), torch.distributed.is_initialized())) == [(0, False)] * 2
        return curve(where)

    return run


def curve(folder):
    (path,) = folder.glob("lightning_logs/version_0/metrics.csv")
    with path.open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def forgetting(folder):
    """Perplexity before and after training, then that of the reference, then the KL."""
    (path,) = folder.glob("lightning_logs/version_0/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    names = ("perplexity", "reference_perplexity", "kl")
    return [float(row[f"forgetting/{name}"]) for name in names for row in rows if row[f"forgetting/{name}"]]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_the_same_global_batches_give_the_same_losses(fit, tmp_path, strategy):
    alone, together = fit(1, "one"), fit(2, "two", strategy=strategy)
    assert len(alone) == 4
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-5)
    one, two = weights(tmp_path / "one" / "out"), weights(tmp_path / "two" / "out")
    forgotten = [forgetting(tmp_path / folder) for folder in ("one", "two")]
    assert len(forgotten[0]) == 4 and forgotten[1] == pytest.approx(forgotten[0], rel=1e-3)
    for name, weight in one.items():  # Adam makes much of a gradient of 0
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_weights_gathered_in_16_bits_give_the_same_bits_as_autocast(name, lora):
    model, batch = make_model(name), make_batch()
    if lora:
        model = add_lora(model, {"r": 2, "init_lora_weights": False})

    def one_pass(mesh, product_dtype):
        policy = copy.deepcopy(model)
        causal_lm = policy.get_base_model() if lora else policy
        shard(causal_lm, mesh, compute_pair_logps, product_dtype)
        seen, kept = set(), {}
        for part in policy.modules():
            if isinstance(getattr(part, "weight", None), torch.nn.Parameter):
                part.register_forward_hook(lambda part, *_: seen.add((type(part).__name__, part.weight.dtype)))

        def keep(tensor):  # a copy of a weight would outlive the layer
            if tensor.dtype == torch.bfloat16 and sorted(tensor.shape) in ([32, 64], [32, 128]):
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            logps = pair_logps(causal_lm, batch, FAST)
        held = sum(storage.size() for storage in kept.values())
        (logps.sums[:, 1] - logps.sums[:, 0]).sum().backward()
        gradients = {n: gathered(w.grad) for n, w in policy.named_parameters() if w.grad is not None}
        return {"": logps.token_logps} | gradients, seen, held

    def rank(number):
        torch.distributed.init_process_group("gloo")
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        (expected, _, copied), (found, seen, held) = one_pass(mesh, None), one_pass(mesh, torch.bfloat16)
        equal = {n: torch.equal(found[n], values) for n, values in expected.items()}
        return equal, seen, copied, held

    for equal, seen, copied, held in run_ranks(2, rank):
        assert len(equal) > 8 and all(equal.values())
        assert copied > 0 == held
        assert (("Conv1D" if name == "gpt2" else "Linear"), torch.bfloat16) in seen
        assert {dtype for kind, dtype in seen if "Norm" in kind or kind == "Embedding"} == {torch.float32}


def test_a_sharded_run_in_mixed_precision_learns_as_one_process_does(fit):
    options = ("--trainer.precision", "bf16-mixed")
    alone, together = fit(1, "one", *options), fit(2, "two", *options, strategy=FSDP)
    assert len(alone) == 4 and together == pytest.approx(alone, abs=0.02)


LORA = ("--model.lora", "{r: 4}", "--export.merge", "true")
MOVING = ("--model.sync_ref_model", "true", "--model.ref_model_sync_steps", "1")


@pytest.mark.parametrize(
    ("sharded", "options"),
    [("false", (*MOVING, "--trainer.precision", "bf16-mixed")), ("true", LORA + MOVING)],
    ids=["one-file-moving-mixed", "a-file-per-rank-lora-moving"],
)
def test_a_sharded_run_resumes_from_its_checkpoint_and_exports(fit, tmp_path, sharded, options):
    args = (
        *options,
        "--trainer.strategy.save_distributed_checkpoint",
        sharded,
        "--checkpoint.every_n_train_steps",
        "2",
    )
    args += (
        "--checkpoint.save_weights_only",
        "false",
        "--checkpoint.save_top_k",
        "-1",
        "--checkpoint.monitor",
        "null",
        "--trainer.limit_val_batches",
        "0",
    )
    losses = fit(2, "whole", *args, strategy=FSDP)
    (checkpoint,) = (tmp_path / "whole").rglob("step2.ckpt")
    assert checkpoint.is_dir() == (sharded == "true")
    resumed = fit(2, "resumed", *args, "--ckpt_path", str(checkpoint), strategy=FSDP)
    assert resumed[-1] == losses[-1]
    whole, again = weights(tmp_path / "whole" / "out"), weights(tmp_path / "resumed" / "out")
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def arguments(model_folder, rows_file, folder):
    args = ["fit", "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
    args += ["--data.val_size", "4", "--data.test_size", "0", "--data.max_length", "128", "--data.batch_size", "10"]
    args += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.max_epochs", "1"]
    args += ["--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar", "false"]
    return [*args, "--replies.num_prompts", "2", "--model.max_new_tokens", "4"]


def can_make_networks():
    if os.geteuid() or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", f"dpo-probe-{os.getpid()}"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", f"dpo-probe-{os.getpid()}"], capture_output=True)
    return made


def run_to_the_end(command, cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as started:
        try:
            said = started.communicate(timeout=TIMEOUT)[1]
        except subprocess.TimeoutExpired:
            started.terminate()
            pytest.fail(f"the command hangs; it said:\n{started.communicate()[1][-3000:]}")
    assert started.returncode == 0, said[-3000:]
    assert "on 2 × CPU" in said
    (run,) = (cwd / "lightning_logs").iterdir()
    assert (run / "huggingface" / "model.safetensors").is_file()
    assert list((run / "checkpoints").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_two_processes_train_from_one_command(hosts, model_folder, write_rows, tmp_path):
    # 41 pairs in steps of 20: the last one would be left to one process, while the other waits.
    args = arguments(model_folder, write_rows(ROWS[:45]), tmp_path)
    if hosts == 1:  # Lightning starts the second process
        run_to_the_end([sys.executable, str(REPO / "cli.py"), *args, "--trainer.devices", "2"], tmp_path)
    elif can_make_networks():
        script = str(REPO / "tests" / "two_hosts.sh")
        args += ["--trainer.num_nodes", "2", "--trainer.devices", "1"]
        run_to_the_end([script, sys.executable, *args], tmp_path)
    else:
        pytest.skip("network namespaces need root and iproute2")


def test_splitting_layers_is_refused():
    mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 2), "data_parallel": SimpleNamespace(size=lambda: 1)}
    with pytest.raises(UserError, match="set its data_parallel_size to the number of processes"):
        data_parallel_mesh(mesh)
