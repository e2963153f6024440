"""Errors that the command line shows as one line instead of a traceback."""

import difflib
from collections.abc import Iterable

from dpo_lightning.visible import visible


class UserError(ValueError):
    """A mistake that the user can correct: the message says in one line what is wrong, where, and what to do."""

    def __str__(self) -> str:
        """The message, with control characters escaped, as names in files may contain terminal commands."""
        return visible(super().__str__())


class Stopped(BaseException):
    """A signal ended a training run. It is not an Exception, so that no code between handles it as an error.

    Args:
        signal: the signal's number.
        step: optimizer steps that were done and saved; None if the run ended within a step.
    """

    def __init__(self, signal: int, step: int | None = None) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.step = signal, step


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'sigmoid'?", or "" if no choice is similar."""
    near = difflib.get_close_matches(str(given), list(choices), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
