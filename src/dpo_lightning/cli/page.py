"""What the commands that serve a page have in common: the page's address, its token, and its end."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dpo_lightning.cli.chat_prompts import note
from dpo_lightning.cli.label import check_token
from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from dpo_lightning.page.view import View
    from dpo_lightning.page.work import Work


def serve_page(make_views: "Callable[[Work], Sequence[View]]", host: str, port: int, token: str | None) -> None:
    """Serves a page until Ctrl-C.

    Args:
        make_views: called when the address is known to be free; it may load models.

    Raises:
        UserError: the extra `ui` is not installed, the address cannot be had, or it needs a token.
    """
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the page needs the package {package}, which is not installed: pip install starlette uvicorn")
    check_token(host, token)
    from dpo_lightning.page.server import allowed_hosts, listen, page, serve
    from dpo_lightning.page.work import Work

    listening = listen(host, port)
    work = Work()
    try:
        views = make_views(work)
        note(f"http://{host}:{port}/" + (f"?token={token}" if token else ""))
        serve(page(views, allowed_hosts(host), token), listening)
    finally:
        work.end()
