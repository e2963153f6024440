"""What we use of argparse, and of jsonargparse, which is built on it, beyond their documented interface."""

import re
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping

from jsonargparse import DefaultHelpFormatter

ANNOTATED = re.compile(r"Annotated\[(\w+), ((?:\[.*?\]|[^\[\]])*)\]")


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


def arrange_help(parser: ArgumentParser, titles: Mapping[str, str]) -> None:
    """Titles the sections of settings in `--help` and gives them the order of `titles`; other groups come before them.

    Links between settings, which nobody can set, are left out. Uses `_action_groups`, `_group_actions` and the title of
    the group of links: the parser keeps the order in which LightningCLI adds the sections.

    Args:
        titles: section, such as "model" -> title.
    """
    parser.prog = parser.prog.replace(" [options] ", " ")  # jsonargparse's; all options come behind the command
    order = list(titles)
    groups = {}
    for group in parser._action_groups:
        sections = [action.dest.split(".")[0] for action in group._group_actions]
        section = next((name for name in sections if name in titles), None)
        if group.title == "Linked arguments":
            continue
        group.title = titles[section] if section else group.title
        groups[group] = order.index(section) if section else -1
    parser._action_groups = sorted(groups, key=groups.__getitem__)


class PlainTypes(DefaultHelpFormatter):
    """jsonargparse's help, in which the type `Annotated[float, above 0]` is "float, above 0".

    Overrides `_get_type_str`: a type has no public way to say what it is called.
    """

    def _get_type_str(self, action: Action) -> str | None:
        name = super()._get_type_str(action)
        return name and ANNOTATED.sub(r"\1, \2", name)
