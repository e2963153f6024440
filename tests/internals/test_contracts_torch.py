"""What `internals/torch.py` and our overrides of `_apply` use is as it was in the installed version of torch."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contracts import contract
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.plugins import HalfPrecision
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from dpo_lightning.internals import torch as internals

holds = functools.partial(contract, "torch")


def test_leave_unscaling_to_lightning():
    with holds(
        "_step_supports_amp_scaling of fused optimizers", "clipping in 16-mixed, which would clip scaled gradients"
    ):
        weight = nn.Parameter(torch.ones(2))
        optimizer, scaler = torch.optim.SGD([weight], lr=1.0, fused=True), torch.amp.GradScaler("cpu", init_scale=64.0)
        assert _optimizer_handles_unscaling(optimizer)
        internals.leave_unscaling_to_lightning(optimizer)
        assert not _optimizer_handles_unscaling(optimizer)
        scaler.scale(weight.sum() / 4).backward()
        scaler.unscale_(optimizer)
        assert weight.grad.tolist() == [0.25, 0.25]
        scaler.step(optimizer)  # and does not unscale again
        assert weight.tolist() == [0.75, 0.75]


GROWTH = """
import torch
from dpo_lightning.internals.torch import keep_few_kernels
linear = torch.nn.Linear(64, 128, bias=False)
def memory(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
def multiply(rows):
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.randn(rows, 64)).sum().backward()
keep_few_kernels()
for rows in range(200, 300): multiply(rows)
before = memory()
for rows in range(300, 400): multiply(rows)
print(memory() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/status").exists() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN multiplies in bfloat16 on CPUs with AVX-512, and Linux says how much memory is used",
)
def test_keep_few_kernels():
    environment = {name: value for name, value in os.environ.items() if name not in internals.KERNEL_CACHES}

    def growth(**variables):
        """MiB of memory that products of 100 shapes keep."""
        run = subprocess.run([sys.executable, "-c", GROWTH], env=environment | variables, capture_output=True)
        return float(run.stdout)

    with holds("the variables that limit kernels kept by oneDNN and ideep", "memory that does not grow with the steps"):
        assert growth() < growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024") / 2


def test_conversions_go_through_apply():
    class Notes(nn.Linear):
        calls = 0

        def _apply(self, fn, *args, **kwargs):
            self.calls += 1
            return super()._apply(fn, *args, **kwargs)

    with holds("Module._apply", "the reference's device, and float32 for metrics and adapters in 16-bit runs"):
        module = Notes(2, 2)
        nn.Sequential(module).to(torch.float64)
        module.bfloat16()
        HalfPrecision("bf16-true").convert_module(module)
        assert module.calls == 3
        internals.convert(module, lambda tensor: tensor.float() + 1)
        assert module.calls == 4 and module.weight.dtype == torch.float32


def test_has_hooks():
    with holds("_forward_hooks and _forward_pre_hooks", "hooks of the LM head, which is computed without a call"):
        module = nn.Linear(2, 2)
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            assert not internals.has_hooks(module)
            handle = register(lambda *args: None)
            assert internals.has_hooks(module)
            handle.remove()


def test_softmax_gradient():
    with holds("aten._softmax_backward_data", "the attention of packed pairs on CPUs (dpo/block_attention.py)"):
        scores, gradient = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
        probabilities = scores.softmax(-1)
        (expected,) = torch.autograd.grad(probabilities, scores, gradient)
        torch.testing.assert_close(internals.softmax_gradient(gradient, probabilities.detach()), expected)


def test_copy_and_lerp_all():
    with holds(
        "torch._foreach_copy_ or torch._foreach_lerp_", "references that move, and adapters that are swapped in"
    ):
        targets = [torch.zeros(2), torch.zeros(3)]
        internals.copy_all(targets, [torch.ones(2), torch.full((3,), 2.0)])
        internals.lerp_all(targets, [torch.zeros(2), torch.zeros(3)], 0.25)
        assert [target.tolist() for target in targets] == [[0.75, 0.75], [1.5, 1.5, 1.5]]


def test_the_state_of_a_schedule():
    with holds("the state of LambdaLR", "the check of an edited checkpoint's learning rates"):
        optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.5)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        assert {"base_lrs": [0.5], "last_epoch": 0, "_last_lr": [0.5]}.items() <= schedule.state_dict().items()
        assert optimizer.param_groups[0]["initial_lr"] == 0.5
