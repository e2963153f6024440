"""The page in a real browser, headless: by keys alone, while its server is killed."""

import json
import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
pytest.importorskip("playwright", reason="the browser is driven by playwright")
from playwright import sync_api as playwright

from conftest import CHROMIUM
from dpo_lightning.models.hub import PACKAGE
from dpo_lightning.page.server import listen
from page_server import reply, serve_labelling

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["page_server"])


def free_port():
    with listen("127.0.0.1", 0) as free:
        return free.getsockname()[1]


class Server:
    """A server in a process of its own, which can be killed."""

    def __init__(self, path, **options):
        self.path, self.options = path, options
        self.port, self.process = free_port(), None

    def start(self):
        self.process = FORKED.Process(
            target=serve_labelling, args=(self.path, self.port), kwargs=self.options, daemon=True
        )
        self.process.start()

    def kill(self):
        if self.process:
            self.process.kill()
            self.process.join()


class Command:
    """A command of the program that serves a page, in the current folder."""

    def __init__(self, *args):
        self.args, self.port, self.process = args, free_port(), None

    def start(self):
        command = [sys.executable, "-m", "dpo_lightning", *self.args, "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def kill(self):
        self.process.kill()
        self.process.communicate()

    def end(self):
        """Ctrl-C; returns what was printed."""
        self.process.send_signal(signal.SIGINT)
        return self.process.communicate(timeout=60)[0]


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Starts commands in an empty folder, one at a time."""
    monkeypatch.chdir(tmp_path)
    started = []

    def start(*args):
        started.append(Command(*args))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "labels.jsonl")
    yield made
    made.kill()


@pytest.fixture
def opened(browser, server):
    """Opens the page of `server`, or of another one, in a new window; what a script complains about fails the test."""
    errors, contexts = [], []

    def open_page(at=server, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)  # of a busy machine
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"a dialog: {dialog.message}"))
        page.on("request", lambda request: request.url.startswith(home) or errors.append(request.url))
        home = f"http://127.0.0.1:{at.port}/"
        for _ in range(2000):
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
    another(page, before)


def another(page, before):
    """Waits until another prompt is shown."""
    page.wait_for_function("b => ![b, undefined].includes(document.querySelector('.asked')?.textContent)", arg=before)


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
                another(page, before)
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


@pytest.mark.slow
def test_a_thousand_clicks_at_ten_a_second_from_two_tabs(server, opened):
    server.options = {"count": 1000, "ahead": 50}
    server.start()
    tabs = [opened(), opened()]
    began = time.monotonic()
    for number in range(999):
        tabs[0].wait_for_timeout(max(0, 1000 * (began + number / 10 - time.monotonic())))
        press(tabs[number % 2], "12="[number % 3])
    tabs[1].keyboard.press("1")  # what both tabs show now
    tabs[1].wait_for_selector("text=All prompts are labelled")
    journal = [json.loads(line) for line in server.path.with_suffix(".clicks.jsonl").read_text().splitlines()]
    assert len(journal) == len({line["click"] for line in journal}) == len({line["key"] for line in journal}) == 1000
    assert Counter(line["tab"] for line in journal).most_common(1)[0][1] == 500
    assert [row["click"] for row in rows(server)] == [line["click"] for line in journal if line["choice"] != "tie"]


# ---------------------------------------------------------------------- the whole way, with the demo's model

MODEL, ROWS = "dpo_lightning/demo/model", "dpo_lightning/demo/data/train.jsonl"


def answers():
    """The wanted reply to each question about a table."""
    found = [json.loads(line) for line in (PACKAGE / "demo" / "data" / "train.jsonl").read_text().splitlines()]
    return {(row["question"], row["context"]): row["answer"] for row in found}


def correct(page, answer, *which):
    """Types what a reply should have been."""
    for key in ("e", *which, "Control+A"):
        page.keyboard.press(key)
    page.keyboard.insert_text(answer)
    press(page, "Control+Enter")


def fit(*args):
    """Trains from the command line on the demo's settings; returns the last replies of the run."""
    settings = ("--config", "demo", "--replies.num_prompts", "16", "--trainer.enable_progress_bar", "false", *args)
    subprocess.run([sys.executable, "-m", "dpo_lightning", "fit", *settings], check=True)
    lines = [json.loads(line) for line in Path("lightning_logs/version_0/replies.jsonl").read_text().splitlines()]
    return [line["reply"] for line in lines if line["step"] == lines[-1]["step"]]


@pytest.mark.slow
def test_the_whole_way_from_clicks_over_training_to_a_win_rate(opened, command):
    label = command("label", "--model", MODEL, "--prompts", ROWS, "--max_new_tokens", "48")
    page, wanted = opened(label), answers()
    for number in range(20):
        if number in (7, 14):
            label.kill()
            page.keyboard.press("1")
            page.wait_for_selector("text=Your click is kept")
            before = page.inner_text(".asked")
            label.start()
            another(page, before)
        elif number % 5 == 4:
            press(page, "2")
        else:
            correct(page, wanted[page.inner_text(".asked"), page.inner_text(".context")], "1")
    assert page.inner_text(".status p").startswith("20 labels in labels.jsonl")
    label.end()
    assert len(Path("labels.jsonl").read_text().splitlines()) == 20

    fit("--data.train_dataset", "labels.jsonl", "--trainer.max_epochs", "10")

    models = ("--model", "lightning_logs/version_0", "--model_b", MODEL)
    held_out = ("--prompts", "dpo_lightning/demo/data/test.jsonl", "--num_prompts", "12", "--max_new_tokens", "48")
    compare = command("compare", *models, *held_out)
    page = opened(compare)
    while page.locator(".reply").count():
        left, right = (text.startswith("SELECT") for text in page.locator(".said").all_inner_texts())
        done = page.locator("progress").get_attribute("value")
        page.keyboard.press("=" if left == right else "1" if left else "2")
        page.wait_for_function("done => document.querySelector('progress').value > done", arg=int(done))
        page.wait_for_selector(".reply, h2:text('All prompts are compared.')")
    shown, printed = page.inner_text(".results"), compare.end()
    rate = int(page.inner_text(".results .big").rstrip("%"))
    assert f"win rate of lightning_logs/version_0 against {MODEL}" in shown
    low, high = map(int, re.search(r"95% interval (\d+)% to (\d+)%", shown).groups())
    assert low < rate < high and rate > 80 and "More than chance: lightning_logs/version_0 is better" in shown
    assert re.search(rf"by hand, .* against .*\n    win rate {rate}\.\d%, 95% interval", printed)


@pytest.mark.slow
def test_thumbs_by_keys_are_trained_on_with_kto(opened, command):
    label = command("label", "--model", MODEL, "--prompts", ROWS, "--mode", "thumbs", "--output", "thumbs.jsonl")
    page, wanted = opened(label), answers()
    for number in range(24):
        if number % 2:
            press(page, "2")
        else:
            correct(page, wanted[page.inner_text(".asked"), page.inner_text(".context")])
    label.end()
    thumbs = [json.loads(line) for line in Path("thumbs.jsonl").read_text().splitlines()]
    assert [row["label"] for row in thumbs] == [True, False] * 12
    kto = ("--model.loss_type", "kto", "--model.loss_weights", "null", "--model.learning_rate", "5e-4")
    assert len(fit("--data.train_dataset", "thumbs.jsonl", "--trainer.max_epochs", "10", *kto)) == 16
