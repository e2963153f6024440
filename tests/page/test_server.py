import json

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
from starlette.testclient import TestClient

from dpo_lightning.errors import UserError
from dpo_lightning.page.server import LARGEST, allowed_hosts, listen, page
from dpo_lightning.page.view import View, shown

HOME = "http://127.0.0.1:7865"
TOKEN = "token-of-16-characters"


def echo(text: str, times: int = 1) -> dict:
    if text == "bad":
        raise UserError("that text is \x1b[31mbad")
    return {"text": shown(text) * times}


def count(until: int):
    for number in range(until):
        yield {"number": number}
    raise UserError("that was all")


def client(**options):
    app = page([View("echo", {"echo": echo, "count": count}), View("other", {})], **options)
    return TestClient(app, base_url=HOME, follow_redirects=False)


def test_a_view_is_its_actions():
    server = client()
    assert server.post("/api/page/views", json={}).json() == {"views": ["echo", "other"]}
    assert server.post("/api/echo/echo", json={"text": "a", "times": 2}).json() == {"text": "aa"}
    lines = server.post("/api/echo/count", json={"until": 2}).text.splitlines()
    assert [json.loads(line) for line in lines] == [{"number": 0}, {"number": 1}, {"error": "that was all"}]


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"json": {"text": "bad"}}, 400, "that text is \\x1b[31mbad"),
        ({"json": {}}, 400, "missing a required argument: 'text'"),
        ({"json": {"text": 3}}, 400, "text is 3: it must be a text"),
        ({"json": {"text": "a", "other": 1}}, 400, "unexpected keyword argument 'other'"),
        ({"json": ["text"]}, 400, "does not fit"),
        ({"content": "{", "headers": {"content-type": "application/json"}}, 400, "does not fit"),
        ({"content": "[" * 100_000, "headers": {"content-type": "application/json"}}, 400, "does not fit"),
        ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "does not fit"),
        ({"content": '{"text": "a"}', "headers": {"content-type": "text/plain"}}, 415, "must be JSON"),
        ({"files": {"file": b"an upload"}}, 415, "must be JSON"),
        ({"json": {"text": "a" * LARGEST}}, 413, "8,000,000 bytes"),
    ],
)
def test_a_request_that_does_not_fit_is_answered_with_one_line(request_, status, words):
    answer = client().post("/api/echo/echo", **request_)
    assert answer.status_code == status
    assert words in answer.json()["error"]


@pytest.mark.parametrize("path", ["/api/echo/nothing", "/api/../server.py", "/../server.py", "/%2e%2e/server.py"])
def test_there_is_nothing_else(path):
    assert client().post(path, json={}).status_code in (404, 405)
    assert client().get(path).status_code in (404, 405)


@pytest.mark.parametrize("host", ["127.0.0.1.evil.example:7865", "evil.example:7865", "", "[", "0.0.0.0"])
def test_a_foreign_host_is_refused(host):
    for method, path in (("GET", "/"), ("POST", "/api/page/views")):
        assert client().request(method, path, headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["localhost:7865", "127.0.0.1", "[::1]:7865", "LOCALHOST"])
def test_own_names_are_answered(host):
    assert client().get("/", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:8000", "http://127.0.0.1", "http://localhost:7865", ""]
)
def test_a_foreign_origin_is_refused(origin):
    assert client().post("/api/page/views", json={}, headers={"origin": origin}).status_code == 403
    assert client().post("/api/page/views", json={}, headers={"origin": HOME}).status_code == 200


def test_no_other_site_is_told_that_it_may_ask():
    headers = {"origin": HOME, "access-control-request-method": "POST"}
    answer = client().options("/api/page/views", headers=headers)
    assert answer.status_code == 405
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_answers_forbid_scripts_and_frames_of_others():
    for path in ("/", "/page.js", "/page.css", "/nothing"):
        headers = client().get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_the_token_comes_once_and_then_as_a_cookie():
    server = client(hosts=(), token=TOKEN)
    assert server.get("/").status_code == 401
    assert server.post("/api/page/views", json={}).status_code == 401
    assert server.get("/", params={"token": "wrong"}).status_code == 401
    assert server.get("/page.js", params={"token": TOKEN}).status_code == 401
    answer = server.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "HttpOnly" in answer.headers["set-cookie"] and "SameSite=Strict" in answer.headers["set-cookie"]
    assert server.get("/").status_code == 200
    assert server.post("/api/page/views", json={}).status_code == 200


def test_every_address_needs_a_token():
    assert allowed_hosts("0.0.0.0") == ()
    with pytest.raises(AssertionError):
        page([], allowed_hosts("0.0.0.0"))


def test_a_port_in_use_is_said():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="in use; give another --port"):
            listen("127.0.0.1", taken.getsockname()[1])
