"""The command `chat`: asks the reference and the policy questions, and streams their replies side by side.

A question becomes a prompt as in training (`dpo_lightning.data.prompt_format`). Replies go to stdout and everything
else to stderr, so that a pipe gets only replies.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, TextIO

from dpo_lightning.cli.chat_prompts import load_asked, note
from dpo_lightning.data.cells import MAX_CELL
from dpo_lightning.parsing import AtLeast1, check_settings, run_function
from dpo_lightning.visible import visible

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Type a question and press Enter.
/schema CREATE TABLE ...  the schema for the next questions; without a text, none
/help                     this text
exit, quit, Ctrl-D        end; Ctrl-C stops a reply, or ends if there is none"""
ENDS = ("exit", "quit", "/exit", "/quit")
Stream = Callable[[str], Iterator[str]]  # prompt -> pieces of the reply


def chat(
    model: str,
    reference: str | None = None,
    schema: str = "",
    prompt_template: str | None = None,
    max_new_tokens: AtLeast1 = 64,
    trust_remote_code: bool = False,
) -> None:
    """Answers questions from the keyboard or a pipe, one a line.

    Args:
        model: folder of a run, folder that `fit` or `export` wrote, or a hub id.
        reference: model to compare with; by default the base model of an adapter, else none.
        schema: the {context} of the questions; `/schema TEXT` changes it.
        prompt_template: the prompt, from {context} and {question}; by default that of the model's training or, if its
            folder does not have it, the tokenizer's chat template, else the default of training.
        max_new_tokens: length limit of a reply.
        trust_remote_code: run a hub model's own Python code.
    """
    check_settings(chat, locals(), "--")
    speakers, prompt_format = load_asked(model, reference, prompt_template, trust_remote_code)
    tokenizer = speakers[-1].tokenizer
    replies: dict[str, Stream] = {
        s.name: partial(s.answer, max_new_tokens=max_new_tokens, chat=prompt_format.chat) for s in speakers
    }
    converse(replies, lambda question, schema: prompt_format.prompt(question, schema, tokenizer), schema, sys.stdin)


def run_chat(args: Sequence[str]) -> None:
    """Runs `chat` with its arguments, the command's name first."""
    run_function(chat, args)


def converse(replies: dict[str, Stream], render: Callable[[str, str], str], schema: str, lines: TextIO) -> None:
    """Reads questions and shows every model's reply to each.

    At a keyboard, Ctrl-C stops a reply, or ends the conversation if there is none; with a pipe it always ends it.

    Args:
        replies: the models' functions by name, in the order of the columns.
        render: (question, schema) -> prompt.
        lines: the keyboard or a pipe.
    """
    typed = lines.isatty()
    _prepare(lines, typed)
    if typed:
        print(HELP)
    for line in _lines(lines, typed):
        command, _, rest = line.strip().partition(" ")
        if command in ENDS and not rest:
            return
        if not command:
            continue
        if command == "/schema":
            schema = rest.strip()
        elif command == "/help":
            print(HELP)
        elif line.startswith("/"):
            note(f"{command} is not a command: /help lists them")
        else:
            with suppress(KeyboardInterrupt) if typed else nullcontext():
                prompt = render(line, schema)
                show({name: reply(prompt) for name, reply in replies.items()}, stoppable=typed)


def _prepare(lines: TextIO, typed: bool) -> None:
    """Line editing and history for a keyboard; invalid UTF-8 becomes surrogates instead of an error."""
    if typed:
        with suppress(ImportError):  # not on Windows, whose console has both
            import readline  # noqa: F401  # input() uses it from now on
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="surrogateescape", **({} if typed else {"encoding": "utf-8-sig"}))


def _lines(lines: TextIO, typed: bool) -> Iterator[str]:
    """The lines without their ends; with a note each, too long ones are skipped and invalid bytes replaced."""
    number = 0
    while line := _next_line(lines, typed):
        number += 1
        if len(line) > MAX_CELL:
            note(f"line {number} has more than {MAX_CELL:,} characters and is skipped")
            while line and not line.endswith("\n"):
                line = lines.readline(MAX_CELL)
            continue
        valid = "".join("\N{REPLACEMENT CHARACTER}" if "\ud800" <= c <= "\udfff" else c for c in line)
        if valid != line:
            note(f"line {number} has bytes that are not UTF-8: each is replaced by \N{REPLACEMENT CHARACTER}")
        yield valid.rstrip("\r\n")


def _next_line(lines: TextIO, typed: bool) -> str:
    """The next line with its newline; "" at the end."""
    if not typed:
        return lines.readline(MAX_CELL + 1)
    try:
        return input("> ") + "\n"
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def show(replies: dict[str, Iterator[str]], stoppable: bool = False) -> None:
    """Prints replies as they are generated: side by side on a terminal, else one after the other.

    Args:
        stoppable: whether Ctrl-C stops the current reply only, so that the next one follows.
    """
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        _show_columns(replies, stoppable, console)
        return
    for name, pieces in replies.items():
        print(f"{name}: ", end="", flush=True)
        _each(pieces, lambda piece: print(piece, end="", flush=True), stoppable)
        print()


def _each(pieces: Iterator[str], add: Callable[[str], None], stoppable: bool) -> None:
    """Adds the pieces of a reply as visible text, up to its end or to Ctrl-C if it is stoppable."""
    try:
        for piece in pieces:
            add(visible(piece))
    except KeyboardInterrupt:
        if not stoppable:
            raise
        add(" [stopped]")
    finally:
        if hasattr(pieces, "close"):
            pieces.close()


def _show_columns(replies: dict[str, Iterator[str]], stoppable: bool, console: "Console") -> None:
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

    with Live(table(), console=console, refresh_per_second=10) as live:
        for name, pieces in replies.items():

            def add(piece: str, text: Text = texts[name]) -> None:
                text.append(piece)
                live.update(table())

            _each(pieces, add, stoppable)
