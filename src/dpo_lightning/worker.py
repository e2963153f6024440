"""Code that may hang, crash or fill the memory, called in a process of its own with limits on time and memory.

A sandbox keeps a chat template from files, but neither it nor a thread can stop an endless loop in a template, a
regular expression or a user's function. Ending the process does.
"""

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from dpo_lightning.errors import UserError

START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dpo_lightning.worker import serve; serve()"
START_SECONDS = 300  # for imports, which may be slow on a network drive
OUT_OF_MEMORY = 71  # the process's exit code


def imported_function(name: str, setting: str) -> Callable[..., Any]:
    """Imports the function that a setting names as `package.module:function`, also from the working directory.

    Raises:
        UserError: it cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as with `python -m`; console scripts do not have it
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # importing a module can fail in any way
        raise UserError(f"{setting} '{name}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise UserError(f"{setting} '{name}' is {type(function).__name__}, not a function")
    return function


class WorkerError(Exception):
    """There is no answer: the code raised an exception, or its process has ended."""


class WorkerEnded(WorkerError):
    """The process has ended: it took too long or too much memory, or crashed."""


class Worker:
    """The process. It is started when needed, also after it has ended.

    Args:
        start: `package.module:function`, called once in the process with `arguments`. It returns the function that
            answers requests. Requests, answers and arguments are what JSON can hold.
        what: it is for, in messages.
        seconds: for one request.
        megabytes: of memory for all requests, beyond what the process has after `start`.
        stderr: of the process, which is also where it prints to: `subprocess.DEVNULL`, or None for this process's own.
    """

    def __init__(
        self,
        start: str,
        arguments: Sequence[Any] = (),
        *,
        what: str,
        seconds: float,
        megabytes: int,
        stderr: int | None = subprocess.DEVNULL,
    ) -> None:
        self.start, self.arguments, self.seconds, self.megabytes = start, arguments, seconds, megabytes
        self._what, self._stderr = what, stderr
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: Any) -> Any:
        """The answer to a request.

        Raises:
            WorkerEnded: the process has ended; the next request starts another one.
            WorkerError: the function raised an exception.
            UserError: the process cannot be started.
        """
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            process = self._started()
            began = time.monotonic()
            if not (reply := self._exchange(process, line, self.seconds + 1)):
                seconds = time.monotonic() - began
                self._end()
                raise WorkerEnded(self._why(process.returncode, seconds))
        answer = json.loads(reply)
        if "error" in answer:
            raise WorkerError(f"raised {answer['error']}")
        return answer["answer"]

    def end(self) -> None:
        """Ends the process, if this one started it."""
        with self._lock:
            self._end()

    def __del__(self) -> None:
        self._end()

    def _started(self) -> subprocess.Popen:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        self._process, self._owner = None, os.getpid()  # a fork must not use its parent's pipe
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-c", START, json.dumps(sys.path)),
                json.dumps([self.start, self.arguments, self.seconds, self.megabytes]),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,  # a group of its own, with all processes that the code starts
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )
        ready = json.loads(self._exchange(self._process, b"", START_SECONDS) or '{"error": "is there memory for it?"}')
        if "error" in ready:
            self._end()
            raise UserError(f"the process for {self._what} cannot be started: {ready['error']}")
        return self._process

    def _exchange(self, process: subprocess.Popen, line: bytes, seconds: float) -> bytes:
        """The line that answers, empty if the process has ended, as it has after `seconds`."""
        assert process.stdin and process.stdout
        # The process ends itself in time, unless the code has called that off.
        timer = threading.Timer(seconds, _kill, [process])
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
        except OSError:
            return b""
        except BaseException:  # Ctrl-C: its answer would be taken for the next one
            self._end()
            raise
        finally:
            timer.cancel()

    def _why(self, code: int, seconds: float) -> str:
        if seconds >= self.seconds:
            return f"took more than {self.seconds:g} seconds"
        if code == OUT_OF_MEMORY:
            return f"took more than {self.megabytes} MiB of memory"
        return f"ended its process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            _kill(process)
            with contextlib.suppress(OSError, ValueError):
                process.communicate()


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started."""
    with contextlib.suppress(OSError):
        if process.returncode is None and hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


# ---------------------------------------------------------------------- in the process


def serve() -> None:
    """What the process runs: a line of JSON with a request -> a line with its answer, or with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What the code prints must not be taken for an answer, nor may it read requests.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    name, arguments, seconds, megabytes = json.loads(sys.argv[2])
    function: Callable[[Any], Any]

    def begin(_: Any) -> None:
        nonlocal function
        function = imported_function(name, "the function")(*arguments)

    answers.write(_answer(begin, None))
    answers.flush()
    _limit_memory(megabytes)
    for line in requests:
        _end_in(seconds)
        data = _answer(function, json.loads(line))
        _end_in(0)
        answers.write(data)
        answers.flush()


def _answer(function: Callable[[Any], Any], request: Any) -> bytes:
    try:
        return json.dumps({"answer": function(request)}).encode() + b"\n"
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except BaseException as error:  # the code may raise anything, SystemExit too
        text = " ".join(str(error).split())[:500]
        return json.dumps({"error": f"{type(error).__name__}: {text}"}).encode() + b"\n"


def _end_in(seconds: float) -> None:
    """Ends this process after some seconds, whatever it is doing; 0 calls that off."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)  # without a handler, its signal ends the process
    elif seconds:  # Windows
        faulthandler.dump_traceback_later(seconds, exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


def _limit_memory(megabytes: int) -> None:
    """Limits the memory that this process may still take, on systems that can."""
    try:
        import resource

        with open("/proc/self/statm") as sizes:
            now = int(sizes.read().split()[0]) * resource.getpagesize()
        limit = now + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):  # Windows, macOS: only time is limited
        pass
