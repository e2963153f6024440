"""A model's reply. It has a file of its own because judges need it, and should not wait for torch."""

from typing import NamedTuple


class Reply(NamedTuple):
    """A model's reply to one prompt."""

    text: str
    token_ids: list[int]  # without EOS
    stopped: bool  # ended by EOS, not by the length limit
