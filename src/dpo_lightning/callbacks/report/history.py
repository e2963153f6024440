"""A logger that keeps all values in memory, for the report at the end."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import Logger

Curve = list[tuple[int, float]]  # step and value


class History(Logger):
    """Every logged scalar, in order.

    Args:
        folder: for the run's files, if this is its only logger.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder
        self.curves: dict[str, Curve] = {}

    name = version = None

    @property
    def save_dir(self) -> str:
        """The folder for other files of the run."""
        return self._folder

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds a point to the curve of each metric; a later point at the same step replaces the earlier one."""
        for name, value in metrics.items():
            curve = self.curves.setdefault(name, [])
            if curve and curve[-1][0] == (step or 0):
                curve.pop()  # a resumed run repeats the validation at its first step
            curve.append((step or 0, float(value)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the report reads the settings from the modules."""
