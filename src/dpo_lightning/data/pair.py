"""What a row becomes: a preference pair, or an error that says why it cannot be used."""

from typing import NamedTuple

from dpo_lightning.errors import UserError


class BadRow(UserError):
    """A row that cannot be trained on. Skipped rows are counted by `reason`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BadCell(Exception):
    """What is wrong with a cell or, without a column, with the pair. `row_to_pair` adds which row it is."""

    def __init__(self, reason: str, column: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.column = reason, column


class PreferencePair(NamedTuple):
    """A prompt with a preferred and a dispreferred completion, all as text.

    A conversation (`chat`) is stored as its chat template renders it: the prompt up to where the assistant's reply
    begins, the completions without the token that ends the turn.
    """

    prompt: str
    chosen: str
    rejected: str
    context: str = ""  # what replies are judged against; for SQL, the CREATE TABLE statements
    weight: float = 1.0  # multiplies the pair's loss
    margin: float = 0.0  # by how much chosen should be better
    chat: bool = False  # whether a chat template rendered it
    label: bool | None = None  # of a row with one completion: True if that is `chosen`, False if it is `rejected`
