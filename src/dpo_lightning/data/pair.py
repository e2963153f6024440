"""What a row becomes: a pair of completions to one prompt, or the reason why it cannot."""

from typing import NamedTuple

from dpo_lightning.errors import UserError


class BadRow(UserError):
    """A row that cannot be trained on; `reason` names its kind, under which it is counted when it is skipped."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class BadCell(Exception):
    """What is wrong with a cell (or, without a column, with the pair); `row_to_pair` adds the row."""

    def __init__(self, reason: str, column: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.column = reason, column


class PreferencePair(NamedTuple):
    """One prompt with the completion that is wanted and the one that is not, all as text.

    A conversation is held as its chat template renders it (`chat`): the prompt up to where the assistant's reply
    begins, the completions without the token that ends the turn.
    """

    prompt: str
    chosen: str
    rejected: str
    context: str = ""  # what a reply is judged against (for SQL its CREATE TABLE statements)
    weight: float = 1.0  # of the pair's loss
    margin: float = 0.0  # by how much chosen is to be better
    chat: bool = False
