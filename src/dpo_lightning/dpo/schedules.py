"""Optimizer step -> multiple of the learning rate: a linear warm-up, then one of the decays below, found by name.

The rates are those of transformers' `get_scheduler` (a test compares them), whose import takes seconds.
"""

import math
from collections.abc import Callable

# Share of the steps after the warm-up that is done, in [0, 1] -> multiple of the peak learning rate.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def rate_at(step: int, decay: str, warmup_steps: int, steps: int) -> float:
    """The multiple at an optimizer step, counted from 0, of a run of `steps` with `warmup_steps` at its start."""
    if step < warmup_steps:
        return step / warmup_steps
    return DECAYS[decay](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
