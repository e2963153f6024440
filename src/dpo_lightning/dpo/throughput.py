"""Pairs per second of optimizer steps alone: validation and replies, which come between steps, are not counted."""

import time


class Throughput:
    """A stopwatch that runs from an optimizer step's first batch to its end."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._seconds, self._pairs = 0.0, 0  # of steps since the last reading

    def batch(self, pairs: int) -> None:
        """A batch begins, of so many pairs on all devices."""
        self._pairs += pairs
        if self._began is None:
            self._began = time.perf_counter()

    def step(self) -> None:
        """An optimizer step has ended."""
        self._seconds += time.perf_counter() - self._began
        self._began = None

    def read(self) -> float:
        """Pairs per second since the last reading."""
        rate = self._pairs / self._seconds
        self._seconds, self._pairs = 0.0, 0
        return rate
