"""Compare, Chat and Runs in a real browser, driven by keys as a user would."""

import re
import threading
import time

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
pytest.importorskip("playwright", reason="drives the browser")
from playwright import sync_api
from torch.utils.tensorboard import SummaryWriter

from conftest import CHROMIUM
from dpo_lightning.callbacks.report.page import Run, render
from dpo_lightning.callbacks.report.saved import as_json
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.speakers import Sampling, load_speakers
from dpo_lightning.judging.judge import find_score
from dpo_lightning.models.reply import Reply
from dpo_lightning.page.compare import Comparison
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.runs import Runs
from dpo_lightning.page.server import listen, page, serve
from dpo_lightning.page.talk import Talk
from dpo_lightning.page.work import Work

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>"
PATIENCE = 60_000  # milliseconds
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no {CHROMIUM}")


@pytest.fixture
def visit(browser):
    """Serves views, and opens one of them in a tab of its own."""
    contexts, problems = [], []

    def open_view(views, **options):
        listening = listen("127.0.0.1", 0)
        listening.listen()
        threading.Thread(target=serve, args=(page(views), listening), daemon=True).start()
        contexts.append(browser.new_context(locale="en-US", **options))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        tab.goto(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        return tab

    yield open_view
    for context in contexts:
        context.close()
    assert not problems


def test_models_are_compared_by_keys_up_to_the_win_rate(visit, tmp_path):
    prompts = [Prompt(f"{n} {HOSTILE}", PreferencePair(f"{n} {HOSTILE}", "right", "")) for n in range(8)]

    def replies(prompt):
        return tuple(Reply(text, [1], True) for text in ("right", f"wrong {HOSTILE}"))

    comparison = Comparison(
        ("the new", "the old"), prompts, replies, tmp_path / "c.jsonl", Work(), {}, score=find_score("exact")
    )
    tab = visit([comparison.view()])
    for count in range(8):
        tab.wait_for_selector(f"text={count} of 8 prompts compared")
        tab.wait_for_selector(".reply")
        left = tab.locator(".reply .said").first.inner_text()
        if count == 3:
            tab.keyboard.press("=")
            tab.wait_for_selector("text=4 of 8 prompts compared")
            tab.wait_for_selector(".reply")
            tab.keyboard.press("u")
            tab.wait_for_selector("text=3 of 8 prompts compared")
            tab.wait_for_selector(".reply")
        if count == 5:
            tab.keyboard.press("r")  # the result, which is hidden at first
            tab.wait_for_selector("text=100%")
            tab.keyboard.press("r")
            tab.reload()
            tab.wait_for_selector(".reply")
        assert tab.locator("text=win rate of").count() == 0
        tab.keyboard.press("1" if left == "right" else "2")
    tab.wait_for_selector("text=All prompts are compared")
    assert tab.locator("text=win rate of the new against the old").count() == 1
    assert "8 won · 0 lost · 0 tied" in tab.inner_text(".results")
    assert "More than chance: the new is better" in tab.inner_text(".results")
    tab.click("text=Let the judge compare")
    tab.wait_for_selector("text=8 of 8 judged")
    assert tab.locator("text=win rate of the new against the old").count() == 2
    assert tab.evaluate("window.hacked") is None and tab.locator("main img, main script").count() == 0
    tab.click("#language")
    tab.wait_for_selector("text=所有提示都已比较完")


def test_both_models_reply_in_chat_and_can_be_stopped(visit, model_folder):
    speakers = load_speakers(str(model_folder), str(model_folder), False)
    template = PromptFormat(False, "{context}\nQuestion: {question}\nAnswer:")
    tab = visit(
        [Talk(speakers, template, Work(), Sampling(0.0, 1.0, 24)).view()], viewport={"width": 390, "height": 800}
    )
    tab.fill("#schema", "CREATE TABLE singer (name VARCHAR)")
    tab.fill("#question", HOSTILE)
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".going", state="detached")
    said = tab.locator("article .code:not(.tall)").all_inner_texts()
    assert len(said) == 2 and said[0] == said[1] != ""
    assert tab.locator("article h2").all_inner_texts() == ["Reference", "Policy"]
    assert HOSTILE in tab.inner_text("article .mine") and tab.evaluate("window.hacked") is None
    tab.click("text=The prompt as the models got it")
    assert tab.inner_text("article .tall").startswith("CREATE TABLE singer (name VARCHAR)\nQuestion: <img")
    for speaker in speakers:
        speaker.model.register_forward_hook(lambda *_: time.sleep(0.1))  # or it would have ended before the key
    tab.fill("#question", "again")
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".going")
    tab.keyboard.press("Escape")
    tab.wait_for_selector("text=stopped")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out on a phone


def test_runs_are_listed_and_their_curves_grow(visit, tmp_path):
    folder = tmp_path / "logs" / "version_0"
    writer = SummaryWriter(str(folder))
    for step in range(3):
        writer.add_scalar("train/loss", 0.7 - step / 10, step)
    writer.flush()
    title = f"model on {HOSTILE}"
    run = Run(title, "Finished after 3 steps.", {}, {}, {}, {}, [], [], {}, [])
    (folder / "report.json").write_text(as_json(run))
    (folder / "report.html").write_text(render(run) + "<script>window.opener.hacked=1</script>", encoding="utf-8")
    tab = visit([Runs(tmp_path / "logs").view()], color_scheme="dark")
    line = tab.locator(".run polyline").first
    line.wait_for()
    assert tab.inner_text(".run .title") == title and tab.inner_text(".run .state") == "finished"
    assert len(line.get_attribute("points").split()) == 3
    assert "0.7 → 0.5" in tab.inner_text(".tiles")
    writer.add_scalar("train/loss", 0.1, 3)
    writer.close()
    sync_api.expect(line).to_have_attribute("points", re.compile(r"(\S+ ){3}\S+"), timeout=PATIENCE)
    assert "0.7 → 0.1" in tab.inner_text(".tiles")
    with tab.context.expect_page() as opened:
        tab.click("text=Open the report")
    opened.value.wait_for_load_state()
    assert opened.value.inner_text("h1") == title
    policy = tab.request.get(opened.value.url).headers["content-security-policy"]
    assert re.match("sandbox; default-src 'none'", policy) and "script" not in policy
    assert tab.evaluate("window.hacked") is None
    assert tab.request.get(opened.value.url.replace("/report.html", "0/report.html")).status == 404
