"""What we use of the C library's allocator, which is glibc's on most Linux systems. Elsewhere nothing happens."""

import ctypes
import os
import sys
from collections.abc import Callable

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # parameters of mallopt
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed() -> bool:
    """Keeps what is freed from now on for later allocations. Returns whether it does.

    By default large blocks go back to the system, which has to clear their pages when they are allocated again. It does
    nothing if the environment sets the allocator.
    """
    tuned = "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or any(name in os.environ for name in SETTINGS)
    return not tuned and _set({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})


def release_freed() -> None:
    """Ends `keep_freed`: what is free goes back to the system now, and large blocks when they are freed."""
    # The largest values that glibc chooses by itself, which it no longer does once any of them has been set.
    if _set({MMAP_MAX: 2**16, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}):
        trim()


def trim() -> None:
    """Gives all that is free back to the system."""
    if function := _function("malloc_trim"):
        function(0)


def _set(parameters: dict[int, int]) -> bool:
    mallopt = _function("mallopt")
    return mallopt is not None and all([mallopt(name, value) for name, value in parameters.items()])


def _function(name: str) -> Callable[..., int] | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
