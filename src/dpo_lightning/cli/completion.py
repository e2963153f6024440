"""The command `completion`: prints a script with which a shell completes commands, settings and configurations."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from jsonargparse import ArgumentParser, capture_parser

from dpo_lightning.cli.chat import run_chat
from dpo_lightning.cli.entry import COMMANDS, program
from dpo_lightning.cli.export import run_export
from dpo_lightning.cli.inspect import InspectCLI
from dpo_lightning.cli.trainer import DPOCLI, DownloadCLI, configured
from dpo_lightning.errors import UserError
from dpo_lightning.internals.argparse import command_action
from dpo_lightning.parsing import OneLineErrorParser
from dpo_lightning.shipped import shipped_configs

PROGRAM = "dpo-lightning"


def run_completion(args: Sequence[str]) -> None:
    """Runs `completion`: `dpo-lightning completion bash > FILE`, for bash to source FILE.

    Raises:
        UserError: the package shtab is missing.
    """
    parser = argparse.ArgumentParser(f"{program()} completion", description=f"{COMMANDS['completion'].help}.")
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="bash: put it in a file that ~/.bashrc sources")
    shell = parser.parse_args(args[1:]).shell
    if not find_spec("shtab"):
        raise UserError("completion needs a missing package: pip install shtab")
    print(whole_parser().get_completion_script(f"shtab-{shell}"))


def whole_parser() -> ArgumentParser:
    """A parser of all commands. It only describes them: each command parses its arguments with a parser of its own."""
    parser = capture_parser(lambda: configured(DPOCLI, ["fit"], run=True))
    parser.prog = PROGRAM
    commands = command_action(parser)
    others: dict[str, ArgumentParser] = {
        "inspect": capture_parser(lambda: configured(InspectCLI, [], run=False)),
        "download": capture_parser(lambda: configured(DownloadCLI, [], run=False)),
        "export": capture_parser(lambda: run_export(["export"])),
        "chat": capture_parser(lambda: run_chat(["chat"])),
        **{name: OneLineErrorParser() for name in ("demo", "configs", "completion", "help")},
    }
    others["demo"].add_argument("--open", action="store_true")
    others["configs"].add_argument("--copy", action="store_true")
    others["configs"].add_argument("name", choices=list(shipped_configs()))
    others["help"].add_argument("command", choices=list(COMMANDS))
    for name, other in others.items():
        commands.add_subcommand(name, other)
    return parser
