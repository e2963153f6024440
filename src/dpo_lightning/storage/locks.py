"""A file -> one process at a time: others wait for it (`exclusive`), or are told that it is taken (`hold`).

The locks are the system's own, by filelock: it gives them back when a process ends, also by SIGKILL. So what a killed
run left is resumed at once, and a lock file without a process means nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

PATIENCE = 60  # seconds for which a run waits before its processes talk to each other again

_held: dict[str, FileLock] = {}


@contextmanager
def exclusive(path: Path, what: str, strategy: "Strategy | None" = None) -> Iterator[None]:
    """Runs its block in one process, or one run, at a time; the others wait for their turn, and say so once.

    Args:
        path: the lock's file, in a cache, made where it is not there. It stays: to remove it would part those who wait.
        what: is made in the block, for the message.
        strategy: of a run in several processes. To be called on all of them: the first one has the lock, and none
            waits in a barrier longer than `PATIENCE`, whatever the process group's time-out.

    Raises:
        UserError: the file cannot be made.
    """
    lock = FileLock(path) if strategy is None or strategy.is_global_zero else None
    patience = 0
    while True:
        try:
            ours = lock is not None and _taken(lock, patience)
        except OSError as error:
            raise UserError(
                f"the cache folder '{path.parent}' cannot be written: {error.strerror or error}; set HF_DATASETS_CACHE "
                "to a folder that can"
            ) from error
        if ours if strategy is None else strategy.broadcast(ours):
            break
        if not patience:
            rank_zero_info(f"another run is making {what}: waiting for it")
        patience = PATIENCE
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def hold(path: Path) -> bool:
    """Takes a lock until `let_go` or the end of this process; False where another process has it.

    Raises:
        OSError: the file cannot be made.
    """
    name = os.path.abspath(path)
    if name in _held and _held[name].is_locked:  # a fork of this process has the entry, but not the lock
        return True
    lock = FileLock(name, thread_local=False)
    if not _taken(lock, 0):
        return False
    _held[name] = lock
    return True


def let_go(path: Path, remove: bool = False) -> None:
    """Gives a lock back that this process holds; does nothing with any other. `remove`: its file too, if empty."""
    name = os.path.abspath(path)
    lock = _held.pop(name, None)
    if lock is None:
        return
    if remove:
        with suppress(OSError):  # while it is held: who waits for a removed file starts over
            if not os.path.getsize(name):
                os.unlink(name)
    lock.release()


def _taken(lock: FileLock, seconds: float) -> bool:
    try:
        os.makedirs(os.path.dirname(lock.lock_file), exist_ok=True)
        lock.acquire(timeout=seconds, poll_interval=0.1)
    except Timeout:
        return False
    return True
