"""A stage of `rounds`: a process of this command line, which signals reach and which does not outlive its parent."""

import os
import signal
import subprocess
import sys
from types import FrameType

from dpo_lightning.cli.entry import LIFELINE
from dpo_lightning.errors import Stopped, UserError

FORWARDED = [signal.SIGINT, signal.SIGTERM]


def run_stage(command: str, config: str, *more: str) -> None:
    """Runs a command to its end, in a process of its own.

    Raises:
        Stopped: a signal stopped it.
        SystemExit: it failed, and has said why.
        UserError: it was killed.
    """
    received: list[int] = []
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_lightning", command, "--config", config, *more],
        stdin=subprocess.PIPE,  # nothing is written to it: it ends when this process does
        env=os.environ | {LIFELINE: "1"},
        start_new_session=True,  # or a terminal's Ctrl-C would reach it twice
    )

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        raise Stopped(received[0])
    if code < 0:
        raise UserError(f"`{command} --config {config}` was killed by {signal.Signals(-code).name}: start it again")
    if code:
        raise SystemExit(code)
