"""Chat template + messages -> text, in a process of its own with limits on time and memory.

A chat template is a program that may come from strangers. Jinja's sandbox keeps it from files and from Python, but not
from endless loops or from filling the memory (`10**10**10`, `'x' * 10**10`, doubling a text 40 times), and neither does
a list of forbidden operations. Ending the process does. One process serves all templates.
"""

import atexit
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, str]]
SECONDS = 5  # for one conversation, which usually takes milliseconds
MEGABYTES = 512  # beyond what the process has at its start
LONGEST = 20_000_000  # characters of a rendered conversation
START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from dpo_lightning.data.rendering import serve; serve()"
)


def render_chats(
    tokenizer: "PreTrainedTokenizerBase", template: str | None, chats: Sequence[tuple[Messages, bool]]
) -> list[str]:
    """The result of `tokenizer.apply_chat_template` for each chat, within limits on time and memory.

    Args:
        template: Jinja source; None: the tokenizer's own.
        chats: messages, each with whether the text should end where a reply begins.

    Raises:
        ValueError: the template cannot be compiled or refuses the messages.
        UserError: it takes more time or memory than any conversation does.
    """
    from transformers import PreTrainedTokenizerBase

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # it does not use Jinja
        render = partial(tokenizer.apply_chat_template, chat_template=template, tokenize=False)
        return [render(list(messages), add_generation_prompt=reply_follows) for messages, reply_follows in chats]
    if not all(messages for messages, _ in chats):
        raise ValueError("there is no message")
    shared = {"chat_template": tokenizer.get_chat_template(template), **tokenizer.special_tokens_map}
    requests = [
        {"conversations": [list(messages)], "add_generation_prompt": reply_follows, **shared}
        for messages, reply_follows in chats
    ]
    answer = _WORKER.ask(json.dumps(requests, default=str).encode())
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["texts"]


class _Worker:
    """The process. It is started when needed, also after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def ask(self, request: bytes) -> dict[str, Any]:
        with self._lock:
            for _ in range(2):  # something else may have ended it, such as a suspended machine
                try:
                    if line := self._exchange(request):
                        return json.loads(line)
                except OSError:
                    pass
                except BaseException:  # Ctrl-C: its answer would be taken for the next one
                    self.end()
                    raise
                self.end()
        raise UserError(
            f"the chat template takes more than {SECONDS} seconds or {MEGABYTES} MiB of memory for one conversation: "
            "fix it, or take another one"
        )

    def _exchange(self, request: bytes) -> bytes:
        """The line that answers, empty if the process has ended."""
        if self._process is None or self._owner != os.getpid():  # a fork must not use its parent's pipe
            self._owner = os.getpid()
            limits = json.dumps([SECONDS, MEGABYTES])
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-c", START, json.dumps(sys.path), limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
            assert self._process.stdout
            if not self._process.stdout.readline():
                self.end()
                raise UserError("the process that renders chat templates cannot be started: is there memory for it?")
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(request + b"\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def end(self) -> None:
        """Ends the process, if this one started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            with contextlib.suppress(OSError):
                process.communicate()


_WORKER = _Worker()
atexit.register(_WORKER.end)


def serve() -> None:
    """What the process runs: a line of JSON with what to render -> a line with the texts, or with an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    from transformers.utils.chat_template_utils import render_jinja_template

    seconds, megabytes = json.loads(sys.argv[2])
    _limit_memory(megabytes)
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        _end_in(seconds)
        try:
            data = json.dumps(_answer(render_jinja_template, json.loads(line))).encode()
        except MemoryError:
            os._exit(1)
        _end_in(0)
        answers.write(data + b"\n")
        answers.flush()


def _answer(render: Callable[..., Any], requests: list[dict[str, Any]]) -> dict[str, Any]:
    from dpo_lightning.models.hub import first_line

    texts = []
    for request in requests:
        try:
            ((text,), _) = render(**request)
        except MemoryError:
            raise
        except Exception as error:  # Jinja's, or whatever the template raises
            return {"error": first_line(error)}
        if len(text) > LONGEST:
            return {"error": f"it makes {len(text):,} characters of one conversation, more than {LONGEST:,}"}
        texts.append(text)
    return {"texts": texts}


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
