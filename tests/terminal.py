"""A command in a terminal of its own -> all lines that its user can see or scroll back to, as a terminal shows them."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyte

from conftest import REPO


class Seen(NamedTuple):
    """What is left in a terminal."""

    status: int
    lines: list[str]  # scrollback and screen, spaces at the end stripped
    cursor_shown: bool
    raw: bytes


def in_terminal(
    args: Sequence[object],
    cwd: Path,
    columns: int = 80,
    rows: int = 30,
    term: str = "xterm-256color",
    timeout: float = 240,
    interrupt_at: Callable[[bytes], bool] | None = None,
    **env: str,
) -> Seen:
    """Runs `cli.py` with these arguments; `interrupt_at` tells from the output so far when to press Ctrl-C."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    # PYTHONUNBUFFERED: a write that a signal interrupts loses its rest then, which is Python's fault, not ours.
    unset = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED")
    inherited = {k: v for k, v in os.environ.items() if k not in unset}
    process = subprocess.Popen(
        [sys.executable, str(REPO / "cli.py"), *map(str, args)],
        cwd=cwd, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=inherited | {"TERM": term, "OMP_NUM_THREADS": "1"} | env,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    raw, ends = b"", time.monotonic() + timeout
    while time.monotonic() < ends:
        if not select.select([master], [], [], 1)[0]:
            continue
        try:
            part = os.read(master, 65536)
        except OSError:  # how Linux says that nobody holds the other end any more
            break
        if not part:
            break
        raw += part
        if interrupt_at is not None and interrupt_at(raw):
            interrupt_at = None
            process.send_signal(signal.SIGINT)
    else:
        process.kill()
    os.close(master)
    screen = pyte.HistoryScreen(columns, rows, history=100_000, ratio=0.5)
    pyte.ByteStream(screen).feed(raw)
    scrolled = ["".join(line[x].data for x in range(columns)) for line in screen.history.top]
    return Seen(process.wait(), [line.rstrip() for line in (*scrolled, *screen.display)], not screen.cursor.hidden, raw)
