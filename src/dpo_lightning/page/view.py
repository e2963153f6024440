"""A tab of the page, and text as the page shows it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from starlette.routing import BaseRoute


class View(NamedTuple):
    """A tab of the page: `static/NAME.js` draws it, and calls the actions (`POST /api/NAME/ACTION`, a JSON object).

    Attributes:
        actions: functions by name, called in threads of their own with the object's values as keyword arguments, which
            are checked against the annotations. They return an object for JSON, or an iterator of objects, which the
            browser gets one by one. A UserError is shown to the user. All text from outside goes through `shown`.
        routes: of Starlette, for files.
    """

    name: str
    actions: Mapping[str, Callable[..., dict[str, Any] | Iterator[dict[str, Any]]]]
    routes: "Sequence[BaseRoute]" = ()


def shown(text: str) -> str:
    """Text in which control codes and text direction are visible as escapes; newlines and tabs are kept."""
    return "\t".join(visible(part) for part in text.split("\t"))
