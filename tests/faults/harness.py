"""Runs that are killed and gone on with: what is needed to start them, to kill them at a chosen moment, to compare."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from processes import alive

HERE = Path(__file__).parent
TIMEOUT = 180  # seconds that one attempt may take


class Zygote:
    """The process that runs are forked from (see zygote.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._answer() == "ready"

    def _answer(self) -> Any:
        return json.loads(self.process.stdout.readline())

    def ask(self, **request: Any) -> Any:
        """Sends a request and gives its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        self.process.stdin.close()
        self.process.wait()


class Moment(NamedTuple):
    """When to kill: `delay` seconds after the `count`th time that `phase` was seen to begin."""

    phase: str
    count: int
    delay: float


class Run:
    """A run of the command line in a folder, on one or more ranks, over as many attempts as it takes."""

    def __init__(self, zygote: Zygote, folder: Path, args: Sequence[str], ranks: int = 1) -> None:
        folder.mkdir(parents=True)
        self.zygote, self.folder, self.args, self.ranks = zygote, folder, list(args), ranks
        self.log = folder / "log.txt"
        self.kills: list[str] = []  # the phase of each

    def start(self, *args: str) -> list[int]:
        """Starts an attempt on all ranks, as torchrun does; gives their process ids."""
        self.log.write_text("")
        self.began = time.time()
        pids = []
        port = free_port()
        for rank in range(self.ranks):
            env = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.ranks, "LOCAL_WORLD_SIZE": self.ranks,
                "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "faults",
            } if self.ranks > 1 else {}  # fmt: skip
            log = self.log if rank == 0 else self.folder / f"log{rank}.txt"
            pids.append(
                self.zygote.ask(
                    args=[*self.args, *args],
                    cwd=str(self.folder),
                    log=str(log),
                    env={name: str(value) for name, value in env.items()},
                )
            )
        return pids

    def wait(self, pids: Sequence[int]) -> list[int]:
        """The exit codes."""
        codes = {}
        end = time.monotonic() + TIMEOUT
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes and (code := self.zygote.ask(poll=pid)) is not None:
                    codes[pid] = code
            if time.monotonic() > end:
                kill(pids)
                raise TimeoutError(f"{self.args} still ran after {TIMEOUT} s:\n{self.tail()}")
            time.sleep(0.005)
        return [codes[pid] for pid in pids]

    def attempt(self, moment: Moment | None = None, *args: str) -> list[int]:
        """Goes on with the run, or starts it; kills it at a moment, if it comes to that. Gives the exit codes."""
        pids = self.start("--ckpt_path", "last", *args)
        if moment is not None and (phase := self._reach(moment, pids)):
            kill(pids)
            self.kills.append(phase)
        return self.wait(pids)

    def _reach(self, moment: Moment, pids: Sequence[int]) -> str | None:
        """Waits for the moment; gives the phase that the run was in then, None if the run ended before."""
        seen, inside, began = 0, False, time.monotonic()
        while seen < moment.count:
            now = self.in_phase(moment.phase)
            seen, inside = seen + (now and not inside), now
            if seen < moment.count and self._ended(pids, began):
                return None
            time.sleep(0.0005)
        end = time.monotonic() + moment.delay
        while time.monotonic() < end:
            if self._ended(pids, began):
                return None
            time.sleep(min(0.005, moment.delay))
        return next(phase for phase in PHASES if self.in_phase(phase))

    def _ended(self, pids: Sequence[int], began: float) -> bool:
        return not alive(pids[0]) or time.monotonic() - began > TIMEOUT

    def in_phase(self, phase: str) -> bool:
        """Whether the run is in a phase now, from the files it writes."""
        return PHASES[phase](self)

    def writes(self, pattern: str) -> bool:
        """Whether it is writing such a file; those that earlier attempts left half written do not count."""
        return any(modified(path) > self.began for path in self.folder.glob(f"lightning_logs/*/{pattern}"))

    def tail(self, characters: int = 3000) -> str:
        """The end of what rank 0 has printed."""
        with self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - characters))
            return file.read().decode(errors="replace")

    def last_line(self) -> str:
        """The progress bar that was drawn last."""
        return self.tail(400).replace("\r", "\n").strip().rsplit("\n", 1)[-1]

    def run_folder(self) -> Path:
        """The folder that was written to last: a run that was killed before its first checkpoint began anew."""
        return max((self.folder / "lightning_logs").iterdir(), key=lambda folder: int(folder.name.split("_")[1]))


# From the narrowest to the widest. TQDM's bars are in the log, Rich's are not.
PHASES: dict[str, Callable[[Run], bool]] = {
    "save": lambda run: run.writes("checkpoints/*.partial"),
    "export": lambda run: run.writes("huggingface.*.partial"),
    "reference pass": lambda run: (
        "computed once and kept" in run.tail(2000) and "before training" not in run.tail(9000)
    ),
    "validation": lambda run: "Validation" in run.last_line(),
    "replies": lambda run: any(mark in run.last_line() for mark in "│┃└┏┗┛"),
    "training": lambda run: "Epoch" in run.last_line(),
    "start": lambda run: True,
}


def kill(pids: Sequence[int]) -> None:
    """SIGKILL to the runs and all processes that they have started."""
    for pid in pids:
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def modified(path: Path) -> float:
    """When a file was written to, 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def random_moment(rng: random.Random, more: Sequence[str] = ()) -> Moment:
    """A phase, one of `more` too, and a moment in it or soon after."""
    phase = rng.choice(("start", *2 * ("training", "save", "validation"), "replies", "export", *more))
    longest = {"start": 1.5, "training": 1.0, "save": 0.005}.get(phase, 0.02)
    return Moment(phase, rng.randint(1, 3) if phase in ("save", "validation") else 1, rng.uniform(0, longest))


def differences(run: Path, twin: Path) -> list[str]:
    """What two runs' folders differ in: weights, optimizer, schedule, counters and replies bitwise, curves exactly."""
    one, other = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (run, twin))
    found = [
        part
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")
        if not same(one[part], other[part])
    ]
    reports = [checkpoint["callbacks"]["ReportCallback"]["curves"] for checkpoint in (one, other)]
    for name in sorted(reports[0].keys() | reports[1].keys()):
        if name != "train/pairs_per_second" and not same(*(curves.get(name) for curves in reports)):
            found.append(f"curve {name}: {reports[0].get(name)} {reports[1].get(name)}")
    texts = [(path / "replies.jsonl").read_text() for path in (run, twin)]
    return found + ["replies.jsonl"] * (texts[0] != texts[1])


def same(one: Any, other: Any) -> bool:
    """Bitwise equality of nested values."""
    if torch.is_tensor(one):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other
