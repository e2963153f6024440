"""Where a run is -> one live line at the bottom of the terminal; whatever is printed meanwhile stays above it.

    step 120/198 ━━━━━━━━━━━━━━━━━━━━━━━ loss 0.412 accuracy 97% margin 1.23 31.2 pairs/s 0:12 left

Where the output is no terminal, or one that cannot move its cursor, nothing is drawn but the last line, once.
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
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

# Metric -> its text, the most important first: the last are left out where the terminal is narrow.
METRICS = {
    "train/loss": "loss {:.3f}",
    "train/rewards/accuracies": "accuracy {:.0%}",
    "train/rewards/margins": "margin {:.2f}",
    "train/pairs_per_second": "{:.1f} pairs/s",
}
SECONDS_BETWEEN_DRAWINGS = 0.2
BESIDE_VALUES = 17  # columns that the shortest bar, the time left and the spaces want beside steps and values


class RunBar(ProgressBar):
    """Lightning's progress bar in one line that never wraps.

    It draws on rich's shared console, as tables of replies do. While it is there, what is printed, warned of or logged
    goes through that console too and so lands above the line; text past it would be overwritten with the next drawing.
    Only the first process draws, and never from a thread: worker processes could inherit its lock.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._tasks: list[TaskID] = []  # the one that is shown is the last
        self._drawn = 0.0
        self._moved: list[tuple[logging.StreamHandler, Any]] = []  # and where they wrote to before

    def enable(self) -> None:
        """Draws from the next start on."""
        self._enabled = True

    def disable(self) -> None:
        """Draws nothing."""
        self._enabled = False

    # ------------------------------------------------------------------ hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts optimizer steps of the run; a resumed one begins where it was."""
        self._open("step", trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Moves on."""
        self._advance(trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts batches of a validation, within a fit in place of its steps."""
        if not trainer.sanity_checking:
            self._open("validation, batch", trainer.num_val_batches)

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Moves on."""
        if not trainer.sanity_checking:
            self._advance(batch_idx + 1)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts batches."""
        self._open("test, batch", trainer.num_test_batches)

    def on_test_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Moves on."""
        self._advance(batch_idx + 1)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts batches."""
        self._open("prediction, batch", trainer.num_predict_batches)

    on_predict_batch_end = on_test_batch_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the last line where it is; a validation within a fit gives way to its steps again."""
        if not trainer.sanity_checking:
            self._close()

    on_validation_end = on_test_end = on_predict_end = on_train_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the terminal back."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the terminal back."""
        self._stop()

    # ------------------------------------------------------------------ drawing

    def _open(self, what: str, total: float | list[float], done: int = 0) -> None:
        if not self._enabled:
            return
        if self._progress is None:
            self._start()
        total = sum(total) if isinstance(total, list) else total
        known = 0 < total < math.inf  # the length of a run can be unknown
        for before in self._tasks[-1:]:
            self._progress.update(before, visible=False)
        words = f"{what} {{}}/{total:.0f}" if known else f"{what} {{}}"
        self._tasks.append(
            self._progress.add_task(
                words, total=total if known else None, completed=done, head=words.format(done), values=""
            )
        )
        self._progress.refresh()

    def _advance(self, done: int) -> None:
        if self._progress is None:
            return
        task = self._progress.tasks[-1]
        self._progress.update(task.id, completed=done, head=task.description.format(done))
        if time.monotonic() - self._drawn >= SECONDS_BETWEEN_DRAWINGS or done == task.total:
            self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._progress.update(self._tasks[0], values=self._values())
        self._progress.refresh()

    def _values(self) -> str:
        """Such as "loss 0.412 accuracy 97%", as many as there is room for."""
        metrics = self.trainer.progress_bar_metrics if self.trainer.state.fn == "fit" else {}
        values = [text.format(float(metrics[name])) for name, text in METRICS.items() if name in metrics]
        room = self._progress.console.width - len(self._progress.tasks[0].fields["head"]) - BESIDE_VALUES
        while values and len(" ".join(values)) > room:
            values.pop()
        return " ".join(values)

    def _close(self) -> None:
        if self._progress is None:
            return
        if len(self._tasks) == 1:
            self._draw()
            self._stop()
        else:
            self._progress.remove_task(self._tasks.pop())
            self._progress.update(self._tasks[-1], visible=True)
            self._progress.refresh()

    def _start(self) -> None:
        console = get_console()
        fixed = Column(no_wrap=True)
        live = console.is_terminal and not console.is_dumb_terminal
        self._progress = Progress(
            TextColumn("{task.fields[head]}", table_column=fixed),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[values]}", table_column=fixed.copy()),
            _TimeColumn(table_column=fixed.copy()),
            console=console,
            auto_refresh=False,
            redirect_stdout=live,
            redirect_stderr=live and sys.stderr.isatty(),  # what is written to a file stays out of the terminal
            expand=True,
        )
        before = sys.stdout, sys.stderr
        self._progress.start()
        if live:
            console.show_cursor(True)  # hidden, it would stay so after a SIGKILL
        self._move_handlers(dict(zip(before, (sys.stdout, sys.stderr), strict=True)))

    def _move_handlers(self, streams: dict[Any, Any]) -> None:
        """Makes loggers, which keep the stream that they once got, write to what now stands in its place."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
            stream = getattr(handler, "stream", None)
            if isinstance(handler, logging.StreamHandler) and streams.get(stream, stream) is not stream:
                self._moved.append((handler, handler.setStream(streams[stream])))

    def _stop(self) -> None:
        if self._progress is not None:
            progress, self._progress, self._tasks = self._progress, None, []
            for task in [task.id for task in progress.tasks if not task.visible]:
                progress.remove_task(task)
            progress.stop()
            for handler, stream in self._moved:
                handler.setStream(stream)
            self._moved = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_progress": None, "_tasks": [], "_moved": []}  # locks cannot be copied


class _TimeColumn(ProgressColumn):
    """What is left, or at the end, what it took."""

    def render(self, task: Task) -> Text:
        if task.finished:
            return Text(f"in {_clock(task.finished_time)}", style="dim")
        return Text("" if task.time_remaining is None else f"{_clock(task.time_remaining)} left", style="dim")


def _clock(seconds: float | None) -> str:
    """75 -> "1:15", 4000 -> "1:06:40"."""
    text = str(timedelta(seconds=int(seconds or 0)))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text
