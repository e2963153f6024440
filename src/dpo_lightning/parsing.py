"""Command line and YAML files -> settings, or one line on what is wrong, where it stands, and what may be there."""

import difflib
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.internals.argparse import option_names

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "dict": "settings of its own (name: value)",
    "list": "a list",
    "Iterable": "a list",
    "NoneType": "null",
    "Optimizer": "the class of an optimizer, by its name in torch.optim or its path (package.module.Class)",
    "LRScheduler": "the class of a schedule, by its name in torch.optim.lr_scheduler or its path",
    "ReduceLROnPlateau": "the class of a schedule, by its name in torch.optim.lr_scheduler or its path",
}
MODULES = {"Optimizer": torch.optim, "LRScheduler": torch.optim.lr_scheduler}  # where such classes are named
CLASSES = {int: Integral, float: Real, list: list | tuple, dict: Mapping}  # whose values count as of the type, too
# What the same parser found wrong with an argument of a class that a setting names.
OF_A_CLASS = re.compile(
    r"Errors: - (?:there is no setting (?P<unknown>.*?)|(?P<wrong>\w+ is '.*?)|[^']* required: (?P<missing>\w+)) - "
)
WRONG = re.compile(r'Parser key "(?P<key>[^"]+)": (?P<why>.*)', re.DOTALL)


# ---------------------------------------------------------------------- what a signature allows


class Range(NamedTuple):
    """The values that a number may have, for `Annotated[int, Range(...)]`; several may follow each other."""

    words: str  # behind "it must be "
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        """The words, for `--help`."""
        return self.words


Finite = Annotated[float, Range("a finite number", math.isfinite)]
Positive = Annotated[float, Range("above 0", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Range("0 or more", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Range("in [0, 1]", lambda value: 0 <= value <= 1)]
PositiveShare = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Count = Annotated[int, Range("0 or more", lambda count: count >= 0)]
AtLeast1 = Annotated[int, Range("at least 1", lambda count: count >= 1)]
Seed = Annotated[int, Range(f"from 0 to {2**32 - 1}", lambda seed: 0 <= seed < 2**32)]  # what numpy takes


def check_settings(function: Callable[..., Any], values: Mapping[str, Any], prefix: str) -> None:
    """Checks values against a signature's annotations, as jsonargparse does for the command line, and `Range` too.

    Args:
        function: whose parameters the settings are; those without a value are not checked.
        prefix: of the settings' names in messages, such as "data.".

    Raises:
        UserError: the first value that is not allowed, and what is.
    """
    for name, kind in get_type_hints(function, include_extras=True).items():
        if name in values:
            check_setting(f"{prefix}{name}", values[name], kind)


def check_setting(name: str, value: Any, kind: Any) -> None:
    """Raises UserError where a value is not of a kind: a type, `Literal`, `Annotated` with `Range`, or a union."""
    if wanted := _mismatch(value, kind):
        given = "null" if value is None else repr(value)
        raise UserError(f"{name} is {given}: it must be {wanted}")


def _mismatch(value: Any, kind: Any) -> str:
    """What a value of a kind must be, in words; "" where it is that."""
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any or kind is NoneType and value is None:
        return ""
    if origin in (Union, UnionType):
        wanted = [_mismatch(value, option) for option in options]
        words = [words for words, option in zip(wanted, options, strict=True) if option is not NoneType]
        return " or ".join(words) if all(wanted) else ""
    if origin is Literal:
        return "" if value in options else f"one of {', '.join(options)}{did_you_mean(value, options)}"
    if origin is Annotated:
        base, *ranges = options
        if words := _mismatch(value, base):
            return ranges[0].words if ranges[0].words.startswith(words) else f"{words}, {ranges[0].words}"
        return next((one.words for one in ranges if not one.holds(value)), "")
    if origin is Callable:
        return "" if callable(value) else "a function"
    plain = origin or kind
    words = KINDS[plain.__name__]
    if not isinstance(value, CLASSES.get(plain, plain)) or isinstance(value, bool) and plain in (int, float):
        return words
    items = () if not options else value.values() if plain is dict else value
    return next((f"{words}, each {inner}" for item in items if (inner := _mismatch(item, options[-1]))), "")


# ---------------------------------------------------------------------- the command line


class OneLineErrorParser(LightningArgumentParser):
    """A parser whose errors are one line instead of the error and all usage, and that takes whole names only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raises UserError with what the message says, in the user's words."""
        raise UserError(explained(" ".join(message.split()), list(option_names(self)))) from ex


def explained(message: str, names: Collection[str]) -> str:
    """What jsonargparse's message says, in words that do not need to know Python.

    Args:
        message: on one line.
        names: of all settings there are.
    """
    if message.startswith("unrecognized arguments: "):
        given = message.removeprefix("unrecognized arguments: ").split()
        options = [word for word in given if word.startswith("-")]
        if not options:
            return f"'{given[0]}' is neither a setting nor its value: settings are given as --name value"
        return no_such_setting(options[0].lstrip("-").partition("=")[0], names, dashes="--")
    if "accept" in message and (found := re.search(r"[Oo]ption '([\w.+]+)'", message)):
        group = re.match(r"Group '([^']+)'", message)
        return no_such_setting(f"{group[1]}.{found[1]}" if group else found[1], names)
    if found := re.match(r"argument ([\w.]+) --> ([\w.]+): ", message):  # a setting that jsonargparse fills in itself
        return no_such_setting(found[2], [found[1]])
    if found := WRONG.match(message):
        return wrong_value(found["key"], found["why"]) or message
    return message


def no_such_setting(key: str, names: Collection[str], dashes: str = "") -> str:
    """That there is no setting of this name, and which one may have been meant."""
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]  # it stands in another section
    near = same[:1] or difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    hint = f"did you mean {dashes}{near[0]}?" if near else "`COMMAND --help` lists them all"
    return f"there is no setting {dashes}{key}: {hint}"


def wrong_value(key: str, why: str) -> str | None:
    """What a setting was given and what it may be, where jsonargparse's words are understood; else None."""
    if found := OF_A_CLASS.search(why):
        if found["unknown"]:
            return f"there is no setting {key}.{found['unknown']}"
        return f"{key}.{found['wrong']}" if found["wrong"] else f"{key}.{found['missing']} is missing"
    found = re.search(r"(?:Got value: |Given value: )(.*)$", why)
    if not found:
        return None
    given = "null" if found[1].strip() == "None" else found[1].strip()
    wanted = why[: found.start()].partition("Subtypes: ")[2].partition("Errors:")[0] or why[: found.start()]
    words, choices = [], []
    for literal, *kinds in re.findall(r"Literal\[([^\]]*)\]|<class '([\w.]+)'>|Annotated\[(\w+)", wanted):
        kind = "".join(kinds)
        choices += [choice.strip(" '\"") for choice in literal.split(",")] if literal else []
        words += [KINDS.get(kind.rpartition(".")[2], kind.rpartition(".")[2])] if kind else []
    if re.search(r"(?<!\w)(list|Iterable)\[", wanted):
        words.append(KINDS["list"])
    if "dict[" in wanted:
        words.append(KINDS["dict"])
    if choices:
        words.insert(0, f"one of {', '.join(dict.fromkeys(choices))}")
    words = [word for word in dict.fromkeys(words) if word != "null"] + (["null"] if "NoneType" in wanted else [])
    if not words:
        return None
    classes = next((vars(module) for kind, module in MODULES.items() if f".{kind}'" in wanted), ())
    return f"{key} is '{given}': it must be {' or '.join(words)}{did_you_mean(given, [*choices, *classes])}"


# ---------------------------------------------------------------------- YAML files


def config_files(args: Sequence[str]) -> list[str]:
    """The configuration files that a command line names, in their order; settings written out in it are no file."""
    after = [value for option, value in zip(args, args[1:], strict=False) if option in ("--config", "-c")]
    named = after + [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [name for name in named if Path(name).exists() or not re.search(r"[\n{]|: ", name)]


def check_config_files(args: Sequence[str]) -> None:
    """Reads the files that a command line names.

    Raises:
        UserError: one is not there, no text, no valid YAML, has a name twice, or has no sections; with file and line.
    """
    for name in config_files(args):
        node = composed(name)
        if node is None:
            raise UserError(f"{name} is empty: it must have sections such as `model:` and `data:`")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a text"
            raise UserError(
                f"{name}, line {node.start_mark.line + 1}: here begins {kind}, where sections such as `model:` belong"
            )
        check_names(name, node)


def composed(name: str) -> yaml.Node | None:
    """A YAML file's nodes, which know their lines; None where it is empty.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    path = Path(name)
    if path.is_dir():
        inside = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "it has none"
        raise UserError(f"--config {name} is a folder: name a .yaml file in it ({inside})")
    if not path.exists():
        beside = [str(file) for file in path.parent.glob("*") if file.is_file()] if path.parent.is_dir() else []
        raise UserError(f"--config {name}: no such file{did_you_mean(name, beside)}")
    try:
        content = path.read_bytes()
        return yaml.compose(content.decode(), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {name} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {line}: this is not UTF-8 text: save the file as UTF-8") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or yaml.Mark(name, 0, 0, 0, None, 0)
        tab = content.decode().split("\n")[mark.line].lstrip(" ").startswith("\t")
        hint = "; indent with blanks, a tab is not allowed" if tab else ""
        raise UserError(f"{name}, line {mark.line + 1}: this is not valid YAML: {error.problem}{hint}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {error}") from error


def check_names(file: str, node: yaml.MappingNode) -> None:
    """Raises UserError where a name stands twice in a section: YAML would take the last without a word."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        if key.value in lines and key.value != "<<":
            first = lines[key.value]
            raise UserError(
                f"{file}, line {key.start_mark.line + 1}: '{key.value}' is there twice (first in line {first}): "
                "leave one out"
            )
        lines[str(key.value)] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            check_names(file, value)


def with_location(error: UserError, args: Sequence[str]) -> UserError:
    """An error of a run with this command line, with file and line in front where a file gives the setting at fault."""
    found = re.match(r"(?:there is no setting |unknown )?(data format|[a-z_]+(?:\.\w+)+|\w+(?= is ))", str(error))
    key = {"data format": "data.format"}.get(found[1], found[1]) if found else ""
    given = []  # on the command line, for this setting or one below it
    for arg, after in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if re.fullmatch(rf"--{re.escape(key)}(\..*|\+)?", name):
            given.append(value if equals else after)
    if any(value in str(error) for value in given):
        return error  # no file is to blame
    for file in reversed(config_files(args)):
        if (nodes := setting(key, composed(file))) is None:
            continue
        named, given_there = nodes
        # Of a setting that the command line gives too, the file's value is at fault only where the message shows it.
        if not given or isinstance(given_there, yaml.ScalarNode) and f"'{given_there.value}'" in str(error):
            return UserError(f"{file}, line {named.start_mark.line + 1}: {error}")
    return error


def setting(key: str, node: yaml.Node | None) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of the name and of the value of a setting such as "model.beta"; None where it is not given."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if name.value == key:
            return name, value
        if key.startswith(f"{name.value}.") and (found := setting(key[len(name.value) + 1 :], value)):
            return found
    return None


# ---------------------------------------------------------------------- functions of the user's own


def imported_function(name: str, setting: str) -> Callable[..., Any]:
    """The function that a setting names as `package.module:function`; the working directory is searched, too.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; the console script does not
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # whatever the module does when it is run
        raise UserError(f"{setting} '{name}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{setting} '{name}' is {type(function).__name__}, not a function")
    return function
