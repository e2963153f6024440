"""The command `runs`: a page of all runs in a folder, newest first, with their results, curves and reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.cli.page import serve_views
from dpo_lightning.errors import UserError
from dpo_lightning.parsing import check_settings, run_function


def runs(folder: str = "lightning_logs", **page: Any) -> None:
    """Serves a page on this machine with the runs in a folder: results, curves that grow with the fit, and reports.

    Args:
        folder: in which the runs are, at any depth.
        page: where the page is served; see `serve_views`.
    """
    check_settings(runs, locals(), "--")
    if not Path(folder).expanduser().is_dir():
        raise UserError(f"--folder '{folder}' is no folder: give the one that has the runs, such as lightning_logs")
    try:
        serve_views(lambda work: [], folder, **page)
    except KeyboardInterrupt:  # the usual end
        pass


def run_runs(args: Sequence[str]) -> None:
    """Runs `runs` with its arguments, the command's name first; the folder may be given without its name."""
    name, *rest = args
    run_function(runs, [name, "--folder", *rest] if rest and not rest[0].startswith("-") else args)
