"""The command `demo`: `fit` with the configuration, model and rows that ship with the package."""

import argparse
import os
import sys
import webbrowser
from collections.abc import Sequence

from dpo_lightning.callbacks.context import run_folder
from dpo_lightning.cli.entry import program
from dpo_lightning.cli.trainer import run_trainer
from dpo_lightning.parsing import shipped_configs

NEXT = """
The questions are about tables that were not trained on; SQL is valid if it
compiles against the question's own CREATE TABLE. Where to look next:
    {report}    in a browser: replies, curves, costs
    tensorboard --logdir {logs}    the curves
    dpo-lightning chat --model {folder}    ask it yourself
    dpo-lightning fit --config gpt2    the real thing: GPT-2"""


def run_demo(args: Sequence[str]) -> None:
    """Runs `demo`; other arguments than its own go to `fit`."""
    parser = argparse.ArgumentParser(
        f"{program()} demo",
        description="Train a tiny model on rows that ship with the package, and say where its report is.",
        epilog="Any setting of `fit` can be given as well, such as --trainer.max_steps 40.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--open",
        action=argparse.BooleanOptionalAction,
        default=sys.stdout.isatty() and any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))),
        help="open the report in a browser at the end; without either, done on a desktop",
    )
    given, settings = parser.parse_known_args(args[1:])
    trainer = run_trainer(["fit", "--config", str(shipped_configs()["demo"]), *settings]).trainer
    folder = run_folder(trainer)
    if folder is None or not trainer.is_global_zero or not (report := folder / "report.html").is_file():
        return
    print(NEXT.format(report=report, logs=folder.parent, folder=folder))
    if given.open:
        webbrowser.open(report.absolute().as_uri())
