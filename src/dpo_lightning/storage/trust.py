"""The settings in a checkpoint that may be used: plain values, never anything that runs code.

A checkpoint may come from a stranger. Only the command line and the user's own configuration decide whether a model's
Python code runs (`trust_remote_code`) and which classes are instantiated.
"""

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

import yaml

from dpo_lightning.errors import UserError

TRUST = "trust_remote_code"


def plain_settings(saved: Mapping[str, Any], known: Mapping[str, Parameter], where: str) -> dict[str, Any]:
    """The hyperparameters of a checkpoint without `trust_remote_code`.

    Args:
        known: all existing settings.
        where: the source of `saved`, for messages.

    Raises:
        UserError: a setting does not exist, has no value, or names a class to instantiate (`class_path`).
    """
    settings = {name: value for name, value in saved.items() if not name.startswith("_") and name != TRUST}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{where} has the unknown setting {name!r}: it was edited, or written by another version")
        if value is None and known[name].default is not None:
            raise UserError(f"{where} has the setting {name} without a value: it was edited")
        if isinstance(value, (dict, list, tuple)) and names_a_class(value):
            raise UserError(
                f"{where} was edited, do not use it: its setting {name} names a class to instantiate, but a "
                "checkpoint's settings are plain values"
            )
    return settings


def names_a_class(value: Any) -> bool:
    """Whether jsonargparse, which reads strings within containers as YAML, could find a `class_path` in a value."""
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(names_a_class, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(names_a_class, value))
    return isinstance(value, str) and _is_a_mapping(value)


def _is_a_mapping(text: str) -> bool:
    # Only the events are parsed: a few lines of YAML can expand to more than fits into memory.
    try:
        return any(isinstance(event, yaml.MappingStartEvent) for event in yaml.parse(text, yaml.SafeLoader))
    except yaml.YAMLError:
        return False  # jsonargparse leaves it a string
