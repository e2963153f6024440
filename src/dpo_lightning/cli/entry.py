"""The entry point of the command line: finds the command, and turns errors into one line and an exit code.

A user's mistake ends with one line on stderr and exit code 2; `--debug` shows the traceback instead. Nothing heavy is
imported before the command is known, so that `--help` and typos are answered at once.
"""

import difflib
import errno
import gc
import importlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from dpo_lightning.cli.console import keep_imported_quiet, keep_quiet, wrapped
from dpo_lightning.errors import Stopped, UserError
from dpo_lightning.visible import one_line, show_only_visible, visible

USER_ERROR_EXIT = 2
INTERRUPTED_EXIT = 130  # as shells report SIGINT
TERMINATED_EXIT = 143  # as shells report SIGTERM
BROKEN_PIPE_EXIT = 141  # as shells report SIGPIPE
LIFELINE = (
    "DPO_LIGHTNING_LIFELINE"  # in the environment of a process that `rounds` starts: its stdin ends with `rounds`
)
USERS_ERRORS = {  # of the system, that the user can correct
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),  # no space
    *(errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.EACCES, errno.EPERM),  # wrong path
}

began = time.perf_counter()  # that clock's reading when the command began, before its imports
verbose = False  # whether libraries may say all they have to say


class Command(NamedTuple):
    """A command and the function that runs it with the arguments, the command's name first."""

    help: str
    module: str = "dpo_lightning.cli.trainer"
    function: str = "run_trainer"


COMMANDS = {
    "demo": Command("see it work: train a tiny model on rows that ship with it", "dpo_lightning.cli.demo", "run_demo"),
    "start": Command(
        "train on your rows with settings that are chosen for them, then ask", "dpo_lightning.cli.start", "run_start"
    ),
    "configs": Command("list the shipped configurations, or copy one", "dpo_lightning.cli.configs", "run_configs"),
    "fit": Command("train, showing replies before, during and after"),
    "validate": Command("reward metrics and judged replies on the validation pairs"),
    "test": Command("the same on the test pairs"),
    "predict": Command("write replies to prompts to a file"),
    "find": Command("try learning rates and betas in short runs", "dpo_lightning.cli.find", "run_find"),
    "inspect": Command("what will be trained on, and for how long", "dpo_lightning.cli.inspect", "run_inspect"),
    "download": Command(
        "fetch what a configuration names, for use without a network", "dpo_lightning.cli.download", "run_download"
    ),
    "export": Command(
        "write a checkpoint's model as a Hugging Face folder or GGUF", "dpo_lightning.cli.export", "run_export"
    ),
    "rounds": Command("train on the model's own verified mistakes", "dpo_lightning.cli.rounds", "run_rounds"),
    "sample": Command("a stage of rounds: sample and judge replies", "dpo_lightning.cli.sample", "run_sample"),
    "probe": Command("a stage of --memory: try a few steps", "dpo_lightning.cli.probe", "run_probe"),
    "report": Command("several runs side by side on one page", "dpo_lightning.cli.report", "run_report"),
    "chat": Command("ask a trained model, beside its reference", "dpo_lightning.cli.chat", "run_chat"),
    "label": Command("choose the better of two replies, in a browser", "dpo_lightning.cli.label", "run_label"),
    "compare": Command(
        "which of two models is better, blind or by a judge", "dpo_lightning.cli.compare", "run_compare"
    ),
    "runs": Command("a page of all runs, with live curves", "dpo_lightning.cli.runs", "run_runs"),
}


def usage() -> str:
    """The text of `--help` without a command."""
    commands = "\n".join(f"  {name:12}{command.help}" for name, command in COMMANDS.items())
    return f"""usage: {program()} COMMAND --config NAME_OR_FILE [--config OVERLAY ...] [--KEY VALUE ...]

Direct Preference Optimization of causal language models.

{commands}

`help COMMAND` lists a command's settings; `--verbose` shows all that the libraries say, `--debug` where an error
comes from."""


def run(args: Sequence[str]) -> None:
    """Runs the command that the first argument names.

    Raises:
        UserError: there is no such command, or the user can correct the reason of its failure.
    """
    name = args[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command '{name}': {hint}")
    command = COMMANDS[name]
    gc.disable()  # looking for garbage during the imports would take a sixth of their time
    try:
        module = importlib.import_module(command.module)
    finally:
        gc.enable()
    if not verbose:
        keep_imported_quiet()
    show_only_visible()
    try:
        getattr(module, command.function)(args)
    finally:
        leave_process_group()


def leave_process_group() -> None:
    """Ends gloo's threads, which could otherwise abort a process that is about to end.

    A thread may be the last to hold the tensor of a broadcast, and frees it with Python's lock. Where it gets there
    when Python is already being finalized, C++ terminates the process. Groups of NCCL are ended by Lightning.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    global began, verbose
    began = time.perf_counter()
    args = list(sys.argv[1:] if args is None else args)
    debug, verbose = "--debug" in args, "--verbose" in args
    args = [arg for arg in args if arg not in ("--debug", "--verbose")]
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]  # `help fit` is `fit --help`
    try:
        if not args or args[0] in ("-h", "--help"):
            print(usage())
        else:
            show_only_visible()
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or tokenizers warn in every loader worker
            if not verbose:
                keep_quiet()
            if LIFELINE in os.environ:
                threading.Thread(target=end_with_the_parent, daemon=True).start()
            run(args)
        sys.stdout.flush()
    except UserError as error:
        if debug:
            raise
        print(wrapped(f"error: {visible(' '.join(str(error).split()))}"), file=sys.stderr)
        return USER_ERROR_EXIT
    except Stopped as stop:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return 0  # or Lightning would kill the first process, which started this one
        print(visible(stopped(args, stop)), file=sys.stderr)
        return 128 + stop.signal
    except (KeyboardInterrupt, SystemExit) as end:
        if type(end).__name__ == "SIGTERMException":  # Lightning's, outside of training steps; it would exit with 0
            print("ended by SIGTERM", file=sys.stderr)
            return TERMINATED_EXIT
        # Lightning turns Ctrl-C before the first step into a SystemExit.
        if not isinstance(end, KeyboardInterrupt) and not isinstance(end.__context__, KeyboardInterrupt):
            raise
        print("interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report it at exit
        return BROKEN_PIPE_EXIT
    except OSError as error:
        if debug or error.errno not in USERS_ERRORS:
            raise
        name = one_line(str(error.filename or "a file of the run"))
        print(wrapped(f"error: {name} cannot be used: {error.strerror}"), file=sys.stderr)
        return USER_ERROR_EXIT
    return 0 if args else USER_ERROR_EXIT


def stopped(args: Sequence[str], stop: Stopped) -> str:
    """The message about a stopped run, with the command that resumes it."""
    kept = [arg for arg, before in zip(args, ["", *args], strict=False) if "--ckpt_path" not in (before, arg)]
    kept = [arg for arg in kept if not arg.startswith("--ckpt_path=")]
    done = "stopped at once" if stop.step is None else f"stopped after step {stop.step}, which is saved"
    if LIFELINE in os.environ:
        return done  # the command `rounds` says how to resume
    again = f"{program()} {shlex.join(kept)}"
    return (
        f"to resume:\n    {again}"
        if args[0] in ("rounds", "start")
        else f"{done}; to resume:\n    {again} --ckpt_path last"
    )


def program() -> str:
    """How this program was started, for commands that the user can repeat."""
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return "python -m dpo_lightning"
    return "python cli.py" if sys.argv[0].endswith(".py") else "dpo-lightning"


def end_with_the_parent() -> None:
    """Stops this process as SIGTERM does when the process that started it is gone, also by SIGKILL."""
    os.read(0, 1)  # not by sys.stdin, whose lock this thread would hold at the end
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
