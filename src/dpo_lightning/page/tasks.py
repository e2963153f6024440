"""Prompt -> two replies to choose from (or one to judge), made ahead while people read."""

import difflib
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dpo_lightning.data.generated import draw_seed
from dpo_lightning.data.speakers import Sampling, Speaker
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import Score, verdicts
from dpo_lightning.models.reply import Reply
from dpo_lightning.page.prompts import Prompt
from dpo_lightning.page.work import Work

MORE = 4  # samples if the first two replies are the same
WORDS = 300  # of each reply that are compared


class Candidate(NamedTuple):
    """A reply to choose."""

    model: str
    text: str
    stopped: bool  # it ended by itself
    sample: int  # number of the draw
    verdicts: dict[str, Any]
    score: float | None


class Task(NamedTuple):
    """A prompt with its replies in the order in which they are shown, which is drawn at random."""

    name: str
    prompt: Prompt
    replies: Sequence[Candidate]
    disagreement: float = 0.0

    @property
    def key(self) -> str:
        """The prompt's."""
        return self.prompt.key


def disagreement(first: Candidate, second: Candidate) -> float:
    """How much two replies differ: by 1 if their scores do, and by the share of words that they do not share."""
    judged = first.score is not None and second.score is not None and first.score != second.score
    a, b = (reply.text.split()[:WORDS] for reply in (first, second))
    return judged + 1 - difflib.SequenceMatcher(a=a, b=b, autojunk=False).ratio()


class TaskMaker:
    """Makes tasks: the same for the same prompt, in every run with the same models and settings.

    Args:
        speakers: one model or two, with the names to record.
        pairs: two replies to each prompt, of the two models or two samples of the one; else one reply.
        seed: of the samples and the order.
        score: judges the replies; None: they are not judged.
        stopped: see `Speaker.replies`.
    """

    def __init__(
        self,
        speakers: Sequence[tuple[str, Speaker]],
        sampling: Sampling,
        seed: int,
        pairs: bool = True,
        score: Score | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.speakers, self.sampling, self.seed, self.pairs = speakers, sampling, seed, pairs
        self.score, self.stopped = score, stopped

    def __call__(self, prompt: Prompt) -> Task | None:
        """The task of a prompt; None if all replies are the same."""
        replies = self._draw(prompt, 0, range(2 if self.pairs and len(self.speakers) == 1 else 1))
        if self.pairs and len(self.speakers) == 2:
            replies += self._draw(prompt, 1, [1])
        if self.pairs and replies[0].text == replies[1].text:
            others = self._draw(prompt, -1, range(2, 2 + MORE)) if self.sampling.temperature else []
            different = [reply for reply in others if reply.text != replies[0].text]
            if not different:
                return None
            replies[1] = different[0]
        order = np.random.default_rng([self.seed, int(prompt.key, 16)]).permutation(len(replies))
        shown = [replies[position] for position in order]
        content = json.dumps([prompt.pair.prompt, [[reply.model, reply.text] for reply in shown]])
        name = f"{prompt.key}-{hashlib.blake2b(content.encode(), digest_size=10).hexdigest()}"
        return Task(name, prompt, shown, disagreement(*shown) if self.pairs else 0.0)

    def _draw(self, prompt: Prompt, speaker: int, samples: Sequence[int]) -> list[Candidate]:
        name, model = self.speakers[speaker]
        pair = prompt.pair
        seeds = [draw_seed(self.seed, sample, pair.prompt, pair.chosen) for sample in samples]
        replies = model.replies(pair.prompt, self.sampling, seeds, pair.chat, self.stopped)
        return [self._judged(name, reply, sample, prompt) for reply, sample in zip(replies, samples, strict=False)]

    def _judged(self, model: str, reply: Reply, sample: int, prompt: Prompt) -> Candidate:
        found = verdicts(self.score.judges, reply, prompt.pair) if self.score and not self.stopped() else {}
        score = self.score.read(found) if self.score and found else None
        return Candidate(model, reply.text, reply.stopped, sample, found, score)


class Tasks:
    """The tasks of a labelling, handed out to tabs of browsers: two tabs get different ones.

    Args:
        prompts: those that are still to be decided on, in the order in which their replies are made.
        make: see `TaskMaker`.
        ahead: tasks to have ready beside those that tabs have.
        most_different: hands out the one with the greatest disagreement, not the first.

    Attributes:
        same: prompts left out because all replies to them were the same.
        problem: why no replies can be made any more; "" as long as they can.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        make: Callable[[Prompt], Task | None],
        work: Work,
        ahead: int,
        most_different: bool = False,
    ) -> None:
        self.make, self.work, self.ahead, self.most_different = make, work, ahead, most_different
        self.same, self.problem = 0, ""
        self._prompts = {prompt.key: prompt for prompt in prompts}
        self._waiting = list(reversed(prompts))
        self._ready: dict[str, Task] = {}  # by the prompt's key
        self._held: dict[str, str] = {}  # tab -> key
        self._making = False
        self._lock = threading.RLock()
        self._refill()

    def take(self, tab: str) -> Task | None:
        """The task of a tab, the same one until it is decided; None if none is ready, or all are done (`left`).

        A tab that was closed keeps its task until there is no other: then another tab gets it.
        """
        with self._lock:
            if (key := self._held.get(tab)) in self._ready:
                return self._ready[key]
            self._refill()
            taken = set(self._held.values())
            free = [task for key, task in self._ready.items() if key not in taken]
            if not free and not self._waiting and not self._making:
                free = list(self._ready.values())[:1]
            if not free:
                return None
            task = max(free, key=lambda task: task.disagreement) if self.most_different else free[0]
            self._held[tab] = task.key
            self._refill()
            return task

    def find(self, name: str) -> Task | None:
        """The task of that name, made now if need be, as after a restart; None if its replies are others now."""
        key = name.partition("-")[0]
        with self._lock:
            task, prompt = self._ready.get(key), self._prompts.get(key)
        if task is None and prompt is not None:
            task = self.work.submit(lambda: self.make(prompt)).result()
        return task if task is not None and task.name == name else None

    def decided(self, key: str) -> None:
        """Takes a task out, for all tabs."""
        with self._lock:
            self._ready.pop(key, None)
            self._prompts.pop(key, None)
            self._held = {tab: held for tab, held in self._held.items() if held != key}
            self._refill()

    def bring_back(self, task: Task, tab: str) -> None:
        """Gives a tab a task whose click was taken back."""
        with self._lock:
            self._prompts[task.key] = task.prompt
            self._ready[task.key] = task
            self._held[tab] = task.key

    def left(self) -> int:
        """Prompts that are not decided on."""
        with self._lock:
            return len(self._prompts)

    def _refill(self) -> None:
        with self._lock:
            free = len(self._ready) - len(set(self._held.values()) & set(self._ready))
            if free >= self.ahead or self._making or self.problem:
                return
            while self._waiting and self._waiting[-1].key not in self._prompts:
                self._waiting.pop()  # decided on meanwhile
            if self._waiting:
                self._making = True
                self.work.submit(partial(self._one, self._waiting.pop()))

    def _one(self, prompt: Prompt) -> None:
        """Makes a task, in the thread of the models."""
        task, problem = None, ""
        try:
            task = self.make(prompt)
        except Exception as error:  # a judge that fails on all replies, or too little memory on the device
            problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if self.work.ending.is_set():
            return
        with self._lock:
            self._making, self.problem = False, problem
            if problem:
                return
            if task is None:
                self.same += 1
                self._prompts.pop(prompt.key, None)
            elif prompt.key in self._prompts:
                self._ready.setdefault(task.key, task)
            self._refill()
