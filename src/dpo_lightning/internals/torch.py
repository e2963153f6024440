"""What we use of torch beyond its documented interface."""

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

# Enough for all products of a step; of oneDNN, which multiplies in 16 bits on CPUs, and of PyTorch's layer above it.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "64"}


def keep_few_kernels() -> None:
    """Limits the kernels that are kept for products in 16 bits on a CPU, unless the environment already does.

    By default the last 1,024 shapes each keep one, of about half a MiB. Batches of real tokens alone hardly ever have
    the same number of rows, so these pile up, and the memory between them can no longer be used for large tensors.
    The variables are read at the first product of a process; later calls change nothing.
    """
    for name, capacity in KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def leave_unscaling_to_lightning(optimizer: torch.optim.Optimizer) -> None:
    """Makes a fused optimizer look like any other to the gradient scaler and to Lightning, which then unscale first.

    Uses `_step_supports_amp_scaling`, by which it says that it unscales in its own step, after clipping: the step stays
    fused all the same.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def convert(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Applies a function to all parameters and buffers of a module, as `module.to` does.

    Uses `Module._apply`: `to` takes a device or a dtype, not what Lightning hands on.
    """
    module._apply(function)


def has_hooks(module: nn.Module) -> bool:
    """Whether anyone wants to know of the calls of a module. Uses `_forward_hooks` and `_forward_pre_hooks`."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def softmax_gradient(gradient: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of a softmax's input over the last dimension, from that of its output, `probabilities`.

    Uses `aten._softmax_backward_data`, one pass over memory where the formula in tensor operations takes three.
    """
    return torch.ops.aten._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype)


def copy_all(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """targets <- values, tensor by tensor, in place and in few kernels. Uses `torch._foreach_copy_`."""
    torch._foreach_copy_(list(targets), list(values))


def lerp_all(targets: Sequence[Tensor], values: Sequence[Tensor], share: float) -> None:
    """targets <- share * values + (1 - share) * targets, as `copy_all`. Uses `torch._foreach_lerp_`."""
    torch._foreach_lerp_(list(targets), list(values), share)
