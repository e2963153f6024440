"""One thread for all that uses a model, so that two views never compete for the device and the page never waits."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
_END = object()


class Work:
    """Jobs, done one after the other in the order in which they were given.

    A long computation should be many short jobs, such as one for each prompt: others wait only for the current one.

    Attributes:
        ending: set when the program ends; the replies in the making then end as well (`Speaker.replies(stopped=...)`).
    """

    def __init__(self) -> None:
        self.ending = threading.Event()
        self._thread = ThreadPoolExecutor(1, "models")

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Does a job when its turn comes; the future has its result."""
        return self._thread.submit(job)

    def stream(self, pieces: Callable[[], Iterator[T]]) -> Generator[T, None, None]:
        """What `pieces()` yields, as a job; closing this iterator ends the job at its next piece."""
        handed: queue.Queue = queue.Queue()
        closed = threading.Event()

        def job() -> None:
            made = pieces()
            try:
                for piece in made:
                    handed.put(piece)
                    if closed.is_set() or self.ending.is_set():
                        break
            finally:
                if hasattr(made, "close"):
                    made.close()
                handed.put(_END)

        done = self.submit(job)
        done.add_done_callback(lambda _: handed.put(_END))  # also if it never began
        try:
            while (piece := handed.get()) is not _END:
                yield piece
        finally:
            closed.set()
            done.cancel()
        try:
            done.result()  # raises what the job raised
        except CancelledError:
            return

    def end(self) -> None:
        """Ends the current job as soon as it looks at `ending`; those that wait are never begun."""
        self.ending.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
