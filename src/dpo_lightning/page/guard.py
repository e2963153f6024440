"""What the server refuses: other sites' requests, other machines without the token, and much data.

A page on the internet can make the user's browser send requests to this server. Those that change anything are POST
with JSON, for which a browser first asks the server (and it refuses) or names the site they come from (`Origin`). With
a name of its own that suddenly means 127.0.0.1 (DNS rebinding) such a page would even be allowed to read the answers:
`Host` gives that away.
"""

import secrets
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY = ("0.0.0.0", "::", "")  # listens on all of the machine's addresses
COOKIE = "dpo-lightning-token"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware in front of the whole page.

    Args:
        app: the page.
        hosts: names and addresses under which the server may be called; empty for any, which needs a token.
        token: must be in the first request (`/?token=...`), which puts it into a cookie; None: none is needed.
    """

    def __init__(self, app: Any, hosts: Collection[str], token: str | None) -> None:
        assert hosts or token
        self.app, self.hosts, self.token = app, {host.lower() for host in hosts}, token

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answers a request, or refuses it."""
        if scope["type"] != "http":
            return  # no web sockets

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names]
                message = message | {"headers": [*message["headers"], *own]}
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        answer = self._refusal(scope, headers)
        if answer is None:
            await self.app(scope, receive, guarded)
            return
        status, text, more = answer
        lines = [(b"content-type", b"text/plain; charset=utf-8"), *more]
        await guarded({"type": "http.response.start", "status": status, "headers": lines})
        await guarded({"type": "http.response.body", "body": f"{text}\n".encode()})

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str, list[tuple[bytes, bytes]]] | None:
        """Status, text and headers for a request that the page does not get; None if it does."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and _name(host) not in self.hosts:
            return 403, "this server is not called by that name", []
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return 403, "requests from other sites are refused", []
        if self.token is None:
            return None
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and self._matches(given):
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            return 303, "", [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        if not self._matches(_cookie(headers.get("cookie", ""))):
            return 401, "open the address with its token, as the server printed it", []
        return None

    def _matches(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), (self.token or "").encode())


def _name(host: str) -> str:
    """The name in a Host header, without the port; "" if it is malformed."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _cookie(header: str) -> str:
    try:
        cookies = SimpleCookie(header)
    except CookieError:
        return ""
    return cookies[COOKIE].value if COOKIE in cookies else ""
