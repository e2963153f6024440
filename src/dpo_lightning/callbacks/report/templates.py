"""Fills the templates of this folder; values that are no HTML of another template become plain text."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo_lightning.visible import visible


def _only_visible(value: Any) -> Any:
    """Prepares a value for escaping: HTML from a template stays as it is, all else becomes visible text."""
    return value if isinstance(value, Markup) else visible(str(value))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
    autoescape=True,
    finalize=_only_visible,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=StrictUndefined,
)


def filled(name: str, **values: Any) -> Markup:
    """The HTML of a template; values are made visible and escaped, except for HTML that this function returned."""
    return Markup(TEMPLATES.get_template(name).render(values))
