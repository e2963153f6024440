"""The page as a server: its views' actions under /api, what the browser gets under /, and a guard in front of both."""

import json
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import first_line
from dpo_lightning.page.guard import EVERY, LOOPBACK, Guard
from dpo_lightning.page.view import View
from dpo_lightning.parsing import check_settings
from dpo_lightning.visible import one_line

STATIC = Path(__file__).parent / "static"
LARGEST = 8_000_000  # bytes of a request: a corrected reply of a million characters, escaped


def page(views: Sequence[View], hosts: Collection[str] = LOOPBACK, token: str | None = None) -> Guard:
    """The page with these tabs, as an ASGI application.

    Args:
        hosts, token: see `Guard`.
    """
    actions = {f"{view.name}/{name}": action for view in views for name, action in view.actions.items()}
    actions["page/views"] = lambda: {"views": [view.name for view in views]}

    async def act(request: Request) -> Response:
        action = actions.get(request.path_params["action"])
        if action is None:
            return _error(404, "there is no such action")
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return _error(415, "the request must be JSON")
        try:
            values = _checked(await _body(request), action)
            result = await run_in_threadpool(action, **values)
        except ClientDisconnect:
            return Response(status_code=400)
        except TooLarge:
            return _error(413, f"a request has at most {LARGEST:,} bytes")
        except UserError as error:
            return _error(400, str(error))
        return JSONResponse(result) if isinstance(result, Mapping) else _lines(result)

    routes = [
        Route("/api/{action:path}", act, methods=["POST"]),
        *(route for view in views for route in view.routes),
        Mount("/", StaticFiles(directory=STATIC, html=True)),
    ]
    return Guard(Starlette(routes=routes), hosts, token)


class TooLarge(Exception):
    """A request with more than `LARGEST` bytes."""


async def _body(request: Request) -> bytes:
    """The content of a request; TooLarge if it has too many bytes, of which the rest is not read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST:
            raise TooLarge
    return bytes(body)


def _checked(body: bytes, action: Callable) -> dict[str, Any]:
    """The arguments of an action; UserError if they are not a JSON object, or do not fit the action's signature."""
    try:
        values = json.loads(body.decode())
        signature(action).bind(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"the request does not fit: {first_line(error)}") from error
    check_settings(action, values, "")
    return values


def _error(status: int, words: str) -> JSONResponse:
    return JSONResponse({"error": one_line(words)}, status)


def _lines(results: Iterator[dict[str, Any]]) -> StreamingResponse:
    """A response of one JSON object a line, each sent when it is there; an error is the last one."""

    def lines() -> Iterator[str]:
        try:
            for result in results:
                yield json.dumps(result) + "\n"
        except UserError as error:
            yield json.dumps({"error": one_line(str(error))}) + "\n"

    async def closing() -> Any:
        try:
            async for line in iterate_in_threadpool(lines()):
                yield line
        finally:  # also when the browser has gone
            if hasattr(results, "close"):
                results.close()

    return StreamingResponse(closing(), media_type="application/x-ndjson")


def listen(host: str, port: int) -> socket.socket:
    """A socket on which the page can be served.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # at once after the last run
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        listening.close()
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(f"the page cannot be served at {host}, port {port}: {why}; give another --port") from error
    return listening


def allowed_hosts(host: str) -> tuple[str, ...]:
    """The names under which a server at this address may be called; empty for any."""
    return () if host in EVERY else LOOPBACK if host in LOOPBACK else (host,)


def serve(app: Guard, listening: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM, which are raised again at the end."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listening])
