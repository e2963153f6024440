"""What `internals/libc.py` uses of glibc, and what a fit does with it."""

import ctypes
import functools
import os
import subprocess
import sys

import pytest
from contracts import contract
from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lightning.dpo.kept_memory import KeepMemory
from dpo_lightning.internals import libc

holds = functools.partial(contract, "torch")  # whose tensors the C library allocates
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="mallopt is glibc's, on Linux"
)
# Prints whether memory is kept, how often pages were cleared for a tensor that was allocated again, and the MiB in use
# before, with and after the freed memory.
USE = """
import resource, torch
from dpo_lightning.internals import libc
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def memory(): return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
def use(): [torch.ones(2**24), torch.ones(2**20)]
use()
before = memory()
kept = libc.keep_freed()
for _ in range(10): use()  # glibc aligns tensors, for which a block of exactly their size is too small
began = faults()
use()
print(kept, faults() - began, memory() - before)
libc.release_freed()
print(memory() - before)
"""


def use(**variables):
    environment = {name: value for name, value in os.environ.items() if name not in (*libc.SETTINGS, "GLIBC_TUNABLES")}
    run = subprocess.run([sys.executable, "-c", USE], env=environment | variables, capture_output=True, text=True)
    assert not run.returncode, run.stderr
    kept, faults, memory, released = run.stdout.split()
    return kept == "True", int(faults), float(memory), float(released)


def test_freed_memory_is_kept_until_it_is_released():
    with holds("how tensors are allocated", "the speed of steps on CPUs, which would clear 400 MB of pages each"):
        kept, faults, memory, released = use()
        assert kept and faults < 100  # of 17,000 pages
        assert memory > 60 and released < 8


@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.perturb=0"}]
)
def test_an_allocator_that_the_environment_sets_is_left_alone(variables):
    kept, faults, memory, _ = use(**variables)
    assert not kept and faults > 10_000 and memory < 55


class Nothing(LightningModule):
    def training_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return None


class Sees(Callback):
    def __init__(self, fail):
        self.fail, self.calls_in_training = fail, None

    def on_train_batch_end(self, *args):
        self.calls_in_training = list(CALLS)
        if self.fail:
            raise ValueError("a step fails")


CALLS = []


@pytest.mark.parametrize("fail", [False, True])
def test_a_fit_keeps_memory_while_it_trains_and_gives_it_back_however_it_ends(fail, monkeypatch, tmp_path):
    CALLS.clear()
    monkeypatch.setattr("dpo_lightning.dpo.kept_memory.keep_freed", lambda: CALLS.append("kept") or True)
    monkeypatch.setattr("dpo_lightning.dpo.kept_memory.release_freed", lambda: CALLS.append("released"))
    sees = Sees(fail)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[KeepMemory(), sees], default_root_dir=tmp_path,
    )  # fmt: skip
    if fail:
        with pytest.raises(ValueError, match="a step fails"):
            trainer.fit(Nothing(), [0, 1])
    else:
        trainer.fit(Nothing(), [0, 1])
    assert sees.calls_in_training == ["kept"]
    assert CALLS == ["kept", "released"]
