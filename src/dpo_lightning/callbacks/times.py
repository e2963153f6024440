"""How the wall time of a fit is divided: steps, validations, replies, checkpoints and so on."""

import functools
import time
from collections.abc import Callable

from lightning.pytorch.profilers import Profiler

# Part -> what the names of its actions contain. Lightning names the hooks "[Callback]LastCheckpoint.on_train_end".
PARTS = {
    "replies": ("]RepliesCallback.",),
    "checkpoints": ("save_checkpoint", "]LastCheckpoint.", "]ModelCheckpoint"),
    "export": ("]ExportCallback.",),
    "validations": ("validation", "val_next"),
    "steps": ("training_batch", "train_batch", "train_dataloader_next"),
}
START, REST = "start", "rest"
LEAST = 0.1  # of the whole; smaller parts are told as one with the rest


class RunTimes(Profiler):
    """Adds up the seconds of each part of a fit: those of `PARTS`, the start until the first step, and the rest.

    Lightning tells a profiler when each of its actions begins and ends. Every moment counts once: for the innermost
    action that belongs to a part, such as a checkpoint within a validation. Nothing here waits for the device, so what
    a GPU still has to do counts where the run waits for it.

    Args:
        began: reading of `clock` when the program began; by default now.
        clock: gives the time in seconds.
    """

    def __init__(self, began: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        super().__init__()
        self._clock = clock
        self._read = clock() if began is None else began
        self._current = [START]  # the parts of the actions that have begun and not ended
        self._seconds = dict.fromkeys((START, *PARTS, REST), 0.0)

    def start(self, action_name: str) -> None:
        """Notes that an action begins."""
        self._count()
        if action_name == "run_training_epoch":
            self._current[0] = self._current[-1] = REST
        self._current.append(_part(action_name) or self._current[-1])

    def stop(self, action_name: str) -> None:
        """Notes that an action ends."""
        self._count()
        self._current.pop()

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._current[-1]] += now - self._read
        self._read = now

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by part, up to now; together they are the wall time."""
        self._count()
        return dict(self._seconds)

    def __str__(self) -> str:
        """Such as "4 min 2 s: steps 2 min 22 s, validations 41.0 s, start 20.0 s, rest 9.0 s"."""
        seconds = self.seconds
        total, rest = sum(seconds.values()), seconds.pop(REST)
        told = {part: spent for part, spent in seconds.items() if spent >= LEAST * total}
        rest += sum(seconds.values()) - sum(told.values())
        parts = [*sorted(told.items(), key=lambda part: -part[1]), (REST, rest)]
        return f"{duration(total)}: " + ", ".join(f"{part} {duration(spent)}" for part, spent in parts)


@functools.cache
def _part(action: str) -> str | None:
    return next((part for part, words in PARTS.items() if any(word in action for word in words)), None)


def duration(seconds: float) -> str:
    """12.34 -> "12.3 s", 754 -> "12 min 34 s", 7500 -> "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
