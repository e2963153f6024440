"""A logger that keeps in memory what a run logs: name -> [(step, value)], for the report at its end."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

Curve = list[tuple[int, float]]


class History(Logger):
    """Every scalar that was logged, in order.

    Args:
        folder: where the run's files go if this is its only logger.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder
        self.curves: dict[str, Curve] = {}

    name = version = None

    @property
    def save_dir(self) -> str:
        """Where Lightning puts other files of the run."""
        return self._folder

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds a point to the curve of each metric, in place of one that it has at this step."""
        for name, value in metrics.items():
            curve = self.curves.setdefault(name, [])
            if curve and curve[-1][0] == (step or 0):
                curve.pop()  # a validation within a step comes again when the run is resumed
            curve.append((step or 0, float(value)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The report takes them from the modules."""
