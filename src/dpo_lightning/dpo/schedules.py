"""Optimizer step -> multiple of the learning rate: a linear warm-up, then one of the decays below, found by name.

The same rates as transformers' `get_scheduler` gives (a test compares them), whose import takes
seconds: it brings in peft and what that integrates with.
"""

import math
from collections.abc import Callable

# What share of the steps after the warm-up is done, in [0, 1] -> multiple of the peak learning rate.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}


def rate_at(step: int, schedule: str, warmup_steps: int, steps: int) -> float:
    """The multiple at an optimizer step (from 0) of a run of `steps`, the first `warmup_steps` of them warm-up."""
    if step < warmup_steps:
        return step / warmup_steps
    return SCHEDULES[schedule](min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps)))
