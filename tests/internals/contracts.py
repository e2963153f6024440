"""A use of another library's inner parts -> a failure that says what has changed and which feature of ours needs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

import pytest


@contextmanager
def contract(library: str, used: str, feature: str) -> Iterator[None]:
    """Fails with the library's version, what we use of it, and our feature that breaks, whatever goes wrong within."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        pytest.fail(
            f"{library} {version(library)} has changed {used}, which src/dpo_lightning/internals uses. What breaks: "
            f"{feature}. ({reason})"
        )
