"""Pairs per second of optimizer steps alone: validation and replies, which come between steps, are not counted."""

import time


class Throughput:
    """A stopwatch that runs from the first batch of an optimizer step to the end of the step."""

    def __init__(self) -> None:
        self._start: float | None = None  # of the current step
        self._seconds, self._pairs = 0.0, 0  # since the last reading

    def batch(self, pairs: int) -> None:
        """Starts a batch of `pairs` on all devices together."""
        self._pairs += pairs
        if self._start is None:
            self._start = time.perf_counter()

    def step(self) -> None:
        """Ends an optimizer step."""
        assert self._start is not None
        self._seconds += time.perf_counter() - self._start
        self._start = None

    def read(self) -> float:
        """Returns the pairs per second since the last reading."""
        rate = self._pairs / self._seconds
        self._seconds, self._pairs = 0.0, 0
        return rate
