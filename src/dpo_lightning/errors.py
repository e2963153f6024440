"""The one error class that the command line shows as a single line instead of a traceback."""


class UserError(ValueError):
    """Something the user can mend: the message says what was found, where, and what to do, on one line."""
