"""Sampling by vLLM (Kwon et al. 2023, https://arxiv.org/abs/2309.06180), where its command is installed.

vLLM pins versions of torch and transformers that are not ours, so it is called as a command, which may be that of
another environment. It serves the model on a Unix socket in a folder that only this user can open.
"""

import contextlib
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.errors import UserError
from dpo_lightning.models.reply import Reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ERROR = re.compile(r"\b\w+Error: .*")
START_SECONDS = 3600  # to load and compile the model
# Ends the server, a group of processes of its own, when this process has gone, however it ended.
WATCHED = """
import os, signal, subprocess, sys, threading
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
def end():
    os.read(0, 1)
    os.killpg(server.pid, signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
sys.exit(server.wait())
"""
# Of the processes of a run; the server is a run of its own.
LAUNCHERS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def installed(command: str) -> list[str]:
    """The path of vLLM's command, and the options after it.

    Raises:
        UserError: it is not installed, or a quotation mark is left open.
    """
    try:
        program, *options = shlex.split(command) or [""]
    except ValueError as error:
        raise UserError(f"rounds.vllm: {command!r} cannot be read: {error}") from error
    if (found := shutil.which(os.path.expanduser(program))) is None:
        raise UserError(
            f"rounds.vllm: there is no command '{program}': install vLLM, in an environment of its own if it does not "
            "go together with this one, and give the path of its command"
        )
    return [found, *options]


class Sampling(NamedTuple):
    """How replies are sampled; the same names and meanings as in `data.generated.Generation`."""

    temperature: float
    top_p: float
    max_new_tokens: int
    samples: int  # to each prompt


class Server:
    """`vllm serve` with a model, as a context: the process runs inside of it.

    Args:
        command: `rounds.vllm`: the command, and more options of `vllm serve`.
        model: a folder or hub id of a complete model.
        dtype: of weights and arithmetic: float32, bfloat16 or float16.
        max_length: tokens of a prompt and reply together.
        log: file for what vLLM prints.
        gpu: index of the GPU among those that this process sees; None where there is none.
        trust_remote_code: runs the model's own code.
    """

    def __init__(
        self,
        command: str,
        model: str,
        *,
        dtype: str,
        max_length: int,
        log: Path,
        gpu: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        program, *options = installed(command)
        self._folder = tempfile.mkdtemp(prefix="vllm-")
        self._socket = str(Path(self._folder) / "socket")
        self._log = log
        self._command = [
            *(program, "serve", model, "--served-model-name", "policy", "--uds", self._socket),
            *("--dtype", dtype, "--max-model-len", str(max_length), "--generation-config", "vllm"),
            # On a CPU a request with a seed fails if its prompt is read in parts (vLLM 0.32).
            *(["--no-enable-chunked-prefill"] if gpu is None else []),
            *(["--trust-remote-code"] if trust_remote_code else []),
            *options,
        ]
        self._environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        if gpu is not None:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES")
            self._environment["CUDA_VISIBLE_DEVICES"] = seen.split(",")[gpu] if seen else str(gpu)
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "Server":
        """Starts the server, and waits until it answers."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-c", WATCHED, *self._command],
                    stdin=subprocess.PIPE,  # nothing is written to it
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is for this process, which then ends the server
                    env=self._environment,
                )
            limit = time.monotonic() + START_SECONDS
            while not self._answers():
                if self._process.poll() is not None or time.monotonic() > limit:
                    raise self._failed("did not start")
                time.sleep(0.2)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends the server."""
        self._end()

    def replies(
        self, prompt: list[int], tokenizer: "PreTrainedTokenizerBase", seed: int, sampling: Sampling
    ) -> list[tuple[Reply, float]]:
        """Sampled replies to a prompt, each with its log-prob in nats at temperature 1, with its EOS if it has one.

        Threads may call it at the same time.

        Args:
            prompt: token ids.
            tokenizer: that of training, whose EOS ends a reply.

        Raises:
            UserError: the server has ended, or does not take the request.
        """
        request = {
            "model": "policy",
            "prompt": prompt,
            "n": sampling.samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed % 2**63,
            "logprobs": 0,  # of the sampled tokens alone
            "return_token_ids": True,
            "skip_special_tokens": False,
            "ignore_eos": True,  # the model's own, which may be others than that of training
            "stop_token_ids": [tokenizer.eos_token_id],
        }
        try:
            status, body = self._call("POST", "/v1/completions", json.dumps(request).encode())
        except (OSError, http.client.HTTPException) as error:
            raise self._failed("has ended") from error
        if status != http.client.OK:
            said = " ".join(body.decode(errors="replace").split())
            raise self._failed(f"does not answer ({status} {said[:200]})")
        choices = sorted(json.loads(body)["choices"], key=lambda choice: choice["index"])
        return [_reply(choice, tokenizer) for choice in choices]

    def _answers(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._call("GET", "/health")[0] == http.client.OK
        return False

    def _call(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = _Connection(self._socket)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _failed(self, what: str) -> UserError:
        printed = self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""
        causes = [error for error in ERROR.findall(printed) if "root cause" not in error]  # which is another line's
        last = [line.strip() for line in printed.splitlines() if line.strip()]
        reason = (causes or last or ["it printed nothing"])[-1]
        return UserError(f"rounds.vllm: vLLM {what}: {reason[:300]} (all that it printed is in {self._log})")

    def _end(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()  # on which the server is killed
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """Connects to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)


def _reply(choice: dict[str, Any], tokenizer: "PreTrainedTokenizerBase") -> tuple[Reply, float]:
    """One of the server's replies, in the form of `models.generate.generate`."""
    ids, eos = choice["token_ids"], tokenizer.eos_token_id
    stopped = eos in ids
    ids = ids[: ids.index(eos)] if stopped else ids
    logps = choice["logprobs"]["token_logprobs"]
    return Reply(tokenizer.decode(ids, skip_special_tokens=False), ids, stopped), sum(logps)
