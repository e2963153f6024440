"""What the console leaves out unless `--verbose` is given: messages of libraries that nobody can act on.

Only the texts listed here are hidden. All else stays: warnings about settings, the user's own code, checkpoints and
memory, what a callback of the user's own logs, and whatever a new version of a library has to say.
"""

import logging
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_lightning.visible import visible

MESSAGES = (  # of Lightning's log, by how they begin
    *("GPU available: ", "TPU available: ", "Using .* Automatic Mixed Precision"),  # our line `precision` has both
    *("Initializing distributed: ", "-+\ndistributed_backend=", "LOCAL_RANK: "),  # as well
    "You are using a CUDA device .* Tensor Cores",  # asks for a call in Python that no setting makes
    "Seed set to ",  # config.yaml has it
    r"`Trainer\(\w+=1\.0\)` was configured",  # the default; 1, which means a single batch, is not hidden
    "`Trainer.fit` stopped: `max_(steps|epochs)=",  # the bar is full
    "Restoring states from the checkpoint",  # that they are restored is a line of its own
    *("Loading `train_dataloader`", "`weights_only` was not set"),  # what Lightning does internally
    "💡",  # advertisements
)
WARNINGS = (  # of libraries about themselves, as regular expressions
    ".*LeafSpec.*",  # of a call in Lightning
    ".*does not have many workers.*",  # batches are token ids already: a loader has next to nothing to do
    *("Checkpoint directory .* exists and is not empty", "The dirpath has changed"),  # as in every resumed run
    "Precision .* is not supported by the model summary",  # so its size in MB is wrong, which nobody asks for
    *("`is_gradient_checkpointing` is deprecated", "torch.distributed.nn.functional.* is deprecated"),  # in their code
    "Couldn't infer the batch indices",  # predictions have their own
    # A run shorter than a validation. In a longer one a misspelt name is an error.
    r"`ModelCheckpoint\(monitor='val/.*could not find the monitored key",
)
OF_NO_USE = re.compile(rf"(\[rank: \d+\] )?({'|'.join(MESSAGES)})")
BY = r"(lightning|peft|torch|torchmetrics|transformers)\."  # the same warning about the user's own code is not hidden
LIBRARIES = (str(Path(__file__).parents[1]), *map(sysconfig.get_path, ("purelib", "platlib", "stdlib")))
SECONDS_BEFORE_BARS = 2.0  # of transformers, for loading and writing weights


def keep_quiet() -> None:
    """Hides warnings of no use, before libraries are imported.

    Of transformers only errors are left. Its warnings are about generation settings and unused weights; weights that
    are missing or misshapen are errors of ours (`models.policy`).
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    threading.excepthook = thread_error  # TensorBoard's writer
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=BY)


def keep_imported_quiet() -> None:
    """Hides log messages and short-lived bars of the libraries that have been imported, and shortens warnings."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:  # a filter of a logger does not see those of its children
            handler.addFilter(is_of_use)
            handler.setFormatter(Wrapping())
    warnings.formatwarning = warning_line
    if "transformers" in sys.modules:
        from transformers.utils.logging import set_tqdm_hook

        set_tqdm_hook(late_bar)


def thread_error(error: threading.ExceptHookArgs) -> None:
    """Reports that a thread ended with an error. Of the system's, such as a full disk, one line says all."""
    if isinstance(error.exc_value, OSError):
        print(visible(f"warning: a thread of this run ended: {error.exc_value}"), file=sys.stderr)
    else:
        threading.__excepthook__(error)


class Wrapping(logging.Formatter):
    """Log messages that a terminal breaks between words."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, `wrapped`."""
        return wrapped(super().format(record))


def wrapped(text: str) -> str:
    """Text whose lines fit the terminal, unless a single word does not; unchanged where stderr is none."""
    if not sys.stderr.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    fitting = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
    return "\n".join(fitting.fill(line) if len(line) > columns else line for line in text.split("\n"))


def is_of_use(record: logging.LogRecord) -> bool:
    """Whether a log message stays on the console."""
    return record.levelno > logging.INFO or not OF_NO_USE.match(record.getMessage())


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning on its own, with the line of code that it comes from only where that is the user's own."""
    of_a_library = filename.startswith(LIBRARIES) or "site-packages" in filename
    where = "" if of_a_library else f"{filename}:{lineno}: "
    return wrapped(f"warning: {where}{message}\n")


def late_bar(bar: Callable[..., Any], args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """A progress bar that is drawn only if it takes a while."""
    return bar(*args, **{"delay": SECONDS_BEFORE_BARS} | settings)
