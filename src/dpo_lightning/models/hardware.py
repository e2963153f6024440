"""What the hardware does best, and how much memory a run has used."""

import platform
import re
import sys
from contextlib import suppress
from pathlib import Path

import torch

LINUX_STATUS = Path("/proc/self/status")
SHORT_ROW = 256  # tokens
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}  # of CPUs that multiply bfloat16 in hardware


def fastest_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The Trainer precision that is fast on this hardware without harm to training, and the reason."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU computes in bfloat16"
        return "32-true", "this GPU does not compute in bfloat16"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true", "on Apple's GPU mixed precision has not been measured"
    if cpu_flags() & BF16_FLAGS:
        return "bf16-mixed", "this CPU computes in bfloat16"
    return "32-true", "this CPU has no bfloat16 arithmetic"


def packing_is_faster(accelerator: str, bf16: bool) -> bool:
    """Whether pairs are packed into one row by default: where that was measured to be faster (benchmarks/NOTES.md)."""
    return accelerator == "cpu" and bf16


def fastest_attention(accelerator: str, bf16: bool, row_length: float) -> str | None:
    """The attention that trains fastest on rows of about `row_length` tokens; None for the default of transformers.

    The default is sdpa, whose backward pass in bfloat16 on a CPU is slower than eager attention on short rows.
    """
    return "eager" if accelerator == "cpu" and bf16 and row_length < SHORT_ROW else None


def cpu_flags() -> set[str]:
    """Instruction set flags of this CPU; empty if the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def device_name(device: torch.device) -> str:
    """The name of a device, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU (MPS), {platform.machine()}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes, None if the system does not report it.

    On CUDA: of tensors on the GPU. On Apple's GPU: what the driver has allocated now, which the allocator's cache keeps
    near the peak. On the CPU: of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    with suppress(OSError):  # Linux, where getrusage also counts the program that started this one
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", LINUX_STATUS.read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return _peak_working_set()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def available_memory(accelerator: str = "auto") -> int | None:
    """Bytes that a run can use here, None if the system does not say.

    On an NVIDIA GPU those that are free there, else those of the machine or the container.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        import psutil  # peft needs it, but that may change
    except ImportError:
        return None
    limits = [psutil.virtual_memory().available]
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def _peak_working_set() -> int | None:
    try:
        import psutil  # peft needs it, but that may change
    except ImportError:
        return None
    return getattr(psutil.Process().memory_info(), "peak_wset", None)  # on Windows alone
