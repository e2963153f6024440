"""What the command line shows as a single line instead of a traceback."""

import difflib
from collections.abc import Iterable

from dpo_lightning.visible import visible


class UserError(ValueError):
    """Something the user can mend: the message says what was found, where, and what to do, on one line."""

    def __str__(self) -> str:
        """The message; characters that would command a terminal, as names in files may hold, are escaped."""
        return visible(super().__str__())


class Stopped(BaseException):
    """A training run was ended by a signal. No Exception, so that nothing on the way takes it for an error.

    Args:
        signal: the signal's number.
        step: optimizer steps that were done and saved; None where the run was not to finish its step.
    """

    def __init__(self, signal: int, step: int | None = None) -> None:
        super().__init__(f"stopped by signal {signal}")
        self.signal, self.step = signal, step


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The end of a message about an unknown name: "; did you mean 'sigmoid'?", or "" where none of the choices is near.

    Args:
        given: what stands there.
        choices: what may stand there.
    """
    near = difflib.get_close_matches(str(given), list(choices), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""
