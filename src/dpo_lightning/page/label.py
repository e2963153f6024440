"""The view Label: two replies, of which people choose the better one, or one that they find good or bad."""

import difflib
import functools
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

from dpo_lightning.data.cells import text as checked_text
from dpo_lightning.data.pair import BadCell, PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.quantities import marks
from dpo_lightning.page.clicks import Clicks, Record
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.tasks import Candidate, Task, Tasks
from dpo_lightning.page.view import View, shown

MOST_COMPARED = 300  # words and blanks of a reply that is compared with the other one
LONGEST_NAME = 100  # of tabs, clicks and tasks, which the browser makes up


class Labelling:
    """A labelling: its tasks, and what was clicked.

    Args:
        pairs: whether there are two replies to choose from.
        told: what every click records: sampling, seed, labeller.
        code: whether replies are code, and shown as such.
    """

    def __init__(self, tasks: Tasks, clicks: Clicks, pairs: bool, told: Mapping[str, Any], code: bool = False) -> None:
        self.tasks, self.clicks, self.pairs, self.told, self.code = tasks, clicks, pairs, dict(told), code

    def view(self) -> View:
        """The tab of the page."""
        return View("label", {"next": self.next, "click": self.click, "undo": self.undo})

    def next(self, tab: str) -> dict[str, Any]:
        """The state of the labelling, with the tab's task if one is ready.

        Args:
            tab: a name that the tab of the browser made up, which it keeps when the page is loaded again.
        """
        check_names(tab)
        task = self.tasks.take(tab)
        return {
            "task": task and asked(task),
            "pairs": self.pairs,
            "code": self.code,
            "left": self.tasks.left(),
            "same": self.tasks.same,
            "counts": self.clicks.counts,
            "problem": shown(self.tasks.problem),
            "labeller": shown(self.told["labeller"]),
            "output": shown(self.clicks.path.name),
        }

    def click(
        self,
        tab: str,
        click: str,
        task: str,
        choice: Literal["first", "second", "tie", "skip", "edit", "good", "bad"],
        edited: int | None = None,
        text: str = "",
    ) -> dict[str, Any]:
        """Keeps a click, and returns what `next` does.

        Args:
            click: a name that the page made up; a click that is sent twice counts once.
            edited: the reply of which `text` is the corrected version, 0 or 1.

        Returns:
            With "refused": "decided" if another tab has decided on the prompt, "changed" if the replies are not those
            that this run makes.
        """
        check_names(tab, click, task)
        found = self.tasks.find(task)
        key = task.partition("-")[0]
        if found is None:
            ours = key in self.clicks.decided and self.clicks.decided[key]["click"] == click  # sent once more
            refused = None if ours else "decided" if key in self.clicks.decided else "changed"
            return self.next(tab) | {"refused": refused}
        record = self._record(found, tab, click, choice, edited, text)
        kept = self.clicks.add(record)
        self.tasks.decided(found.key)
        return self.next(tab) | {"refused": None if kept else "decided"}

    def undo(self, tab: str, click: str) -> dict[str, Any]:
        """Takes this tab's latest click back, and returns its task as `next` does; "undone" says if there was one."""
        check_names(tab, click)
        record = self.clicks.undo(tab, click, labeller=self.told["labeller"], time=now())
        if record and record["key"] not in self.clicks.decided:
            self.tasks.bring_back(task_of(record), tab)
        return self.next(tab) | {"undone": record is not None}

    def _record(self, task: Task, tab: str, click: str, choice: str, edited: int | None, text: str) -> Record:
        allowed = ("first", "second", "tie", "skip", "edit") if self.pairs else ("good", "bad", "skip")
        if choice not in allowed or (choice == "edit") > (edited is not None):
            raise UserError(f"a click is one of {', '.join(allowed)}, and an edit has its text")
        if edited is not None:
            if choice not in ("edit", "good") or not 0 <= edited < len(task.replies):
                raise UserError("what is edited is one of the replies")
            text = corrected(task.replies[edited].text, text)
        pair = task.prompt.pair
        return {
            "click": click,
            "choice": choice,
            "edited": edited,
            "text": text if edited is not None else "",
            "key": task.key,
            "task": task.name,
            "question": task.prompt.question,
            "context": pair.context,
            "prompt": pair.prompt,
            "chat": pair.chat if task.prompt.rendered else None,
            "wanted": pair.chosen,
            "replies": [reply._asdict() for reply in task.replies],
            **self.told,
            "tab": tab,
            "time": now(),
        }


def check_names(*names: str) -> None:
    """Raises UserError for names that no page of ours makes up."""
    for name in names:
        if not 0 < len(name) <= LONGEST_NAME or not name.isascii() or not name.replace("-", "a").isalnum():
            raise UserError(f"a name is at most {LONGEST_NAME} letters, digits and -")


def corrected(reply: str, text: str) -> str:
    """A corrected reply with the blanks that the reply begins with, as in training.

    Raises:
        UserError: it is empty, not valid Unicode, too long, or the reply itself.
    """
    try:
        text = checked_text({"text": text.replace("\r\n", "\n")}, "text").strip()
    except BadCell as error:
        raise UserError(f"the corrected reply cannot be used: {error}") from error
    if not text:
        raise UserError("the corrected reply is empty")
    if text == reply.strip():
        raise UserError("the corrected reply is the reply itself")
    return reply[: len(reply) - len(reply.lstrip())] + text


def now() -> str:
    """The time, as in ISO 8601, in UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def asked(task: Task) -> dict[str, Any]:
    """A task as the page shows it: which model gave which reply is not told."""
    texts = [shown(reply.text.strip()) for reply in task.replies]
    return {
        "name": task.name,
        "question": shown(task.prompt.question),
        "context": shown(task.prompt.context),
        "replies": [
            {"text": text, "parts": parts, "stopped": reply.stopped, "marks": marks(judged(reply))}
            for reply, text, parts in zip(task.replies, texts, differing(*texts), strict=True)
        ],
    }


@functools.lru_cache(64)
def differing(*texts: str) -> list[list[tuple[str, bool]] | None]:
    """Two texts in parts, each with whether the other text lacks it; None for texts that have less than half in common,
    for a single one, and for long ones, where the comparison would take too long."""
    words = [re.findall(r"\w+|\s+|.", text[: 10 * MOST_COMPARED]) for text in texts]
    if len(texts) < 2 or max(map(len, words)) > MOST_COMPARED or max(map(len, texts)) > 10 * MOST_COMPARED:
        return [None] * len(texts)
    compared = difflib.SequenceMatcher(a=words[0], b=words[1], autojunk=False)
    if compared.ratio() < 0.5:
        return [None, None]
    blocks = compared.get_opcodes()
    sides = [(kind, i, j) for kind, i, j, _, _ in blocks], [(kind, i, j) for kind, _, _, i, j in blocks]
    return [
        [("".join(own[start:end]), kind != "equal") for kind, start, end in spans if start < end]
        for own, spans in zip(words, sides, strict=True)
    ]


def judged(reply: Candidate) -> dict[str, Any]:
    """The verdicts of the judges that the user named."""
    return {name: verdict for name, verdict in reply.verdicts.items() if not name.startswith("reply/")}


def task_of(record: Record) -> Task:
    """The task of a click."""
    pair = PreferencePair(record["prompt"], record["wanted"], "", record["context"], chat=record["chat"] is True)
    replies = [Candidate(**reply) for reply in record["replies"]]
    return Task(record["task"], Prompt(record["question"], pair), replies)
