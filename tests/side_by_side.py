"""Runs functions in forked processes that begin at the same moment, as two people on one machine do."""

import contextlib
import io
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from dpo_lightning.cli.entry import main

TIMEOUT = 240  # seconds after which a process counts as hanging


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What each function gives in a process of its own; of one that dies, its exit code (negative: the signal)."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(len(functions))
    pipes = [context.Pipe(duplex=False) for _ in functions]

    def work(function: Callable[[], Any], pipe: Any) -> None:
        for _, end in pipes:
            if end is not pipe:  # else it would stay open when its own process is killed
                end.close()
        try:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in a fork
            start.wait(TIMEOUT)
            pipe.send(function())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # pytest's own exit handlers are not this process's

    processes = [context.Process(target=work, args=(f, p[1])) for f, p in zip(functions, pipes, strict=True)]
    for process in processes:
        process.start()
    for _, end in pipes:
        end.close()
    results = []
    for process, (begin, _) in zip(processes, pipes, strict=True):
        try:
            results.append(begin.recv() if begin.poll(TIMEOUT) else "hangs")
        except EOFError:
            process.join(TIMEOUT)
            results.append(process.exitcode)
        if process.is_alive():
            process.join(10)
            process.kill()
    return results


def command(args: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command and the last line that it printed on stderr."""
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            code = main(list(args))
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    sys.__stderr__.write(printed.getvalue())
    return code, (printed.getvalue().strip().splitlines() or [""])[-1]
