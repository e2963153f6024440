import json
import threading

import pytest

pytest.importorskip("starlette", reason="the page needs the extra `ui`")
from starlette.testclient import TestClient

from dpo_lightning.data.formats import RowOptions, find_format, get_format, row_to_pair
from dpo_lightning.data.prompt_format import trained_prompt_format
from dpo_lightning.data.sources import open_source
from dpo_lightning.errors import UserError
from dpo_lightning.page import clicks as clicks_file
from dpo_lightning.page.clicks import Clicks
from dpo_lightning.page.label import differing
from dpo_lightning.page.server import page
from dpo_lightning.page.tasks import Task, disagreement
from page_server import labelling, prompts, reply, two_replies


class Tab:
    """A tab of a browser, which labels."""

    def __init__(self, label, name="a"):
        self.server, self.name, self.clicked = TestClient(page([label.view()]), base_url="http://127.0.0.1"), name, 0

    def call(self, action, status=200, **values):
        answer = self.server.post(f"/api/label/{action}", json={"tab": self.name, **values})
        assert answer.status_code == status, answer.text
        return answer.json()

    def next(self):
        """Waits for a task, which is made in another thread."""
        for _ in range(1000):
            state = self.call("next")
            if state["task"] or not state["left"] or state["problem"]:
                return state
            threading.Event().wait(0.005)
        raise AssertionError("no task is made")

    def click(self, choice, task=None, **values):
        self.clicked += 1
        task = task or self.next()["task"]["name"]
        return self.call("click", **{"click": f"{self.name}{self.clicked}", "task": task, "choice": choice, **values})

    def undo(self):
        self.clicked += 1
        return self.call("undo", click=f"{self.name}{self.clicked}")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "labels.jsonl"


def pairs_of(path):
    """What `fit` reads, and the format it finds."""
    source = open_source(str(path), "train")
    name = find_format(source.columns, source.name)
    read = [row_to_pair(row, get_format(name), RowOptions(), "row") for _, row in source.rows()]
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in read], name


def test_each_choice_is_on_disk_when_it_is_confirmed(path):
    tab, journal = Tab(labelling(path, prompts(6))), path.with_name("labels.clicks.jsonl")
    tab.click("first")  # question 0, whose better reply is on the left
    (row,) = lines(path)
    assert (row["chosen"], row["rejected"], row["rejected_side"]) == (" yes 0", " no 0", "right")
    assert (row["chosen_model"], row["rejected_model"]) == ("tiny", "other")
    assert (row["labeller"], row["seed"], row["temperature"], row["edited"]) == ("Ada", 7, 1.0, False)
    assert row["time"].endswith("+00:00") and row["context"] == "CREATE TABLE t0 (a INT)"
    tab.click("first")  # question 1, whose better reply is on the right
    assert [lines(path)[1][name] for name in ("chosen", "rejected", "rejected_side")] == [" no 1", " yes 1", "right"]
    tab.click("tie")
    tab.click("skip")
    state = tab.click("second")
    assert state["counts"] == {"first": 2, "second": 1, "tie": 1, "skip": 1}
    tab.click("edit", edited=1, text="  no, never\r\nat all ")
    assert [lines(path)[-1][name] for name in ("chosen", "rejected")] == [" no, never\nat all", " yes 5"]
    assert [click["choice"] for click in lines(journal)] == ["first", "first", "tie", "skip", "second", "edit"]
    assert len(lines(path)) == 4
    assert tab.next()["task"] is None and tab.next()["left"] == 0
    found, name = pairs_of(path)
    assert found[0] == ("Q: Question 0?\nA:", " yes 0", " no 0") and name == "rendered"
    assert trained_prompt_format([(name, False)], RowOptions(), "<eos>", None).uses_schema


def test_undo_takes_the_line_back_and_asks_again(path):
    label = labelling(path, prompts(3))
    tab, other = Tab(label), Tab(label, "b")
    first = tab.next()["task"]
    tab.click("first")
    other.click("second")
    assert (state := tab.undo())["undone"] and state["task"] == first and state["counts"]["first"] == 0
    assert [row["click"] for row in lines(path)] == ["b1"]
    tab.click("second")
    assert [row["click"] for row in lines(path)] == ["b1", "a3"]
    assert [line["click"] for line in lines(label.clicks.journal)] == ["a1", "b1", "a2", "a3"]
    assert not Tab(label, "c").undo()["undone"]
    again = Tab(labelling(path, prompts(3)))  # also in the next run
    again.clicked = 10
    assert again.undo()["task"] == first


def test_thumbs_are_rows_with_a_label(path):
    make = lambda prompt: Task(f"{prompt.key}-1", prompt, [reply(" yes")])  # noqa: E731
    tab = Tab(labelling(path, prompts(3), make, pairs=False))
    tab.click("good")
    tab.click("bad")
    tab.click("good", edited=0, text="indeed")
    found, name = pairs_of(path)
    assert name == "rendered_unpaired"
    assert [pair[1:] for pair in found] == [(" yes", ""), ("", " yes"), (" indeed", "")]
    assert [row["model"] for row in lines(path)] == ["tiny", "tiny", ""]


def test_a_choice_of_the_other_mode_is_refused(path):
    make = lambda prompt: Task(f"{prompt.key}-1", prompt, [reply(" yes")])  # noqa: E731
    tab = Tab(labelling(path, prompts(3), make, pairs=False))
    tab.call("click", 400, click="x", task=tab.next()["task"]["name"], choice="first")


def test_two_tabs_get_different_prompts_and_the_second_answer_is_refused(path):
    label = labelling(path, prompts(3))
    one, two = Tab(label), Tab(label, "b")
    task = one.next()["task"]
    assert one.next()["task"] == task != two.next()["task"]
    one.click("first")
    assert two.click("second", task["name"])["refused"] == "decided"
    two.click("tie")
    last = one.next()["task"]
    assert two.next()["task"] == last  # there is no other: whoever is first decides
    two.click("first")
    assert one.click("first", last["name"])["refused"] == "decided"
    assert len(lines(label.clicks.journal)) == 3


def test_a_click_that_is_sent_twice_counts_once(path):
    tab = Tab(labelling(path, prompts(3)))
    task = tab.next()["task"]["name"]
    for _ in range(2):
        assert tab.call("click", click="same", task=task, choice="first")["refused"] is None
    assert len(lines(path)) == 1
    for _ in range(2):
        assert tab.call("undo", click="back")["undone"]
    assert lines(path) == []


def test_a_click_on_what_the_last_run_showed_counts(path):
    shown = Tab(labelling(path, prompts(30))).next()["task"]
    asked = prompts(30)[::-1]
    tab = Tab(labelling(path, asked))
    assert tab.next()["task"] != shown
    assert tab.click("first", shown["name"])["refused"] is None
    other = two_replies(asked[3]).name
    assert tab.click("first", f"{other}0")["refused"] == "changed"  # the replies are others
    assert len(lines(path)) == 1


@pytest.mark.parametrize("cut", [1, 40, None])
def test_a_kill_within_a_line_loses_nothing_that_was_confirmed(path, cut):
    label = labelling(path, prompts(9))
    tab = Tab(label)
    for _ in range(3):
        tab.click("first")
    whole = path.read_bytes()
    if cut:  # in the journal: the click was not confirmed
        label.clicks.journal.write_bytes(label.clicks.journal.read_bytes() + b'{"click": "a4", "choice": "first"'[:cut])
    else:  # between the two files, and within a line of the labels
        path.write_bytes(whole[:-20])
    again = Clicks(path)
    assert again.torn is bool(cut) and path.read_bytes() == whole and len(again.decided) == 3
    tab = Tab(labelling(path, prompts(9)))
    tab.clicked = 3
    tab.click("first")
    assert [row["click"] for row in lines(path)] == ["a1", "a2", "a3", "a4"]


def test_an_undo_that_a_kill_cut_short_is_completed(path):
    label = labelling(path, prompts(9))
    tab = Tab(label)
    tab.click("first")
    tab.click("first")
    before = path.read_bytes()
    tab.undo()
    path.write_bytes(before)
    Clicks(path)
    assert [row["click"] for row in lines(path)] == ["a1"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("labels.jsonl", '{"prompt": "mine"}\n', "there is no labels.clicks.jsonl beside it"),
        ("labels.clicks.jsonl", '{"click": "a"}\n', "line 1 is not a click"),
        ("labels.clicks.jsonl", "[1]\n", "found list where an object belongs"),
        ("labels.clicks.jsonl", "my notes", "half a line that is no click"),
    ],
)
def test_files_of_others_are_left_alone(path, name, content, words):
    path.with_name(name).write_text(content)
    with pytest.raises(UserError, match=words):
        Clicks(path)
    assert path.with_name(name).read_text() == content


def test_labels_that_were_edited_are_left_alone(path):
    Tab(labelling(path, prompts(9))).click("first")
    edited = path.read_text().replace("yes", "YES")
    path.write_text(edited)
    with pytest.raises(UserError, match="not what follows from labels.clicks.jsonl"):
        Clicks(path)
    assert path.read_text() == edited


def test_a_full_disk_is_said_and_the_click_can_be_sent_again(path, monkeypatch):
    label = labelling(path, prompts(9))
    tab = Tab(label)
    tab.click("first")
    before = label.clicks.journal.read_bytes()

    def full(path, lines, to_disk):
        path.open("a").write('{"click": "a2"')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clicks_file, "append_lines", full)
    task = tab.next()["task"]["name"]
    words = tab.call("click", 400, click="a2", task=task, choice="first")["error"]
    assert "the click is not saved" in words and "No space left" in words
    assert label.clicks.journal.read_bytes() == before
    monkeypatch.undo()
    assert tab.call("click", click="a2", task=task, choice="first")["refused"] is None
    assert len(lines(path)) == 2


def test_the_words_that_differ_are_marked():
    assert differing("SELECT a FROM t", "SELECT b FROM t WHERE x") == [
        [("SELECT ", False), ("a", True), (" FROM t", False)],
        [("SELECT ", False), ("b", True), (" FROM t", False), (" WHERE x", True)],
    ]
    assert differing("one thing", "or a different matter") == [None, None]
    assert differing("one") == [None] and differing("x" * 9000, "x" * 9000) == [None, None]


HOSTILE = {
    "<script>alert(1)</script>": "<script>alert(1)</script>",  # as text: the page never makes HTML of it
    "\x1b[31mred\x07\x00": "\\x1b[31mred\\x07\\x00",
    "\u202etxt.exe": "\\u202etxt.exe",
    "\ud800 half": "\\ud800 half",
    "a\ttab\nand line": "a\ttab\nand line",
    "x" * 1_000_000: "x" * 1_000_000,
}


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_arrive_as_visible_text(path, text):
    asked = [prompts(1)[0]._replace(question=text)]
    make = lambda prompt: Task(f"{prompt.key}-1", prompt, [reply(text), reply("b")])  # noqa: E731
    tab = Tab(labelling(path, asked, make))
    task = tab.next()["task"]
    assert task["question"] == task["replies"][0]["text"] == HOSTILE[text]
    tab.click("first")
    assert lines(path)[0]["chosen"] == text  # what is trained on is the reply itself


@pytest.mark.parametrize(
    "values",
    [
        {"tab": ""},
        {"tab": "a" * 101},
        {"click": "../x"},
        {"choice": "better"},
        {"choice": "good"},
        {"choice": "edit"},
        {"choice": "edit", "edited": 2, "text": "x"},
        {"choice": "edit", "edited": -1, "text": "x"},
        {"choice": "first", "edited": 0, "text": "x"},
        {"choice": "edit", "edited": 0, "text": " \n"},
        {"choice": "edit", "edited": 0, "text": "yes 0"},
        {"choice": "edit", "edited": 0, "text": "\ud800"},
        {"choice": "edit", "edited": 0, "text": "x" * 1_000_001},
    ],
)
def test_clicks_that_no_page_makes_are_refused(path, values):
    tab = Tab(labelling(path, prompts(1)))
    task = tab.next()["task"]["name"]
    body = json.dumps({"tab": "a", "click": "c", "task": task, "choice": "first"} | values)
    headers = {"content-type": "application/json"}
    assert tab.server.post("/api/label/click", content=body, headers=headers).status_code == 400
    assert not path.exists()


def test_the_prompt_with_the_most_different_replies_comes_first(path):
    def make(prompt):
        number = int(prompt.question.split()[1].rstrip("?"))
        second = reply("a b c d e" if number < 4 else "v w x y z", score=0.0 if number == 2 else 1.0)
        replies = [reply("a b c d", score=1.0), second]
        return Task(f"{prompt.key}-1", prompt, replies, disagreement(*replies))

    label = labelling(path, prompts(6), make, ahead=6, most_different=True)
    tab = Tab(label)
    for _ in range(7):
        label.tasks.work.submit(lambda: None).result()  # behind the replies in the making, which are six in all
    questions = []
    for _ in range(3):
        questions.append(tab.next()["task"]["question"])
        tab.click("tie")
    assert questions[0] == "Question 2?"  # the judge tells them apart
    assert set(questions[1:]) == {"Question 4?", "Question 5?"}


def test_prompts_without_a_choice_are_counted_and_problems_said(path):
    def make(prompt):
        if prompt.question == "Question 2?":
            raise UserError("the judge has \x1b[31mfailed")
        return None if prompt.question == "Question 0?" else two_replies(prompt)

    tab = Tab(labelling(path, prompts(3), make))
    state = tab.next()
    assert (state["task"]["question"], state["same"]) == ("Question 1?", 1)
    state = tab.click("first")
    while not state["problem"]:
        state = tab.call("next")
    assert state["problem"] == "the judge has \\x1b[31mfailed" and state["task"] is None


def test_a_thousand_clicks_of_two_tabs_are_a_thousand_lines(path):
    label = labelling(path, prompts(1000), ahead=50)
    errors = []

    def work(name):
        try:
            tab = Tab(label, name)
            task = tab.next()["task"]
            while task:
                task = tab.click("first", task["name"])["task"] or tab.next()["task"]
        except Exception as error:
            errors.append(error)

    tabs = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for tab in tabs:
        tab.start()
    for tab in tabs:
        tab.join()
    assert not errors
    assert len({row["prompt"] for row in lines(path)}) == len(lines(path)) == 1000
    assert len(lines(label.clicks.journal)) == 1000
    assert Clicks(path).counts == {"first": 1000}
