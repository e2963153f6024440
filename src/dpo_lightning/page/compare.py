"""The view Compare: two models' replies to held-out prompts, blind side by side, and how often each is the better.

Which reply stands on the left is drawn for each prompt and never leaves the server. A judge can compare the same
replies without a person. Each verdict is a line of JSON, of which the last one on a prompt counts: nothing is
overwritten, and a comparison that was interrupted goes on where it stopped.
"""

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import Score, VerdictMeans, verdicts
from dpo_lightning.judging.quantities import mean_text, quantity, results
from dpo_lightning.judging.win_rate import win_rate
from dpo_lightning.models.hub import reason_of
from dpo_lightning.models.reply import Reply
from dpo_lightning.page.label import differing
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.view import View, shown
from dpo_lightning.page.work import Work
from dpo_lightning.storage.digests import key_digest
from dpo_lightning.storage.jsonl import append_lines, could_be_half, keep_lines, read_lines
from dpo_lightning.visible import one_line

AHEAD = 3  # prompts whose replies are made while a person reads
PERSON, JUDGE = "person", "judge"
Replies = tuple[Reply, Reply]  # of model A and of model B


class Item(NamedTuple):
    """A prompt with its replies."""

    id: str  # others for the same prompt if the replies or their order are others
    prompt: Prompt
    replies: Replies
    left: Literal["a", "b"]
    texts: list[str]  # of the replies, the left one first


class Comparison:
    """Model A and model B on prompts. May be used from several threads.

    Args:
        names: of A and B.
        replies: both models' replies to a prompt; called as a job of `work`.
        file: of the verdicts; those of the same comparison that it has count.
        settings: what replies depend on, as plain JSON: verdicts in the file under others do not count.
        seed: of the order of the prompts, and of which reply is on the left.
        score: the judge, and what decides.
        most: prompts to compare; by default all.

    Raises:
        UserError: the file has other content than JSON lines.
    """

    def __init__(
        self,
        names: tuple[str, str],
        prompts: Sequence[Prompt],
        replies: Callable[[Prompt], Replies],
        file: Path,
        work: Work,
        settings: dict[str, Any],
        seed: int = 0,
        score: Score | None = None,
        most: int | None = None,
    ) -> None:
        self.names, self.file, self.score = names, file, score
        # In random order, so that the first ones are a fair sample too.
        self.prompts = random.Random(seed).sample(prompts, len(prompts))[:most]
        self._replies, self._work, self._seed = replies, work, seed
        self._key = key_digest(settings)[:12]
        self._made: dict[str, Future[Replies]] = {}
        self._lock = threading.RLock()
        self._lines: dict[str, dict[str, dict[str, Any]]] = {
            PERSON: {},
            JUDGE: {},
        }  # by the prompt's key: the last line
        self._read()

    def view(self) -> View:
        """The tab."""
        actions: dict[str, Any] = {"next": self.next, "answer": self.answer, "undo": self.undo, "state": self.state}
        return View("compare", actions | ({"judge": self.judge} if self.score else {}))

    # ------------------------------------------------------------------ a person's verdicts

    def next(self) -> dict[str, Any]:
        """The next prompt without a verdict and its replies, as `item`, with the `state`.

        Where both models gave the same reply, that is a tie about which nobody is asked: then `item` is None and `more`
        is true, and there is another call to make.
        """
        left = [prompt for prompt in self.prompts if not self._verdict(PERSON, prompt)]
        if not left:
            return {"item": None, "more": False, "state": self.state()}
        made = [self._replies_to(prompt) for prompt in left[: 1 + AHEAD]]
        replies = _result(made[0])
        if replies[0].text == replies[1].text:
            self._write(PERSON, left[0], replies, "tie", same=True)
            return {"item": None, "more": True, "state": self.state()}
        return {"item": _drawn(self._item(left[0], replies)), "more": True, "state": self.state()}

    def answer(self, id: str, better: Literal["left", "right", "tie"]) -> dict[str, Any]:
        """Writes a person's verdict on an item, and returns the `state`.

        Raises:
            UserError: the server was started anew with other models or settings since the item was shown.
        """
        prompt = next((each for each in self.prompts if each.key == id.partition("-")[0]), None)
        item = self._item(prompt, _result(self._replies_to(prompt))) if prompt else None
        if item is None or item.id != id:
            raise UserError("the replies are others now, since the server was started anew: please decide again")
        verdict = {"left": item.left, "right": "b" if item.left == "a" else "a", "tie": "tie"}[better]
        self._write(PERSON, item.prompt, item.replies, verdict, left=item.left)
        return self.state()

    def undo(self) -> dict[str, Any]:
        """Takes back the latest verdict of a person; what `next` returns follows with its prompt."""
        with self._lock:
            given = [line for line in self._lines[PERSON].values() if line["verdict"] and not line.get("same")]
            if given:
                last = given[-1]
                prompt = next(each for each in self.prompts if each.key == last["key"])
                self._append(PERSON, prompt, last | {"verdict": None, "time": _now()})
        return self.next()

    def state(self) -> dict[str, Any]:
        """The counts so far, with both models' names."""
        with self._lock:
            lines = {by: list(self._lines[by].values()) for by in (PERSON, JUDGE)}
        counts = {by: Counter(line["verdict"] for line in lines[by]) for by in lines}
        state: dict[str, Any] = {
            "names": [one_line(name) for name in self.names],
            "total": len(self.prompts),
            "person": _rate(counts[PERSON]) | {"same": sum(bool(line.get("same")) for line in lines[PERSON])},
            "file": one_line(str(self.file)),
        }
        if self.score:
            state["judge"] = _rate(counts[JUDGE]) | {
                "name": one_line(quantity(self.score.name).label),
                "unknown": counts[JUDGE][None],
                "means": _means(lines[JUDGE]),
            }
        return state

    # ------------------------------------------------------------------ the judge's

    def judge(self) -> Iterator[dict[str, Any]]:
        """Judges the replies to each prompt that the judge has not seen yet; yields the `state` after each."""
        assert self.score is not None
        yield self.state()
        for prompt in self.prompts:
            with self._lock:
                known = prompt.key in self._lines[JUDGE]
            if not known:
                replies = _result(self._replies_to(prompt))
                _result(self._work.submit(lambda asked=(prompt, replies): self._judge(*asked)))  # type: ignore[misc]
                yield self.state()

    def _judge(self, prompt: Prompt, replies: Replies) -> None:
        assert self.score is not None
        found = [verdicts(self.score.judges, reply, prompt.pair) for reply in replies]
        a, b = (self.score.read(each) for each in found)
        better = None
        if a is not None and b is not None:
            better = "tie" if abs(a - b) <= self.score.margin else "a" if a > b else "b"
        self._write(JUDGE, prompt, replies, better, judge=self.score.name, verdicts_a=found[0], verdicts_b=found[1])

    # ------------------------------------------------------------------ inside

    def _replies_to(self, prompt: Prompt) -> "Future[Replies]":
        with self._lock:
            made = self._made.get(prompt.key)
            if made is None or made.cancelled() or made.done() and made.exception():
                made = self._made[prompt.key] = self._work.submit(lambda: self._replies(prompt))
            return made

    def _item(self, prompt: Prompt, replies: Replies) -> Item:
        left: Literal["a", "b"] = "a" if random.Random(f"{self._seed} {prompt.key}").random() < 0.5 else "b"
        texts = [reply.text for reply in (replies if left == "a" else replies[::-1])]
        return Item(f"{prompt.key}-{key_digest([prompt.pair.prompt, texts])[:12]}", prompt, replies, left, texts)

    def _verdict(self, by: str, prompt: Prompt) -> str | None:
        with self._lock:
            return self._lines[by].get(prompt.key, {}).get("verdict")

    def _write(self, by: str, prompt: Prompt, replies: Replies, verdict: str | None, **more: Any) -> None:
        a, b = self.names
        line = {"key": prompt.key, "by": by, "verdict": verdict, **more, "comparison": self._key, "a": a, "b": b}
        line |= {"prompt": prompt.pair.prompt, "reply_a": replies[0].text, "reply_b": replies[1].text}
        self._append(by, prompt, line | {"time": _now()})

    def _append(self, by: str, prompt: Prompt, line: dict[str, Any]) -> None:
        with self._lock:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                append_lines(self.file, [line], to_disk=True)
            except OSError as error:
                raise UserError(f"not saved: '{self.file}' cannot be written: {reason_of(error)}") from error
            self._lines[by].pop(prompt.key, None)  # so that the order is that of the verdicts
            self._lines[by][prompt.key] = line

    def _read(self) -> None:
        """Takes up the verdicts in the file; the last line is dropped if a kill cut it short."""
        refusal = UserError(f"'{self.file}' is not a file of verdicts: choose another with --output")
        try:
            lines = read_lines(self.file)
            if lines.rest and not could_be_half(lines.rest, {"key": ""}):
                raise refusal
            if lines.rest:
                keep_lines(self.file, lines, len(lines.objects))
        except (ValueError, RecursionError) as error:
            raise refusal from error
        except OSError as error:
            raise UserError(f"'{self.file}' cannot be used for verdicts: {reason_of(error)}") from error
        keys = {prompt.key for prompt in self.prompts}
        for line in lines.objects:
            by, key = line.get("by"), line.get("key")
            if line.get("comparison") != self._key or by not in self._lines or key not in keys:
                continue
            if by == JUDGE and (self.score is None or line.get("judge") != self.score.name):
                continue
            self._lines[by].pop(str(key), None)
            self._lines[by][str(key)] = line


def _drawn(item: Item) -> dict[str, Any]:
    """An item as the page shows it: whose reply is on which side is not told."""
    texts = [shown(text.strip()) for text in item.texts]
    left, right = ({"text": text, "parts": parts} for text, parts in zip(texts, differing(*texts), strict=True))
    prompt = {"question": shown(item.prompt.question), "context": shown(item.prompt.context)}
    return {"id": item.id, **prompt, "left": left, "right": right}


def _rate(counts: Counter) -> dict[str, Any]:
    """Model A's win rate as JSON; its rate is None where there is none."""
    rate = win_rate(counts["a"], counts["b"], counts["tie"])
    return rate._asdict() | {"decided": rate.decided, "rate": rate.rate if math.isfinite(rate.rate) else None}


def _means(lines: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The means of the judge's verdicts: label, and their texts for A and B."""
    means = []
    for side in ("verdicts_a", "verdicts_b"):
        both = VerdictMeans()
        both.update(line[side] for line in lines)
        means.append(both.compute())
    a, b = means
    known = [name for name in results(a) if a[name] == a[name] and b.get(name) == b.get(name) is not None]
    return [(one_line(quantity(name).label), mean_text(name, a[name]), mean_text(name, b[name])) for name in known]


def _result(job: Future) -> Any:
    try:
        return job.result()
    except CancelledError as error:
        raise UserError("the server is ending") from error


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
