"""Checks of settings from the command line and YAML files, with one-line errors that name what is allowed."""

import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser

from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.internals.argparse import PlainTypes, arrange_help, option_names

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
MODULES = {"Optimizer": torch.optim, "LRScheduler": torch.optim.lr_scheduler}  # which have such classes
CLASSES = {int: Integral, float: Real, list: list | tuple, dict: Mapping}  # wider types that are accepted
# The parser's message on an argument of a class that a setting names.
OF_A_CLASS = re.compile(
    r"Errors: - (?:there is no setting (?P<unknown>.*?)|(?P<wrong>\w+ is '.*?)|(?P<missing>\w+) is missing: .*?) - "
)
WRONG = re.compile(r'Parser key "(?P<key>[^"]+)": (?P<why>.*)', re.DOTALL)


# ---------------------------------------------------------------------- what a signature allows


class Range(NamedTuple):
    """The allowed values of a number, for `Annotated[int, Range(...)]` with one or more of them."""

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
    """Checks values against a signature's annotations and their `Range`, as jsonargparse does on the command line.

    Args:
        function: its parameters are the settings; those that are not in `values` are not checked.
        prefix: of the settings' names in messages, such as "data.".

    Raises:
        UserError: for the first value that is not allowed.
    """
    for name, kind in get_type_hints(function, include_extras=True).items():
        if name in values:
            check_setting(f"{prefix}{name}", values[name], kind)


def check_setting(name: str, value: Any, kind: Any) -> None:
    """Raises UserError if a value does not match a type, `Literal`, `Annotated` with `Range`, or a union."""
    if wanted := _mismatch(value, kind):
        given = "null" if value is None else repr(value)
        raise UserError(f"{name} is {given}: it must be {wanted}")


def _mismatch(value: Any, kind: Any) -> str:
    """What a value must be, in words; "" if it matches the type."""
    origin, options = get_origin(kind), get_args(kind)
    if kind is Any or kind is NoneType and value is None:
        return ""
    if origin in (Union, UnionType):
        wanted = [_mismatch(value, option) for option in options]
        allowed = [words for words, option in zip(wanted, options, strict=True) if option is not NoneType]
        return " or ".join(allowed) if all(wanted) else ""
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


def shipped_configs() -> dict[str, Path]:
    """The configurations that ship with the package, by name: "gpt2", "lora", "loggers/csv"."""
    package = Path(__file__).parent
    places = (package / "configs", package.parents[1] / "configs")  # in the wheel; at a checkout's top
    folder = next((path for path in places if path.is_dir()), places[0])
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def run_function(function: Callable[..., Any], args: Sequence[str]) -> None:
    """Calls a function with arguments from the command line, which begin with the command's name."""
    from jsonargparse import auto_cli

    name, *rest = args
    prog, about = f"{Path(sys.argv[0]).name} {name}", (function.__doc__ or "").partition("\n")[0]
    auto_cli(function, args=rest, parser_class=OneLineErrorParser, as_positional=False, prog=prog, description=about)


class OneLineErrorParser(LightningArgumentParser):
    """A parser with errors of one line instead of the error and the usage, and without abbreviated names.

    Attributes:
        sections: of settings -> their titles in `--help`, in that order.
    """

    sections: Mapping[str, str] = MappingProxyType({})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": PlainTypes} | kwargs)

    def format_help(self, *args: Any) -> str:
        """The help, with what most users set first."""
        arrange_help(self, self.sections)
        return super().format_help(*args)

    def error(self, message: str, ex: Exception | None = None) -> None:
        """Raises UserError with the message in plain words."""
        raise UserError(explained(" ".join(message.split()), list(option_names(self)))) from ex


def explained(message: str, names: Collection[str]) -> str:
    """jsonargparse's message in words that need no knowledge of Python.

    Args:
        message: on one line.
        names: of all settings.
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
    if found := re.match(r"the following arguments are required: (?:(fit|validate|test|predict)\.)?([^\s,]+)", message):
        configuration = "--config NAME or FILE, such as --config gpt2, or " if found[1] else ""
        return f"{found[2]} is missing: give {configuration}--{found[2]} VALUE"
    if found := re.match(r"argument ([\w.]+) --> ([\w.]+): ", message):  # a linked setting, which jsonargparse fills in
        return no_such_setting(found[2], [found[1]])
    if found := WRONG.match(message):
        return wrong_value(found["key"], found["why"]) or message
    return message


def no_such_setting(key: str, names: Collection[str], dashes: str = "") -> str:
    """The message about an unknown setting, with a similar one if there is any."""
    last = key.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]  # in another section
    near = same[:1] or difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    hint = f"did you mean {dashes}{near[0]}?" if near else "`COMMAND --help` lists them all"
    return f"there is no setting {dashes}{key}: {hint}"


def wrong_value(key: str, why: str) -> str | None:
    """The message about a wrong value and the allowed ones; None if jsonargparse's message is not understood."""
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
    """The configuration files of a command line, in their order, without settings that are given as YAML text."""
    after = [value for option, value in zip(args, args[1:], strict=False) if option in ("--config", "-c")]
    named = after + [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    return [name for name in named if Path(name).exists() or not re.search(r"[\n{]|: ", name)]


def check_config_files(args: Sequence[str]) -> None:
    """Checks the configuration files of a command line.

    Raises:
        UserError: with file and line; one is missing, not text, not YAML, has a name twice, or has no sections.
    """
    for name in config_files(args):
        node = composed(name)
        if node is None:
            raise UserError(f"{name} is empty: it must have sections such as `model:` and `data:`")
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a text"
            raise UserError(
                f"{name}, line {node.start_mark.line + 1}: this is {kind}, but it must be sections such as `model:`"
            )
        check_names(name, node)


def composed(name: str) -> yaml.Node | None:
    """A YAML file's nodes, which have line numbers; None if it is empty.

    Raises:
        UserError: it cannot be read, or is not YAML.
    """
    path = Path(name)
    if path.is_dir():
        files = ", ".join(sorted(file.name for file in path.glob("*.yaml"))) or "it has none"
        raise UserError(f"--config {name} is a folder: name a .yaml file in it ({files})")
    if not path.exists():
        beside = [str(file) for file in path.parent.glob("*") if file.is_file()] if path.parent.is_dir() else []
        hint = did_you_mean(name, beside) or did_you_mean(path.stem, shipped_configs())
        raise UserError(f"--config {name}: no such file{hint}")
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
        hint = "; indent with spaces, tabs are not allowed" if tab else ""
        raise UserError(f"{name}, line {mark.line + 1}: this is not valid YAML: {error.problem}{hint}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{name} is not valid YAML: {error}") from error


def check_names(file: str, node: yaml.MappingNode) -> None:
    """Raises UserError for a name that is twice in a section: YAML would silently use the last one."""
    lines: dict[str, int] = {}
    for key, value in node.value:
        if key.value in lines and key.value != "<<":
            first = lines[key.value]
            raise UserError(
                f"{file}, line {key.start_mark.line + 1}: '{key.value}' is given twice (first in line {first}): "
                "remove one"
            )
        lines[str(key.value)] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            check_names(file, value)


def with_location(error: UserError, args: Sequence[str]) -> UserError:
    """A run's error, with file and line in front if the setting at fault comes from a configuration file."""
    found = re.match(r"(?:there is no setting |unknown )?(data format|[a-z_]+(?:\.\w+)+|\w+(?= is ))", str(error))
    key = {"data format": "data.format"}.get(found[1], found[1]) if found else ""
    given = []  # values on the command line of this setting and those below it
    for arg, after in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if re.fullmatch(rf"--{re.escape(key)}(\..*|\+)?", name):
            given.append(value if equals else after)
    if any(value in str(error) for value in given):
        return error  # not from a file
    for file in reversed(config_files(args)):
        if (nodes := setting(key, composed(file))) is None:
            continue
        key_node, value_node = nodes
        # If the command line gives the setting as well, the file is at fault only if the message has its value.
        if not given or isinstance(value_node, yaml.ScalarNode) and f"'{value_node.value}'" in str(error):
            return UserError(f"{file}, line {key_node.start_mark.line + 1}: {error}")
    return error


def setting(key: str, node: yaml.Node | None) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of the key and the value of a setting such as "model.beta"; None if it is not given."""
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if name.value == key:
            return name, value
        if key.startswith(f"{name.value}.") and (found := setting(key[len(name.value) + 1 :], value)):
            return found
    return None
