"""The view Chat: a question, answered by the reference and the policy side by side."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Annotated, Any

from dpo_lightning.data.cells import MAX_CELL
from dpo_lightning.data.encoding import encode_prompts
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.speakers import Sampling, Speaker, side_by_side
from dpo_lightning.models.generate import prompt_room
from dpo_lightning.page.view import View, shown
from dpo_lightning.page.work import Work
from dpo_lightning.parsing import NotNegative, PositiveShare, Range, Seed

LONGEST_REPLY = 100_000  # tokens
Length = Annotated[int, Range(f"from 1 to {LONGEST_REPLY}", lambda tokens: 1 <= tokens <= LONGEST_REPLY)]
Text = Annotated[str, Range(f"at most {MAX_CELL:,} characters", lambda text: len(text) <= MAX_CELL)]


class Talk:
    """Questions to some speakers, each on its own, as prompts of the training's format.

    Args:
        sampling: which the page begins with.
    """

    def __init__(
        self, speakers: Sequence[Speaker], prompt_format: PromptFormat, work: Work, sampling: Sampling
    ) -> None:
        self.speakers, self.prompt_format, self.work, self.sampling = speakers, prompt_format, work, sampling

    def view(self) -> View:
        """The tab."""
        return View("chat", {"about": self.about, "ask": self.ask})

    def about(self) -> dict[str, Any]:
        """Who answers, what the page has to ask for, and the sampling to begin with."""
        names = [speaker.name for speaker in self.speakers]
        sampling = {**self.sampling._asdict(), "seed": 0}
        return {"names": names, "schema": self.prompt_format.uses_schema, "sampling": sampling, "longest": MAX_CELL}

    def ask(
        self,
        question: Text,
        schema: Text = "",
        temperature: NotNegative = 0.0,
        top_p: PositiveShare = 1.0,
        max_new_tokens: Length = 64,
        seed: Seed = 0,
    ) -> Iterator[dict[str, Any]]:
        """The prompt and how many of its first tokens are cut, then pieces of replies: {"name": ..., "text": ...}."""
        prompt = self.prompt_format.prompt(question, schema, self.speakers[-1].tokenizer)
        sampling = Sampling(temperature, top_p, max_new_tokens)
        speakers, chat = self.speakers, self.prompt_format.chat
        (ids,) = encode_prompts(speakers[-1].tokenizer, [prompt], chat=[chat])
        room = min(prompt_room(speaker.model, max_new_tokens) for speaker in speakers)
        yield {"prompt": shown(prompt), "cut": max(0, len(ids) - room)}
        with closing(self.work.stream(lambda: side_by_side(speakers, prompt, sampling, seed, chat))) as pieces:
            for name, text in pieces:
                yield {"name": name, "text": shown(text)}
