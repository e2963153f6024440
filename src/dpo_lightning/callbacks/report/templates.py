"""A template of this folder and values -> HTML in which whatever came from outside is text and nothing else."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from dpo_lightning.visible import visible


def _only_visible(value: Any) -> Any:
    """What is put into a template, before it is escaped: HTML from a template stays, all else becomes visible text."""
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
    """The HTML of a template with values in it; every value is made visible and escaped, but for such HTML itself."""
    return Markup(TEMPLATES.get_template(name).render(values))
