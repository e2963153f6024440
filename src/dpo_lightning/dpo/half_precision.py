"""16-true and bf16-true: what stays in float32 where Lightning converts a whole module, and what cannot be trained."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor

from dpo_lightning.errors import UserError

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of products, by the Trainer's precision
CONVERTED = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # of weights, by the same
SIXTEEN_BITS = {torch.bfloat16, torch.float16}


class FullInputs(HalfPrecision):
    """Lightning's, without rounding batches: theirs are weights, margins and cached log-probs, which no layer reads."""

    def convert_input(self, data: Any) -> Any:
        """Gives the batch as it is."""
        return data


def keep_inputs(trainer: Trainer) -> None:
    """Keeps batches in float32 in a run that computes in 16 bits."""
    if type(plugin := trainer.precision_plugin) is HalfPrecision:
        trainer.strategy.precision_plugin = FullInputs(plugin.precision)


def full(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is given -> the same, but where it would convert to 16 bits it only moves to the device."""

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
