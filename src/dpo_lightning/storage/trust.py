"""Settings that a checkpoint brings along -> those of them that may be used: plain values, never what runs code.

Whoever wrote a checkpoint need not be who loads it. What is read from one is data: whether a model's own Python code
runs (`trust_remote_code`), and which classes are made, is only for the command line and the user's own configuration
to say.
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
        known: all settings that there are.
        where: what was loaded, for messages.

    Raises:
        UserError: a setting that there is not, or without a value, or with a class to be made in it (`class_path`).
    """
    settings = {name: value for name, value in saved.items() if not name.startswith("_") and name != TRUST}
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{where} has the setting {name!r}, which there is not: it is of another version or edited")
        if value is None and known[name].default is not None:
            raise UserError(f"{where} has the setting {name} without a value: it was edited")
        if isinstance(value, (dict, list, tuple)) and names_a_class(value):
            raise UserError(
                f"{where} names a class to be made, in its setting {name}: a checkpoint's settings are plain values, "
                "so it was edited; do not use it"
            )
    return settings


def names_a_class(value: Any) -> bool:
    """Whether jsonargparse, which reads texts within containers as YAML, could find a `class_path` in a value."""
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(names_a_class, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(names_a_class, value))
    return isinstance(value, str) and _is_a_mapping(value)


def _is_a_mapping(text: str) -> bool:
    # By its events, not its content: a few lines of YAML can stand for more than any memory holds.
    try:
        return any(isinstance(event, yaml.MappingStartEvent) for event in yaml.parse(text, yaml.SafeLoader))
    except yaml.YAMLError:
        return False  # then it stays a text
