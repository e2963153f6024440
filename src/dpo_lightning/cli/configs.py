"""Shipped configurations by name: in `--config gpt2`, and for the command `configs`: list, print and copy them."""

import argparse
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.cli.entry import program
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.parsing import shipped_configs

HINT = """
Train with one: fit --config gpt2; add overlays after it: fit --config gpt2 --config lora.
Edit one: configs --copy gpt2 writes gpt2.yaml, for fit --config gpt2.yaml."""


def run_configs(args: Sequence[str]) -> None:
    """Runs `configs`: lists the shipped configurations, prints one, or copies one into the working directory.

    Raises:
        UserError: there is no such configuration, or the copy would replace a file.
    """
    parser = argparse.ArgumentParser(
        f"{program()} configs",
        description="List the configurations that ship with this package, print or copy one.",
    )
    parser.add_argument("name", nargs="?", help="the configuration to print")
    parser.add_argument("--copy", action="store_true", help="write it to a file here instead, to be edited")
    given, shipped = parser.parse_args(args[1:]), shipped_configs()
    if given.name in shipped:
        print_or_copy(shipped[given.name], given.copy)
    elif given.name is not None:
        hint = did_you_mean(given.name, shipped) or f": it is one of {', '.join(shipped)}"
        raise UserError(f"there is no configuration '{given.name}'{hint}")
    elif given.copy:
        raise UserError("configs --copy needs a name, such as `configs --copy gpt2`")
    else:
        width, columns = max(map(len, shipped), default=0), shutil.get_terminal_size((200, 24)).columns
        for name, path in shipped.items():
            print(f"{name:{width}}  {textwrap.shorten(summary(path), columns - width - 2, placeholder='…')}")
        print(HINT)


def print_or_copy(source: Path, copy: bool) -> None:
    """Prints a configuration, or writes it to a new file of the same name in the working directory."""
    text = source.read_text(encoding="utf-8")
    if not copy:
        print(text, end="")
        return
    try:
        with open(source.name, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"'{source.name}' already exists here: move it away, or copy in another folder") from error
    print(f"written to {source.name}")


def summary(path: Path) -> str:
    """What a configuration is for: the first line of its comment."""
    with path.open(encoding="utf-8") as lines:
        return next(lines).removeprefix("#").strip()


def with_shipped(args: Sequence[str]) -> list[str]:
    """A command's arguments, with the path of a shipped configuration for its name; a file of that name comes first."""
    shipped, result = shipped_configs(), list(args)
    for number, (before, arg) in enumerate(zip(["", *args], args, strict=False)):
        option, equals, name = ("", "", arg) if before in ("--config", "-c") else arg.partition("=")
        if name in shipped and option in ("", "--config") and not Path(name).is_file():
            result[number] = f"{option}{equals}{shipped[name]}"
    return result
