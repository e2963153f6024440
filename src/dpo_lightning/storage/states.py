"""The state that a part of a run has in a checkpoint -> that it is of the types that this part writes.

A checkpoint comes from outside. What does not fit is found here, in one line, not many steps later in the midst of
whatever uses it.
"""

import math
from typing import Any


def check_state(value: Any, kind: Any, name: str) -> None:
    """Checks a value and all that is in it.

    Args:
        kind: a type or several (`type | type`; a bool is no `int`), `[kind]` of each item of a list or tuple,
            `(kind, kind, ...)` of the items of one of that length, `{type: kind}` of a table with any names of that
            type, or `{"name": kind, ...}` of one with these names at least.
        name: of the value, for the message.

    Raises:
        ValueError: what is of another kind.
    """
    if isinstance(kind, list):
        check_type(value, list | tuple, name)
        for item in value:
            check_state(item, kind[0], name)
    elif isinstance(kind, tuple):
        check_type(value, list | tuple, name)
        if len(value) != len(kind):
            raise ValueError(f"{name} has {len(value)} parts, not {len(kind)}")
        for item, inner in zip(value, kind, strict=True):
            check_state(item, inner, name)
    elif isinstance(kind, dict):
        check_type(value, dict, name)
        for key, inner in kind.items():
            if isinstance(key, str) and key not in value:
                raise ValueError(f"{name} has no {key}")
            named = {key: value[key]} if isinstance(key, str) else value
            for other, item in named.items():
                check_type(other, key if isinstance(key, type) else str, f"a name in {name}")
                check_state(item, inner, f"{name}, {other!r},")
    else:
        check_type(value, kind, name)


def check_type(value: Any, kind: Any, name: str) -> None:
    """Raises ValueError where a value is not of a type, or of none of several (`int | float`)."""
    kinds = getattr(kind, "__args__", (kind,))
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        names = " or ".join(one.__name__.replace("NoneType", "None") for one in kinds)
        raise ValueError(f"{name} is {type(value).__name__}, not {names}")


def check_amount(value: Any, name: str) -> None:
    """Raises ValueError where a value is not a finite number of 0 or more."""
    check_type(value, int | float, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, not 0 or more")
