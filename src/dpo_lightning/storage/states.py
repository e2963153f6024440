"""Checks of the types in a checkpoint's states.

A checkpoint may come from a stranger: what does not fit is reported here in one line, not by an error many steps later.
"""

import math
from typing import Any


def check_state(value: Any, kind: Any, name: str) -> None:
    """Checks a value and its items against a description of types.

    Args:
        kind: a type or a union (a bool is not an `int`); `[kind]` for a list or tuple of such items;
            `(kind, kind, ...)` for a list or tuple of that length; `{type: kind}` for a dictionary with keys of that
            type; `{"name": kind, ...}` for a dictionary with at least these keys.
        name: of the value, for the message.

    Raises:
        ValueError: the value or an item has another type.
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
    """Raises ValueError if a value is not of a type or union of types."""
    kinds = getattr(kind, "__args__", (kind,))
    if not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds:
        names = " or ".join(one.__name__.replace("NoneType", "None") for one in kinds)
        raise ValueError(f"{name} is {type(value).__name__}, not {names}")


def check_amount(value: Any, name: str) -> None:
    """Raises ValueError if a value is not a finite number of 0 or more."""
    check_type(value, int | float, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}, not 0 or more")
