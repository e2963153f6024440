"""The command `runs`: a page of all runs in a folder, newest first, with their results, curves and reports."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_lightning.cli.page import check_page, serve_views
from dpo_lightning.errors import UserError
from dpo_lightning.parsing import AtLeast1, check_settings, run_function

if TYPE_CHECKING:
    from dpo_lightning.page.view import View
    from dpo_lightning.page.work import Work


def runs(
    folder: str = "lightning_logs", host: str = "127.0.0.1", port: AtLeast1 = 7865, token: str | None = None
) -> None:
    """Serves a page on this machine with the runs in a folder: results, curves that grow with the fit, and reports.

    Args:
        folder: in which the runs are, at any depth.
        host: address at which the page is served; any but this machine's own (127.0.0.1) needs a token.
        port: of the page.
        token: a secret that must be in the page's address.
    """
    check_settings(runs, locals(), "--")
    check_page("runs", host, token)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise UserError(f"--folder '{folder}' is no folder: give the one that has the runs, such as lightning_logs")

    def make_views(work: "Work") -> "list[View]":
        from dpo_lightning.page.runs import Runs

        return [Runs(path).view()]

    try:
        serve_views(make_views, host, port, token)
    except KeyboardInterrupt:  # the usual end
        pass


def run_runs(args: Sequence[str]) -> None:
    """Runs `runs` with its arguments, the command's name first; the folder may be given without its name."""
    name, *rest = args
    run_function(runs, [name, "--folder", *rest] if rest and not rest[0].startswith("-") else args)
