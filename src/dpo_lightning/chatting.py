"""`chat`: questions from the keyboard or a pipe -> replies of reference and policy, side by side, as they come."""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple, TextIO

import torch
from torch import Tensor

from dpo_lightning.encoding import load_tokenizer
from dpo_lightning.errors import UserError
from dpo_lightning.policy import load_policy, tokenizer_name
from dpo_lightning.reply_views import visible
from dpo_lightning.rows import RowOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELP = "A question and Enter; /schema CREATE TABLE ... keeps a schema for what follows; Ctrl-D ends."
Stream = Callable[[str], Iterator[str]]  # prompt -> pieces of the reply


class Speaker(NamedTuple):
    """A model that answers, as `switch` leaves it."""

    name: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    switch: Callable[[], AbstractContextManager] = nullcontext

    def answer(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        """The pieces of a greedy reply."""
        with self.switch():
            yield from stream(self.model, self.tokenizer, prompt, max_new_tokens)


def chat(
    model: str,
    reference: str | None = None,
    schema: str = "",
    prompt_template: str | None = None,
    max_new_tokens: int = 64,
    trust_remote_code: bool = False,
) -> None:
    """Answers questions from the keyboard or a pipe, one a line.

    Args:
        model: folder that `fit` or `export` wrote, or a hub id.
        reference: model to compare with; left out, of an adapter its base model, else none.
        schema: the {context} of the questions; `/schema TEXT` changes it.
        prompt_template: the prompt, from {context} and {question}; left out, the tokenizer's chat template, or the one
            that training uses by default.
        max_new_tokens: longest reply.
        trust_remote_code: run a hub model's own Python code.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {max_new_tokens}: it must be at least 1")
    speakers = load_speakers(model, reference, trust_remote_code)
    tokenizer = speakers[-1].tokenizer

    def render(question: str, schema: str) -> str:
        if prompt_template is None and tokenizer.chat_template:
            messages = [{"role": "user", "content": f"{schema}\n{question}" if schema else question}]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        template = prompt_template or RowOptions().prompt_template
        return template.format(context=schema, question=question)

    replies = {speaker.name: lambda prompt, s=speaker: s.answer(prompt, max_new_tokens) for speaker in speakers}
    converse(replies, render, schema, sys.stdin)


def run_chat(args: Sequence[str]) -> None:
    """`chat` with its arguments, the command's name first."""
    from jsonargparse import auto_cli

    from dpo_lightning.commands import OneLineErrorParser

    auto_cli(chat, args=list(args[1:]), parser_class=OneLineErrorParser, as_positional=False)


def load_speakers(model: str, reference: str | None, trust_remote_code: bool) -> list[Speaker]:
    """The reference, if there is one, and the policy.

    Raises:
        UserError: one of them cannot be loaded.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"

    def load(name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
        policy = load_policy(name, dtype=dtype, trust_remote_code=trust_remote_code).eval().to(device)
        return policy, load_tokenizer(tokenizer_name(name), trust_remote_code)

    policy, tokenizer = load(model)
    speakers = [Speaker("policy", policy, tokenizer)]
    if reference is not None:
        speakers.insert(0, Speaker("reference", *load(reference)))
    elif hasattr(policy, "disable_adapter"):
        speakers.insert(0, Speaker("reference", policy, tokenizer, policy.disable_adapter))
    return speakers


def stream(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompt: str, max_new_tokens: int
) -> Iterator[str]:
    """The pieces of a greedy reply as they are generated; who stops listening stops the generation."""
    from transformers import GenerationConfig, StoppingCriteriaList, TextIteratorStreamer

    eos = tokenizer.eos_token_id
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    room = max(1, limit - max_new_tokens)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][:, -room:].to(model.device)
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, errors = threading.Event(), []

    def stop(input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        return torch.full((len(input_ids),), stopped.is_set(), device=input_ids.device)

    def generate() -> None:
        try:
            with torch.inference_mode():
                model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=GenerationConfig(
                        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=eos
                    ),
                    stopping_criteria=StoppingCriteriaList([stop]),
                    streamer=pieces,
                )
        except Exception as error:  # raised again where the pieces are read
            errors.append(error)
            pieces.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from pieces
    finally:
        stopped.set()
        thread.join()
    if errors:
        raise errors[0]


def converse(replies: dict[str, Stream], render: Callable[[str, str], str], schema: str, lines: TextIO) -> None:
    """Reads lines until their end and shows every model's reply to each.

    Args:
        replies: who answers, in the order of the columns.
        render: question and schema -> prompt.
        lines: what is typed or piped in.
    """
    typed = lines.isatty()
    if typed:
        print(HELP)
    while line := _next_line(lines, typed):
        line = line.strip()
        if line.startswith("/schema"):
            schema = line.removeprefix("/schema").strip()
        elif line:
            prompt = render(line, schema)
            show({name: reply(prompt) for name, reply in replies.items()})


def _next_line(lines: TextIO, typed: bool) -> str:
    """The next line with its newline, "" at the end."""
    if not typed:
        return lines.readline()
    try:
        return input("> ") + "\n"  # input() has line editing and history
    except EOFError:
        print()
        return ""


def show(replies: dict[str, Iterator[str]]) -> None:
    """Prints replies while they come: side by side on a terminal, else one after the other."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        _show_columns(replies)
        return
    for name, pieces in replies.items():
        print(f"{name}: ", end="", flush=True)
        for piece in pieces:
            print(visible(piece), end="", flush=True)
        print()


def _show_columns(replies: dict[str, Iterator[str]]) -> None:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = {name: Text() for name in replies}  # Text, not markup: a reply must not be able to style or link itself

    def table() -> Table:
        columns = Table(expand=True)
        for name in texts:
            columns.add_column(name, overflow="fold", ratio=1)
        columns.add_row(*texts.values())
        return columns

    with Live(table(), refresh_per_second=10) as live:
        for name, pieces in replies.items():
            for piece in pieces:
                texts[name].append(visible(piece))
                live.update(table())
