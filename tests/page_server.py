"""A page to label on without a model: what the tests of the page share."""

from pathlib import Path

from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.page.clicks import Clicks
from dpo_lightning.page.label import Labelling
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.server import listen, page, serve
from dpo_lightning.page.tasks import Candidate, Task, Tasks
from dpo_lightning.page.work import Work

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64}


def prompts(count: int) -> list[Prompt]:
    """Questions with a schema, as a template renders them."""
    return [
        Prompt(f"Question {n}?", PreferencePair(f"Q: Question {n}?\nA:", f" yes {n}", "", f"CREATE TABLE t{n} (a INT)"))
        for n in range(count)
    ]


def reply(text: str, model: str = "tiny", score: float | None = None) -> Candidate:
    verdicts = {} if score is None else {"sql/valid": bool(score)}
    return Candidate(model, text, stopped=True, sample=0, verdicts=verdicts, score=score)


def two_replies(prompt: Prompt) -> Task:
    """The better one is on the left for even questions."""
    number = int(prompt.question.split()[1].rstrip("?"))
    replies = [reply(f" yes {number}", score=1.0), reply(f" no {number}", "other", score=0.0)]
    return Task(f"{prompt.key}-1", prompt, replies if number % 2 == 0 else replies[::-1])


def labelling(path: Path, asked: list[Prompt], make=two_replies, pairs: bool = True, **options) -> Labelling:
    """A labelling that goes on where the file ends."""
    clicks = Clicks(path)
    left = [prompt for prompt in asked if prompt.key not in clicks.decided]
    tasks = Tasks(left, make, Work(), **{"ahead": 4} | options)
    return Labelling(tasks, clicks, pairs, {"sampling": SAMPLING, "seed": 7, "labeller": "Ada"})


def serve_labelling(path: Path, port: int, count: int = 60, make=two_replies, **options) -> None:
    """What a process of its own runs."""
    with listen("127.0.0.1", port) as listening:
        serve(page([labelling(path, prompts(count), make, **options).view()]), listening)
