"""Text from outside -> text that a terminal only shows: control codes, text direction, hidden marks become escapes.

Rows, column names, file names, templates and replies are strangers' text. Printed raw they could retitle the window,
write the clipboard, wipe or forge lines. `show_only_visible` covers the messages of a whole process, so that no single
one has to think of it; what is printed otherwise goes through `visible` or `one_line` itself.
"""

import logging
import re
import sys
import traceback
import unicodedata
import warnings
from types import TracebackType
from typing import Any

_EMOJI = "\u2600-\u27bf\U0001f000-\U0001faff"
# The zero-width joiner is let through where it makes one emoji of two, and only there.
_JOINED_OR_ONE = re.compile(rf"(?<=[{_EMOJI}\ufe0f])\u200d[{_EMOJI}]|.", re.DOTALL)


def visible(text: str) -> str:
    """Text whose control characters (terminal codes, text direction, nul) are shown as escapes; newlines stay."""
    return text if text.isprintable() else _JOINED_OR_ONE.sub(lambda match: _shown(match[0]), text)


def one_line(text: str) -> str:
    """As `visible`, with newlines shown too: for names, which must not begin a line of their own."""
    return visible(text).replace("\n", "\\n")


def _shown(found: str) -> str:
    # Zs: blanks of any width, such as Chinese text has
    if len(found) > 1 or found == "\n" or found.isprintable() or unicodedata.category(found) == "Zs":
        return found
    return found.encode("unicode_escape").decode()


class VisibleRecord(logging.LogRecord):
    """A log record whose message and traceback are visible text."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        """The message with its arguments in it."""
        return visible(super().getMessage())


def show_only_visible() -> None:
    """From now on this process's log messages, warnings and tracebacks are visible text, whoever they are from.

    To be called again once Lightning is imported, which brings a format of warnings of its own.
    """
    logging.setLogRecordFactory(VisibleRecord)
    sys.excepthook = _show_traceback
    formatted = warnings.formatwarning
    if not getattr(formatted, "shows_only_visible", False):

        def format_visibly(*args: Any, **kwargs: Any) -> str:
            return visible(formatted(*args, **kwargs))

        format_visibly.shows_only_visible = True  # type: ignore[attr-defined]
        warnings.formatwarning = format_visibly


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))
