"""Escapes what a terminal would not merely display: control codes, text direction, invisible characters.

Rows, column names, file names, templates and replies are written by strangers. Printed raw they could retitle the
window, write to the clipboard, delete or forge lines. `show_only_visible` covers all log messages, warnings and
tracebacks of a process; anything else that is printed goes through `visible` or `one_line`.
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
# The zero-width joiner is kept only where it joins two emoji into one.
_JOINED_OR_ONE = re.compile(rf"(?<=[{_EMOJI}\ufe0f])\u200d[{_EMOJI}]|.", re.DOTALL)


def visible(text: str) -> str:
    """Text with control characters (terminal codes, text direction, NUL) as escapes; newlines are kept."""
    return text if text.isprintable() else _JOINED_OR_ONE.sub(lambda match: _escaped(match[0]), text)


def one_line(text: str) -> str:
    """As `visible`, with newlines escaped as well: for names, which must not begin a line of their own."""
    return visible(text).replace("\n", "\\n")


def _escaped(text: str) -> str:
    # Zs: spaces of any width, such as those in Chinese text
    if len(text) > 1 or text == "\n" or text.isprintable() or unicodedata.category(text) == "Zs":
        return text
    return text.encode("unicode_escape").decode()


class VisibleRecord(logging.LogRecord):
    """A log record whose message and traceback are escaped by `visible`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = visible("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        """The message with its arguments."""
        return visible(super().getMessage())


def show_only_visible() -> None:
    """From now on all log messages, warnings and tracebacks of this process are escaped by `visible`.

    Call it again after Lightning has been imported, which sets its own format of warnings.
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
