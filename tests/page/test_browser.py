"""The page in a real browser, headless: by keys alone, while its server is killed."""

import json
import multiprocessing

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
pytest.importorskip("playwright", reason="the browser is driven by playwright")
from playwright import sync_api as playwright

from conftest import CHROMIUM
from dpo_lightning.page.server import listen
from page_server import reply, serve_labelling

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["page_server"])


class Server:
    """A server in a process of its own, which can be killed."""

    def __init__(self, path, **options):
        self.path, self.options = path, options
        with listen("127.0.0.1", 0) as free:
            self.port = free.getsockname()[1]
        self.process = None

    def start(self):
        self.process = FORKED.Process(
            target=serve_labelling, args=(self.path, self.port), kwargs=self.options, daemon=True
        )
        self.process.start()

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "labels.jsonl")
    yield made
    made.kill()


@pytest.fixture
def opened(browser, server):
    """Opens the page in a new window; what a script complains about fails the test."""
    errors, contexts = [], []

    def open_page(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # of a busy machine
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: request.url.startswith(home) or errors.append(request.url))
        home = f"http://127.0.0.1:{server.port}/"
        for _ in range(200):
            try:
                page.goto(home)
                break
            except playwright.Error:  # the server is starting
                page.wait_for_timeout(50)
        page.wait_for_selector(".reply")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors


def rows(server):
    return [json.loads(line) for line in server.path.read_text().splitlines()]


def press(page, key):
    """Presses a key, and waits until another prompt is shown."""
    before = page.inner_text(".asked")
    page.keyboard.press(key)
    page.wait_for_function("before => document.querySelector('.asked')?.textContent !== before", arg=before)


@pytest.mark.slow
def test_labelling_by_keys_goes_on_when_the_server_is_killed(server, opened):
    server.start()
    page = opened()
    for number in range(20):
        if number in (7, 14):
            server.kill()
            page.keyboard.press("1")
            page.wait_for_selector("#notice.error")
            assert "Your click is kept" in page.inner_text("#notice")
            if number == 14:
                before = page.inner_text(".asked")
                server.start()
                page.wait_for_function("b => document.querySelector('.asked')?.textContent !== b", arg=before)
            else:
                server.start()
                page.wait_for_selector("#notice:not(.error)", state="attached")
                page.wait_for_function("document.querySelector('.status').textContent.startsWith('8 ')")
        else:
            press(page, "1" if number % 2 else "2")
    assert len(rows(server)) == 20
    page.reload()
    page.wait_for_selector(".reply")
    assert page.inner_text(".status p").startswith("20 labels")


def test_every_key_does_what_it_says(server, opened):
    server.start()
    page = opened()
    first = page.inner_text(".asked")
    press(page, "1")
    press(page, "u")
    assert page.inner_text(".asked") == first and not rows(server)
    press(page, "=")
    press(page, "s")
    page.keyboard.press("e")
    assert "Press 1 or 2" in page.inner_text(".hint")
    page.keyboard.press("Escape")
    page.keyboard.press("e")
    page.keyboard.press("2")
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    page.keyboard.press("Control+A")
    page.keyboard.type("12 = sue")  # keys in a text are text
    press(page, "Control+Enter")
    (row,) = rows(server)
    assert row["chosen"] == " 12 = sue" and row["edited"] and row["rejected_side"] == "right"
    for _ in range(4):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("A", "BUTTON", "DIV")


@pytest.mark.slow
def test_two_tabs_and_chinese_on_a_phone(server, opened):
    server.start()
    one = opened()
    two = opened(locale="zh-CN", viewport={"width": 390, "height": 844}, color_scheme="dark")
    assert one.inner_text(".asked") != two.inner_text(".asked")
    assert "这个更好" in two.inner_text(".replies") and two.evaluate("document.documentElement.lang") == "zh-CN"
    assert two.evaluate("document.documentElement.scrollWidth") <= 390
    two.click("text=English")
    two.wait_for_selector("text=This one is better")
    one.click("text=中文")
    one.wait_for_selector("text=这个更好")


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</div><svg onload=alert(1)>",
    "javascript:alert(1)",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<style>* { display: none }</style>",
    "<base href='//evil.example'>",
    "<link rel=stylesheet href=//evil.example>",
    "<form action=//evil.example><button>go",
    "<a href=//evil.example>a</a>",
    "&lt;b&gt; &#106;",
    "${alert(1)} {{alert(1)}}",
    '"onmouseover="alert(1)',
    "\x1b[31mred\x1b]0;title\x07",
    "\x00\x08\x7f",
    "\u202eexe.txt\u2066",
    "a\u200bb\ufeff",
    "e" + "\u0301" * 500,
    "<!--" + "x" * 100,
    "long " * 200_000,
]


def hostile(prompt):
    """A task whose replies are hostile."""
    from dpo_lightning.page.tasks import Task

    text = HOSTILE[int(prompt.question.split()[1].rstrip("?"))]
    return Task(f"{prompt.key}-1", prompt._replace(question=text), [reply(text, score=1.0), reply("b")])


@pytest.mark.slow
def test_hostile_texts_are_text(server, opened):
    server.options = {"make": hostile, "count": len(HOSTILE)}
    server.start()
    page = opened()
    for text in HOSTILE:
        words = page.evaluate("document.querySelector('.said').firstChild.textContent")
        assert words.isprintable() or "\u0301" in words
        assert page.evaluate("document.querySelector('.said').children.length") == (len(text) > 6000)
        assert words.startswith(text[:100]) or not text.isprintable()
        press(page, "1") if text != HOSTILE[-1] else page.keyboard.press("1")
    page.wait_for_selector(".pause")
    assert page.evaluate("document.title") == "Label · dpo-lightning"
    assert len(rows(server)) == len(HOSTILE)
