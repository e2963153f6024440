"""Collects what happens during `fit` and writes `report.html` in the run's folder, however the run ends.

`report.json` beside it has the same contents, for the command `report` and for programs.
"""

import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpo_lightning.callbacks.checkpoints import newest_checkpoint
from dpo_lightning.callbacks.context import find_callback, preference_data, run_folder
from dpo_lightning.callbacks.export.callback import ExportCallback
from dpo_lightning.callbacks.replies import REMEMBERED, RepliesCallback
from dpo_lightning.callbacks.report.facts import again, commit, costs, facts, title_of
from dpo_lightning.callbacks.report.history import Curve, History
from dpo_lightning.callbacks.report.outcome import closing_lines
from dpo_lightning.callbacks.report.page import Run, render
from dpo_lightning.callbacks.report.saved import as_json
from dpo_lightning.callbacks.storyboard import settings
from dpo_lightning.callbacks.times import RunTimes, duration
from dpo_lightning.errors import Stopped
from dpo_lightning.judging.quantities import reply_tag, verdict_of
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.states import check_amount, check_state

MAX_MARGINS = 2000  # kept of each validation
STATE = {"curves": {str: [(int, int | float)]}, "margins": {int: [float]}, "warnings": [str]}


class ReportCallback(Callback):
    """Writes `report.html` at the end of a fit, whether it finished, was interrupted or failed.

    Curves come from an additional logger (`History`), replies from the RepliesCallback, warnings are all those since
    the setup. Checkpoints contain what was collected, so the report of a resumed run covers all of it.
    """

    def __init__(self) -> None:
        self._curves: dict[str, Curve] = {}
        self._margins: dict[int, list[float]] = {}  # by step, of the first and the last validation
        self._val_pairs = 0  # in each validation
        self._warnings: list[str] = []
        self._earlier_seconds = 0.0  # spent before the run was resumed
        self._began: float | None = None
        self._show_warning: Any = None

    # ------------------------------------------------------------------ collect

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts collecting warnings."""
        if stage != "fit":
            return
        preference_data(trainer, self)
        self._folder = run_folder(trainer)
        if self._show_warning is None:
            self._show_warning, warnings.showwarning = warnings.showwarning, self._note_warning

    def _note_warning(self, message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if str(message) not in self._warnings:
            self._warnings.append(str(message))
        self._show_warning(message, *args, **kwargs)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and the collection of logged values."""
        self._device = trainer.strategy.root_device
        self._history = History(trainer.default_root_dir)
        self._history.curves = self._curves
        trainer.loggers.append(self._history)
        self._commit = commit() if trainer.is_global_zero else None  # before anybody changes the files
        self._began = time.perf_counter()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the margins of the first and the latest validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        margins = pl_module.val_metrics.all_margins()  # a collective call
        first = dict(list(self._margins.items())[:1])
        self._margins = first | {trainer.global_step: margins[:MAX_MARGINS].tolist()}
        self._val_pairs = len(margins)

    def state_dict(self) -> dict[str, Any]:
        """Everything collected so far."""
        return {
            "curves": self._curves,
            "margins": self._margins,
            "val_pairs": self._val_pairs,
            "warnings": self._warnings,
            "seconds": self._seconds(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state has another structure.
        """
        check_state(state_dict, STATE, "the report")
        for name in ("val_pairs", "seconds"):
            check_amount(state_dict.get(name, 0), f"the report's {name}")
        curves, self._margins = state_dict["curves"], state_dict["margins"]
        self._curves = {
            reply_tag(verdict) if (verdict := verdict_of(tag)) else tag: curve for tag, curve in curves.items()
        }
        self._val_pairs = state_dict.get("val_pairs", 0)  # missing in older checkpoints
        self._warnings = state_dict["warnings"] + [w for w in self._warnings if w not in state_dict["warnings"]]
        self._earlier_seconds = state_dict["seconds"]

    def _seconds(self) -> float:
        return self._earlier_seconds + (time.perf_counter() - self._began if self._began is not None else 0.0)

    # ------------------------------------------------------------------ write

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report of a finished run, and prints where its time went, its result and its files."""
        steps, replies = trainer.global_step, find_callback(trainer, RepliesCallback)
        paths = _model_path(trainer) | self._end(trainer, pl_module, "Finished")
        if paths and isinstance(trainer.profiler, RunTimes):
            rank_zero_info(f"time: {trainer.profiler}")
        if paths:
            rank_zero_info(closing_lines(replies.showings if replies else [], steps, paths))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the report of a run that was interrupted or failed."""
        by_hand = isinstance(exception, KeyboardInterrupt | Stopped)
        outcome = "Stopped by hand" if by_hand else f"Stopped by an error ({exception})"
        for name, path in self._end(trainer, pl_module, outcome).items():
            rank_zero_info(f"{name}: {path}")

    def _end(self, trainer: Trainer, module: LightningModule, outcome: str) -> dict[str, Path]:
        """Writes the report and returns its path as {"report": path}, or {} if none was written."""
        paths: dict[str, Path] = {}
        if self._show_warning is not None:
            warnings.showwarning, self._show_warning = self._show_warning, None
        if self._began is None:
            return paths  # the run failed before training began
        if self._history in trainer.loggers:  # it is not, if writing the report failed before
            trainer.loggers.remove(self._history)
        if self._folder is not None and trainer.is_global_zero:
            path = self._folder / "report.html"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                run = self._run(trainer, module, outcome)
                for name, text in (("report.json", as_json(run)), ("report.html", render(run))):
                    with atomic_file(self._folder / name) as partial:
                        partial.write_text(text, encoding="utf-8")
                paths["report"] = path
            except OSError as error:  # must not hide the trained model, or the error that stopped the run
                rank_zero_warn(f"the report cannot be written to {path}: {error.strerror}")
        self._began = None
        return paths

    def _run(self, trainer: Trainer, module: LightningModule, outcome: str) -> Run:
        replies, step = find_callback(trainer, RepliesCallback), trainer.global_step
        return Run(
            title=title_of(module, trainer.datamodule),
            outcome=f"{outcome} after {step} steps and {duration(self._seconds())}, {time.strftime('%Y-%m-%d %H:%M')}.",
            facts=facts(trainer, module),
            settings=settings(trainer, module),
            curves=self._curves,
            margins={f"step {step}": values for step, values in self._margins.items()},
            pairs=replies.pairs[:REMEMBERED] if replies else [],
            showings=replies.showings if replies else [],
            costs=costs(trainer, self._device, self._seconds(), self._curves),
            warnings=self._warnings,
            val_pairs=self._val_pairs,
            again=again(trainer.datamodule, self._commit),
        )


def _model_path(trainer: Trainer) -> dict[str, Path]:
    """The path of the result: {"model": exported folder} or {"checkpoint": newest one}; {} if nothing is saved."""
    export = find_callback(trainer, ExportCallback)
    if trainer.fast_dev_run:
        return {}
    if export and export.written:
        return {"model": export.written}
    path = newest_checkpoint(trainer)
    return {"checkpoint": path} if path else {}
