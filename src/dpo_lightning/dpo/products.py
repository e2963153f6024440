"""Linear layers in bfloat16 on a CPU with AMX, in shapes that keep its matrix units busy.

oneDNN generates a kernel for each number of rows, which batches of real tokens hardly ever have in common: a twelfth of
a step (benchmarks/NOTES.md). It leaves some products to a single thread, and is slow to transpose.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpo_lightning.models.hardware import cpu_flags

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MULTIPLE = 64  # of rows: few kernels compute products of all batches, in whole tiles
ONE_THREAD = 640, 1536  # between them oneDNN gives few columns to one thread
ROWS_AT_ONCE = 512  # then


def padding_for(model: "PreTrainedModel", rows: int) -> int:
    """How many rows to add to the hidden states of a packed batch, or to those that the head gets."""
    return rows_to_add(rows) if computes_in_bfloat16(model) else 0


def computes_in_bfloat16(model: "PreTrainedModel") -> bool:
    """Whether a model's products are in bfloat16 here, on a CPU with AMX."""
    if model.device.type != "cpu" or not has_matrix_units():
        return False
    return torch.bfloat16 == (torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype)


@contextmanager
def fast_linear_layers(model: "PreTrainedModel") -> Iterator[None]:
    """For a forward pass: linear layers are computed by `linear`, where that is faster."""
    fast = computes_in_bfloat16(model)
    # Gradient checkpoints run the layers once more in the backward pass, and need them to keep the same tensors.
    if fast and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        with _LinearLayers():
            yield
    else:
        yield


@cache
def has_matrix_units() -> bool:
    """Whether this CPU multiplies matrices in bfloat16 by AMX."""
    return "amx_bf16" in cpu_flags()


class _LinearLayers(TorchFunctionMode):
    """Passes what `nn.Linear` and transformers' `Conv1D` call on to `linear`."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs:
            inputs, weight, bias = (*args, None)[:3]
            if _suits(inputs, weight, bias):
                return linear(inputs, weight, bias)
        elif func is torch.addmm and len(args) == 3 and not kwargs:
            bias, inputs, weight = args
            if bias.dim() == 1 and _suits(inputs, weight, bias):
                return linear(inputs, weight, bias, transposed=True)
        return func(*args, **(kwargs or {}))


def _suits(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are of a linear layer that is large enough, and that autocast would compute in bfloat16."""
    given = [tensor for tensor in (inputs, weight, bias) if tensor is not None]
    dtypes = {torch.float32, torch.bfloat16} if torch.is_autocast_enabled("cpu") else {torch.bfloat16}
    if not all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype in dtypes for tensor in given):
        return False
    large = inputs.dim() > 1 and weight.dim() == 2 and min(weight.shape) >= MULTIPLE
    return large and inputs.shape[:-1].numel() >= MULTIPLE


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor:
    """A linear layer in bfloat16, [..., N] from [..., K].

    Args:
        inputs: [..., K].
        weight: [N, K], or [K, N] if `transposed`.
        bias: [N].
        transposed: the weights are those of `Conv1D`.
    """
    return _Linear.apply(inputs, weight, bias, transposed)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """Returns the outputs in bfloat16."""
        rows = inputs.to(torch.bfloat16).flatten(0, -2)
        weight_16 = weight.to(torch.bfloat16)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight_16)
        ctx.transposed, ctx.shape = transposed, inputs.shape
        ctx.dtypes = inputs.dtype, weight.dtype, None if bias is None else bias.dtype
        outputs = multiply(rows, weight_16 if transposed else weight_16.t(), bias)
        return outputs.view(*inputs.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of inputs, weights and bias."""
        rows, weight_16 = ctx.saved_tensors
        of_inputs = of_weight = of_bias = None
        grad = grad.flatten(0, -2)
        if ctx.needs_input_grad[0]:
            of_inputs = multiply(grad, weight_16.t() if ctx.transposed else weight_16)
            of_inputs = of_inputs.view(ctx.shape).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            of_weight = multiply_transposed(rows, grad) if ctx.transposed else multiply_transposed(grad, rows)
            of_weight = of_weight.to(ctx.dtypes[1])
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(ctx.dtypes[2])
        return of_inputs, of_weight, of_bias, None


def multiply(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """[M, K] by [K, N] plus [N], all but the bias in bfloat16."""
    multiply_rows = torch.mm if bias is None else partial(torch.addmm, bias.to(left.dtype))
    if right.shape[1] >= 2 * right.shape[0] or not ONE_THREAD[0] < len(left) < ONE_THREAD[1]:
        return multiply_rows(left, right)
    product = left.new_empty(len(left), right.shape[1])
    for span in spans(len(left)):
        multiply_rows(left[span], right, out=product[span])
    return product


def multiply_transposed(left: Tensor, right: Tensor) -> Tensor:
    """[P, Q] from [M, P] and [M, Q], the sum over the rows."""
    if right.shape[1] >= 2 * left.shape[1]:  # the product is large enough to pay for a copy
        return left.t().contiguous() @ right
    return left.t() @ right


def spans(rows: int) -> list[slice]:
    """Spans of at most `ROWS_AT_ONCE` rows, of a multiple of `MULTIPLE`. The last two may overlap."""
    width = math.ceil(rows / math.ceil(rows / ROWS_AT_ONCE))
    bounds = [*range(0, rows, width + rows_to_add(width)), rows]
    return [slice(start - rows_to_add(end - start), end) for start, end in pairwise(bounds)]


def rows_to_add(rows: int) -> int:
    """How many rows are missing to a multiple of `MULTIPLE`."""
    return -rows % MULTIPLE
