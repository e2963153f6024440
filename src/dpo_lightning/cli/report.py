"""The command `report`: several runs side by side on one page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.callbacks.report.saved import read_run
from dpo_lightning.callbacks.report.side_by_side import names_of, render_side_by_side
from dpo_lightning.cli.entry import program
from dpo_lightning.errors import UserError
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.visible import one_line

MARK = '<meta name="generator" content="dpo-lightning">'  # of our own pages


def run_report(args: Sequence[str]) -> None:
    """Runs `report` with its arguments, the command's name first.

    Raises:
        UserError: a folder has no report, or the page would replace another file.
    """
    parser = argparse.ArgumentParser(
        f"{program()} report",
        description="Write one page with several runs side by side: results, settings that differ, curves, replies.",
        allow_abbrev=False,
    )
    parser.add_argument("--runs", nargs="+", required=True, metavar="FOLDER", help="folders of runs that have ended")
    parser.add_argument("-o", "--output", default="runs.html", metavar="FILE", help="the page to write (runs.html)")
    given = parser.parse_args(args[1:])
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in given.runs))
    if len(folders) < 2:
        raise UserError("--runs needs two or more folders of runs, such as lightning_logs/version_0")
    runs = [read_run(folder) for folder in folders]
    path = Path(given.output)
    if path.is_dir() or path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
        raise UserError(f"'{path}' exists and is not a report of ours: choose another file with -o")
    page = render_side_by_side(dict(zip(names_of(folders), runs, strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(page, encoding="utf-8")
    print(one_line(f"report: {path}"))
