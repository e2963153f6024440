"""What we use of argparse, on which jsonargparse is built, beyond its documented interface."""

from argparse import ArgumentParser
from collections.abc import Iterator


def option_names(parser: ArgumentParser) -> Iterator[str]:
    """The names of all settings of a parser and of its commands, such as "model.beta".

    Uses `_actions` and what an action of commands has as choices: jsonargparse lists the settings of one command alone,
    and only once all that are required are given.
    """
    for action in parser._actions:
        yield from (option[2:] for option in action.option_strings if option.startswith("--"))
        for other in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            if isinstance(other, ArgumentParser):
                yield from option_names(other)
