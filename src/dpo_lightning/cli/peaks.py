"""The peaks of a run's memory for micro-batches of several sizes, measured by `probe` in a process of its own."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dpo_lightning.cli.entry import LIFELINE, USER_ERROR_EXIT
from dpo_lightning.errors import UserError
from dpo_lightning.models.hardware import available_memory
from dpo_lightning.models.hub import local_path
from dpo_lightning.storage.jsonl import read_lines

OF_THE_MACHINE = 0.95  # of the free memory: a probe ends before it takes more
Config = dict[str, Any]  # the sections of a `fit`, as plain YAML


class Point(NamedTuple):
    """The peak up to and with micro-batches of one size."""

    parts: int  # micro-batches that a batch of the configuration is cut into
    pairs: int
    tokens: int
    bytes: int


class Probe(NamedTuple):
    """What `probe` measured."""

    facts: dict[str, Any]  # of the model
    points: list[Point]
    timed: list[dict[str, Any]]  # batches as they come: seconds, tokens, and whether the optimizer stepped
    peak: int | None  # of all of the run, with its last checkpoint; None if it had to be ended
    replies: float = 0.0  # seconds of answering the held-out prompts once

    def best(self, limit: int) -> Point | None:
        """The largest size that stays below a limit."""
        return next((point for point in reversed(self.points) if point.bytes <= limit), None)


def expected(points: Sequence[Point], tokens: int) -> float:
    """The peak for micro-batches of so many tokens: a + b tokens through the two largest sizes that were measured."""
    last = points[-1]
    before = next((point for point in reversed(points[:-1]) if point.tokens < last.tokens), None)
    slope = 0.0 if before is None else max(0, last.bytes - before.bytes) / (last.tokens - before.tokens)
    return last.bytes + slope * (tokens - last.tokens)


def measured(config: Config, limit: float, parts: int = 1, timed: int = 0) -> Probe:
    """Runs `probe` on a configuration.

    Args:
        limit: bytes that a run may use.
        parts: micro-batches that a batch is at least cut into.
        timed: batches to time.

    Raises:
        UserError: the run cannot be started; the error is that of the run.
    """
    root = local_path(config["trainer"].get("default_root_dir") or ".").absolute()
    root = next(path for path in (root, *root.parents) if path.is_dir())
    free = available_memory(config["trainer"].get("accelerator") or "auto")
    ceiling = max(limit, OF_THE_MACHINE * free) if free else limit
    # Beside the run, as there is room for its checkpoints: a folder for temporary files may be in memory itself.
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=root) as folder:
        settings, result, log = (Path(folder) / name for name in ("config.yaml", "result.jsonl", "log"))
        settings.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        options = {"config": settings, "limit": int(limit), "ceiling": int(ceiling), "parts": parts, "result": result}
        options |= {"folder": folder, "timed": timed}
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        with (
            log.open("wb") as output,
            subprocess.Popen(
                [sys.executable, "-m", "dpo_lightning", "probe", *flags],
                stdin=subprocess.PIPE,  # nothing is written to it: it ends when this process does
                stdout=output,
                stderr=output,
                env=os.environ | {LIFELINE: "1"},
            ) as process,
        ):
            try:
                code = process.wait()
            except BaseException:  # Ctrl-C
                process.kill()
                raise
        _check_ended(code, log.read_text(encoding="utf-8", errors="replace"))
        return _read(read_lines(result).objects)


def _check_ended(code: int, log: str) -> None:
    lines = [line for line in log.splitlines() if line.strip()]
    if code == USER_ERROR_EXIT:
        error = next(line for line in reversed(lines) if line.startswith("error: ")).removeprefix("error: ")
        raise UserError(re.sub(r"^.*\.probe-[^,]*, line \d+: ", "", error))  # the line of a file that is gone
    if code > 0:
        raise UserError(f"the steps to measure memory failed: {lines[-1] if lines else 'no reason was given'}")


def _read(lines: Sequence[Mapping[str, Any]]) -> Probe:
    def of(kind: str) -> list[Any]:
        return [line[kind] for line in lines if kind in line]

    return Probe(
        (of("facts") or [{}])[0],
        [Point(*p) for p in of("point")],
        of("timed"),
        (of("peak") or [None])[0],
        (of("replies") or [0.0])[0],
    )
