"""Locks for one process at a time: others wait (`exclusive`), or learn that it is taken (`hold`).

They are the operating system's locks (filelock), which are released when a process ends, also by SIGKILL. So a killed
run's work can be resumed at once, and a lock file without a process means nothing.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import reason_of

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

INSTANT = 0.2  # seconds that `hold` waits for who only asks (`is_held`)
PATIENCE = 60  # seconds that a run waits before its processes communicate again

_held: dict[str, FileLock] = {}


@contextmanager
def exclusive(path: Path, what: str, strategy: "Strategy | None" = None) -> Iterator[None]:
    """Runs the block in one process, or one run, at a time; the others wait and report it once.

    Args:
        path: the lock's file in a cache, created if missing and never removed, as other processes may wait for it.
        what: is created in the block, for the message.
        strategy: of a run in several processes; call this on all of them. The first one takes the lock, and none
            waits in a barrier longer than `PATIENCE`, whatever the process group's timeout.

    Raises:
        UserError: the file cannot be created.
    """
    lock = FileLock(path) if strategy is None or strategy.is_global_zero else None
    patience = 0
    while True:
        try:
            ours = lock is not None and _taken(lock, patience)
        except OSError as error:
            raise UserError(
                f"the cache folder '{path.parent}' cannot be written: {reason_of(error)}; set HF_DATASETS_CACHE to a "
                "folder that can"
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
    """Takes a lock until `let_go` or the end of this process; False if another process has it.

    Raises:
        OSError: the file cannot be created.
    """
    name = os.path.abspath(path)
    if name in _held and _held[name].is_locked:  # a fork of this process has the entry, but not the lock
        return True
    lock = FileLock(name, thread_local=False)
    if not _taken(lock, INSTANT):
        return False
    _held[name] = lock
    return True


def let_go(path: Path, remove: bool = False) -> None:
    """Releases a lock if this process holds it; with `remove`, also deletes its file if that is empty."""
    name = os.path.abspath(path)
    lock = _held.pop(name, None)
    if lock is None:
        return
    if remove:
        with suppress(OSError):  # before the release: a process that waits for a removed file starts over
            if not os.path.getsize(name):
                os.unlink(name)
    lock.release()


def is_held(path: Path) -> bool:
    """Whether any process holds a lock. To find out, this takes it for an instant, for which `hold` waits."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # creates no file, and waits for no writer of a pipe
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def in_use(what: str, alternative: str) -> UserError:
    """The error of a run that cannot have what another one has locked."""
    return UserError(f"{what} is in use by another run: wait until it ends, stop it, or {alternative}")


def _taken(lock: FileLock, seconds: float) -> bool:
    try:
        os.makedirs(os.path.dirname(lock.lock_file), exist_ok=True)
        lock.acquire(timeout=seconds, poll_interval=0.1)
    except Timeout:
        return False
    return True
