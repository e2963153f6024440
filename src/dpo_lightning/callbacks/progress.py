"""A progress bar of one line at the bottom of the terminal; whatever is printed meanwhile appears above it.

    step 120/198 ━━━━━━━━━━━━━━━━━━━━━━━ loss 0.412 accuracy 97% margin 1.23 31.2 pairs/s 0:12 left

If the output is not a terminal, or one that cannot move its cursor, only the final line is printed.
"""

import logging
import math
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich import get_console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

# Metric -> format, most important first: on a narrow terminal the last ones are left out.
METRICS = {
    "train/loss": "loss {:.3f}",
    "train/rewards/accuracies": "accuracy {:.0%}",
    "train/rewards/margins": "margin {:.2f}",
    "train/pairs_per_second": "{:.1f} pairs/s",
}
SECONDS_BETWEEN_DRAWINGS = 0.2
BESIDE_VALUES = 17  # columns for the shortest bar, the remaining time and the spaces, beside steps and values


class RunBar(ProgressBar):
    """A Lightning progress bar of one line that never wraps.

    It draws on rich's shared console, as tables of replies do. While it is active, prints, warnings and log messages go
    through that console too and appear above the line; written past it, they would be overwritten by the next drawing.
    Only the first process draws, and never from a thread: worker processes could inherit its lock.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._drawn = 0.0
        self._moved: list[tuple[logging.StreamHandler, Any]] = []  # with their former streams

    def enable(self) -> None:
        """Draws from the next stage on."""
        self._enabled = True

    def disable(self) -> None:
        """Draws nothing."""
        self._enabled = False

    # ------------------------------------------------------------------ hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows optimizer steps; a resumed run starts at the step of its checkpoint."""
        self._open("step", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Advances to the current step."""
        self._advance(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows batches of a validation, during a fit instead of its steps."""
        if not trainer.sanity_checking:
            self._open("validation, batch", trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Advances to the current batch."""
        self._advance(batch_idx + 1)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows batches of a test."""
        self._open("test, batch", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows batches of predictions."""
        self._open("prediction, batch", trainer.num_predict_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the final line on the screen; after a validation during a fit, shows steps again."""
        self._close()

    on_validation_end = on_test_end = on_predict_end = on_train_end

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Restores the terminal, also after an error."""
        self._stop()

    on_exception = teardown

    # ------------------------------------------------------------------ drawing

    def _open(self, unit: str, total: float | list[int | float], done: int = 0) -> None:
        if not self._enabled:
            return
        if self._progress is None:
            self._progress = self._start()
        total = sum(total) if isinstance(total, list) else total
        known = 0 < total < math.inf  # the length of a run can be unknown
        for task in self._progress.tasks[-1:]:
            self._progress.update(task.id, visible=False)
        text = f"{unit} {{}}/{total:.0f}" if known else f"{unit} {{}}"
        self._progress.add_task(text, total=total if known else None, completed=done, head=text.format(done), values="")
        self._progress.refresh()

    def _advance(self, done: int) -> None:
        if self._progress is None:
            return
        task = self._progress.tasks[-1]
        self._progress.update(task.id, completed=done, head=task.description.format(done))
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS or done == task.total:
            self._draw(self._progress)

    def _draw(self, progress: Progress) -> None:
        self._drawn = time.monotonic()
        task = progress.tasks[0]
        room = progress.console.width - len(task.fields["head"]) - BESIDE_VALUES
        progress.update(task.id, values=self._values(room))
        progress.refresh()

    def _values(self, room: int) -> str:
        """As many metrics as fit into `room` columns, such as "loss 0.412 accuracy 97%"."""
        metrics = self.trainer.progress_bar_metrics if self.trainer.state.fn == "fit" else {}
        values = [text.format(float(metrics[name])) for name, text in METRICS.items() if name in metrics]
        while values and len(" ".join(values)) > room:
            values.pop()
        return " ".join(values)

    def _close(self) -> None:
        if self._progress is None:
            return
        *others, last = self._progress.tasks
        if others:
            self._progress.remove_task(last.id)
            self._progress.update(others[-1].id, visible=True)
            self._progress.refresh()
        else:
            self._draw(self._progress)
            self._stop()

    def _start(self) -> Progress:
        console = get_console()
        fixed = Column(no_wrap=True)
        live = console.is_terminal and not console.is_dumb_terminal
        progress = Progress(
            TextColumn("{task.fields[head]}", table_column=fixed),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[values]}", table_column=fixed.copy()),
            _TimeColumn(table_column=fixed.copy()),
            console=console,
            auto_refresh=False,
            redirect_stdout=live,
            redirect_stderr=live and sys.stderr.isatty(),  # stderr that goes to a file stays there
            expand=True,
        )
        before = sys.stdout, sys.stderr
        progress.start()
        if live:
            console.show_cursor(True)  # hidden, it would stay so after a SIGKILL
        self._move_handlers(dict(zip(before, (sys.stdout, sys.stderr), strict=True)))
        return progress

    def _move_handlers(self, streams: dict[Any, Any]) -> None:
        """Makes log handlers, which keep the stream they were created with, write to its replacement."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and streams.get(stream, stream) is not stream:
                self._moved.append((handler, handler.setStream(streams[stream])))

    def _stop(self) -> None:
        if self._progress is not None:
            progress, self._progress = self._progress, None
            for task in progress.tasks:
                if not task.visible:
                    progress.remove_task(task.id)
            progress.stop()
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_progress": None, "_moved": []}  # locks cannot be copied


class _TimeColumn(ProgressColumn):
    """The remaining time, or at the end the time it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {_clock(task.finished_time)}", style="dim")
        return Text("" if task.time_remaining is None else f"{_clock(task.time_remaining)} left", style="dim")


def _clock(seconds: float | None) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    text = str(timedelta(seconds=int(seconds or 0)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text
