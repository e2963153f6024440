"""Starts runs of the command line in a moment: everything is imported once, then each run is a fork of this process.

A line of JSON on stdin, {"args": [...], "cwd": ..., "log": ..., "env": {...}}, forks a process that does what
`python cli.py ARGS` does, in a session of its own; the answer is its process id. {"poll": PID} answers with the exit
code (negative: the signal), or null while it runs.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def start(args: list[str], cwd: str, log: str, env: dict[str, str]) -> int:
    """Forks a run and gives its process id."""
    if pid := os.fork():
        return pid
    os.setsid()
    os.chdir(cwd)
    os.environ.update(env)
    datasets.config.HF_DATASETS_CACHE = Path(cwd, "cache")  # read when datasets was imported; each run needs its own
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, output, output)):
        os.dup2(descriptor, number)
    sys.argv = [str(Path(__file__).parents[2] / "cli.py"), *args]
    code = 1
    try:
        code = main(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def forked_stage(command: str, config: str, *more: str) -> None:
    """A stage of `rounds`, in the session of the command: it is killed with it."""
    if not (pid := os.fork()):
        os._exit(main([command, "--config", config, *more]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise SystemExit(code)


def poll(pid: int) -> int | None:
    """The exit code of a run, None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def serve() -> None:
    """Answers until stdin ends."""
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        print(json.dumps(poll(request["poll"]) if "poll" in request else start(**request)), flush=True)


if __name__ == "__main__":
    import datasets.config
    import peft  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    from dpo_lightning.cli import rounds
    from dpo_lightning.cli.entry import main

    rounds.run_stage = forked_stage
    torch.set_num_threads(1)
    print(json.dumps("ready"), flush=True)
    serve()
