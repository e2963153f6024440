"""The view Runs: the runs in a folder, newest first, with their results, and their curves while they grow."""

import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dpo_lightning.callbacks.report.charts import SERIES_COLOURS, line_plot
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.page import charts
from dpo_lightning.errors import UserError
from dpo_lightning.judging.quantities import number_text, percent, quantity, reply_tag, results, verdict_of
from dpo_lightning.models.hub import first_line
from dpo_lightning.page.run_files import (
    LARGEST_REPORT,
    REPORT,
    Run,
    content,
    event_files,
    last_change,
    run_at,
    run_folders,
)
from dpo_lightning.page.view import View
from dpo_lightning.visible import one_line, visible

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MOST_RUNS = 200  # that are listed
MOST_CHARTS = 60  # of a run; and as many results
MOST_POINTS = 2_000  # of a curve; of more, TensorBoard's reader keeps a random sample and the last
# A report needs nothing but its own styles. In a sandbox it has no origin, so that it could not call the server either.
REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
RESULTS = {  # beside those of the replies
    "val/rewards/accuracies": "pairs with a positive margin",
    "val/loss": "validation loss",
    "train/loss": "training loss",
}


class Figure(NamedTuple):
    """A result: "valid SQL", "0% → 86%"."""

    label: str
    values: str


class Runs:
    """The runs below a folder. May be used from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folders: dict[str, Path] = {}  # by the ids of their runs
        self._readers: dict[Path, EventAccumulator] = {}
        self._reading = threading.Lock()

    def newest(self) -> tuple[list[Run], int]:
        """The runs, newest first, at most `MOST_RUNS`, and how many were found."""
        found = sorted(run_folders(self.folder), key=last_change, reverse=True)
        runs = [run_at(folder, self.folder) for folder in found[:MOST_RUNS]]
        self._folders = {run.id: run.folder for run in runs}
        return runs, len(found)

    def view(self) -> View:
        """The tab: `list` has all runs with their results so far, `curves` the charts of one."""
        return View("runs", {"list": self.listed, "curves": self.drawn}, [Route("/runs/{id}/report.html", self._serve)])

    def listed(self) -> dict[str, Any]:
        """What the browser shows of all runs."""
        runs, found = self.newest()
        return {"runs": [self._shown(run) for run in runs], "found": found, "folder": one_line(str(self.folder))}

    def drawn(self, id: str) -> dict[str, Any]:
        """What the browser shows of a run, with its charts."""
        run = self.find(id)
        if run is None:
            raise UserError("this run is no longer there")
        try:
            drawn = plots(self.curves(run))
        except ValueError as error:
            raise UserError(f"the curves of {run.name} cannot be read: {error}") from error
        return {"run": self._shown(run), "plots": drawn}

    def _shown(self, run: Run) -> dict[str, Any]:
        with suppress(ValueError):  # `drawn` tells why
            return {**run._asdict(), "folder": None, "figures": figures(self.curves(run))}
        return {**run._asdict(), "folder": None, "figures": []}

    def _serve(self, request: Request) -> Response:
        found = self.report(request.path_params["id"])
        if found is None:
            return Response("there is no such report\n", 404, media_type="text/plain")
        return Response(found, media_type="text/html", headers={"content-security-policy": REPORT_POLICY})

    def find(self, id: str) -> Run | None:
        """A run of the list by its id, as it is now; None if there is none."""
        if id not in self._folders:
            self.newest()
        return run_at(self._folders[id], self.folder) if id in self._folders else None

    def report(self, id: str) -> bytes | None:
        """The bytes of a run's report; None if there is none, or it is not a plain file of its folder."""
        run = self.find(id)
        return content(run.folder / REPORT, LARGEST_REPORT) if run else None

    def curves(self, run: Run) -> dict[str, Curve]:
        """All scalars of a run's TensorBoard files, by name; {} without any.

        A second call reads only what was added since.

        Raises:
            ValueError: TensorBoard's reader cannot read them.
        """
        if not event_files(run.folder):
            return {}
        with self._reading:
            if run.folder not in self._readers:
                self._readers[run.folder] = _reader(run.folder)
            reader = self._readers[run.folder]
            try:
                reader.Reload()
                names = reader.Tags()["scalars"]
                return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in names}
            except Exception as error:  # whatever the bytes make of the reader
                del self._readers[run.folder]
                raise ValueError(first_line(error)) from error


def figures(curves: dict[str, Curve]) -> list[Figure]:
    """The results of a run so far, first → last: of its replies, then of its validations."""
    names = results(name for tag in curves if (name := verdict_of(tag)))
    labels = {reply_tag(name): (quantity(name).label, quantity(name).share) for name in names}
    labels |= {name: (label, name.endswith("accuracies")) for name, label in RESULTS.items()}
    found = []
    for name, (label, share) in labels.items():
        values = [value for _, value in curves.get(name, []) if abs(value) < 1e100]
        if values and not (name == "train/loss" and "val/loss" in curves):
            ends = dict.fromkeys((percent if share else number_text)(value) for value in (values[0], values[-1]))
            found.append(Figure(visible(label), " → ".join(ends)))
    return found[:MOST_CHARTS]


def plots(curves: dict[str, Curve]) -> list[dict[str, Any]]:
    """The charts of a run in SVG coordinates, as JSON: see `callbacks.report.charts.Plot`."""
    found = []
    for chart, series in charts(curves)[:MOST_CHARTS]:
        if plot := line_plot(series, chart.share):
            colours = {line["name"]: number % SERIES_COLOURS for number, line in enumerate(plot.series)}
            lines, ends = (
                [{**line, "name": visible(line["name"]), "colour": colours[line["name"]]} for line in lines]
                for lines in (plot.series, plot.ends)
            )
            size = {name: getattr(plot, name) for name in ("width", "height", "left", "right", "x_labels", "y_labels")}
            found.append(
                {"title": visible(chart.title), "good": visible(chart.good), **size, "series": lines, "ends": ends}
            )
    return found


def _reader(folder: Path) -> "EventAccumulator":
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kinds = ("tensors", "histograms", "compressedHistograms", "images", "audio")
    return EventAccumulator(str(folder), size_guidance={"scalars": MOST_POINTS} | dict.fromkeys(kinds, 1))
