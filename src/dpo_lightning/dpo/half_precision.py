"""16-true and bf16-true: what stays in float32 when Lightning converts a module, and what cannot be trained."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor

from dpo_lightning.errors import UserError

# By the Trainer's precision: the dtype of matrix products, and the dtype that weights are converted to.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
CONVERTED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
SIXTEEN_BITS = {torch.bfloat16, torch.float16}


class UnroundedInputs(HalfPrecision):
    """Lightning's, but a batch keeps its dtype: its floats are weights, margins and reference log-probs."""

    def convert_input(self, data: Any) -> Any:
        """Returns the batch as it is."""
        return data


def keep_inputs(trainer: Trainer) -> None:
    """Makes a run with 16-bit weights leave its batches in float32."""
    if type(plugin := trainer.precision_plugin) is HalfPrecision:
        trainer.strategy.precision_plugin = UnroundedInputs(plugin.precision)


def keep_float32(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a function for `Module._apply`: a tensor that it would convert to 16 bits only moves to its device."""

    def apply(tensor: Tensor) -> Tensor:
        result = function(tensor)
        lowered = result.dtype in SIXTEEN_BITS and result.dtype != tensor.dtype
        return tensor.to(result.device) if lowered else result

    return apply


def check_trained_dtype(dtypes: Iterable[torch.dtype]) -> None:
    """Refuses to train weights in 16 bits.

    Raises:
        UserError: one of the dtypes is bfloat16 or float16.
    """
    if found := sorted(str(dtype).removeprefix("torch.") for dtype in SIXTEEN_BITS.intersection(dtypes)):
        raise UserError(
            f"weights in {found[0]} cannot be trained: most steps are smaller than half of its spacing and change "
            "nothing (at a learning rate of 1e-5 about 3 % of the weights move); set trainer.precision: bf16-mixed "
            "and model.dtype: float32, or train an adapter (configs/lora.yaml), whose weights stay in float32"
        )
