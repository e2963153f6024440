"""What the commands that serve a page have in common."""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dpo_lightning.cli.chat_prompts import note
from dpo_lightning.errors import UserError
from dpo_lightning.page.guard import EVERY, LOOPBACK
from dpo_lightning.page.view import View
from dpo_lightning.page.work import Work
from dpo_lightning.parsing import AtLeast1, check_settings
from dpo_lightning.storage.locks import hold, in_use, let_go


def check_page(host: str, token: str | None) -> None:
    """Raises UserError for a missing package, a host that needs a token and has none, and a token that is too short."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"the page needs the package {package}, which is not installed: pip install starlette uvicorn"
            )
    if token is None and host not in LOOPBACK:
        raise UserError(f"--host {host}: other machines could use the page, so it needs --token, a secret of yours")
    if token is not None and (len(token) < 16 or not token.isascii() or not token.replace("-", "a").isalnum()):
        raise UserError("--token must have at least 16 characters, which are letters, digits and -")


@contextmanager
def own_output(output: str) -> Iterator[Path]:
    """The path of a file of JSON lines that no other command writes during the block.

    Raises:
        UserError: its name is not that of such a file, or another command is writing it.
    """
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise UserError(f"--output '{output}' must end in .jsonl, as it is a file of JSON lines")
    lock = path.with_name(f"{path.name}.lock")
    if not hold(lock):
        raise in_use(f"--output '{output}'", "give another one")
    try:
        yield path
    finally:
        let_go(lock, remove=True)


def serve_views(
    make_views: Callable[[Work], Sequence[View]],
    runs: str = "lightning_logs",
    host: str = "127.0.0.1",
    port: AtLeast1 = 7865,
    token: str | None = None,
) -> None:
    """Serves a page until Ctrl-C, which is raised again. Its last view is Runs.

    Args:
        make_views: the other views; may load models; called when the address is known to be free.
        runs: folder of runs, for the page's list of them.
        host: address at which the page is served; any but this machine's own (127.0.0.1) needs a token.
        port: of the page.
        token: a secret that must be in the page's address.
    """
    check_settings(serve_views, {"runs": runs, "host": host, "port": port, "token": token}, "--")
    check_page(host, token)
    from dpo_lightning.page.runs import Runs
    from dpo_lightning.page.server import allowed_hosts, listen, page, serve

    work = Work()
    try:
        with listen(host, port) as listening:
            views = [*make_views(work), Runs(Path(runs).expanduser()).view()]
            note(f"open {address(host, port, token)} in a browser; Ctrl-C ends")
            serve(page(views, allowed_hosts(host), token), listening)
    finally:
        work.end()


def address(host: str, port: int, token: str | None) -> str:
    """The page's address for a browser."""
    name = "127.0.0.1" if host in EVERY else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={token}" if token else "")
