"""The command `label`: a local page in the browser, on which people say which of two replies is better."""

import importlib.util
from collections.abc import Sequence

from dpo_lightning.cli.chat_prompts import load_asked, note
from dpo_lightning.errors import UserError
from dpo_lightning.page.guard import LOOPBACK
from dpo_lightning.parsing import AtLeast1, check_settings, run_function

REFERENCE = "reference"  # as --model_b: the base model of an adapter


def label(
    model: str,
    model_b: str | None = None,
    prompt_template: str | None = None,
    host: str = "127.0.0.1",
    port: AtLeast1 = 7865,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serves a page on which to label, compare and chat.

    Args:
        model: folder of a run, folder that `fit` or `export` wrote, or a hub id.
        model_b: another model to compare with; `reference` for the base model of an adapter.
        prompt_template: the prompt, from {context} and {question}; by default that of the model's training.
        host: address to serve the page at; any but this machine's own needs a token.
        port: of the page.
        token: a secret in the page's address, without which nothing is served.
        trust_remote_code: run a hub model's own Python code.
    """
    check_settings(label, locals(), "--")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"label needs the package {package}, which is not installed: pip install starlette uvicorn")
    check_token(host, token)
    from dpo_lightning.page.server import allowed_hosts, listen, page, serve
    from dpo_lightning.page.view import View
    from dpo_lightning.page.work import Work

    listening = listen(host, port)
    other = None if model_b == REFERENCE else model_b
    speakers, prompt_format = load_asked(model, other, prompt_template, trust_remote_code, ("--model", "--model_b"))
    work = Work()
    views: list[View] = []  # made from speakers, prompt_format and work
    note(f"http://{host}:{port}/")
    try:
        serve(page(views, allowed_hosts(host), token), listening)
    finally:
        work.end()


def check_token(host: str, token: str | None) -> None:
    """Raises UserError for a host that needs a token and has none, and for a token that is short or no cookie."""
    if token is None and host not in LOOPBACK:
        raise UserError(f"--host {host}: other machines could use the page, so it needs --token, a secret of yours")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.replace("-", "a").isalnum()):
        raise UserError("--token must have at least 16 characters, which are letters, digits and -")


def run_label(args: Sequence[str]) -> None:
    """Runs `label` with its arguments, the command's name first."""
    run_function(label, args)
