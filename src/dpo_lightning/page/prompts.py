"""The prompts to label: rows of a data set, or lines of a text file -> prompts as the models were trained to see."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_lightning.data.cells import text
from dpo_lightning.data.chat import ChatTemplate
from dpo_lightning.data.formats import RowOptions, find_format, get_format, row_to_pair
from dpo_lightning.data.pair import BadCell, BadRow, PreferencePair
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.sources import open_source
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import local_path, reason_of
from dpo_lightning.visible import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompt(NamedTuple):
    """A prompt, and what people read of it."""

    question: str  # or all of the prompt, where the row has no question
    pair: PreferencePair  # its prompt is what the models see; what else the row has, judges see

    @property
    def key(self) -> str:
        """Tells it from other prompts, in every run."""
        content = json.dumps([self.question, self.pair.context])
        return hashlib.blake2b(content.encode(), digest_size=10).hexdigest()

    @property
    def rendered(self) -> bool:
        """Whether a template made the models' prompt of it."""
        return self.pair.chat or self.pair.prompt != self.question

    @property
    def context(self) -> str:
        """What people read beside the question, unless they read all of the prompt."""
        return self.pair.context if self.pair.prompt != self.question else ""


def read_prompts(
    name: str, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[Prompt], int]:
    """The different prompts of a data set, and how many rows repeat one of them.

    Questions, and with a chat template plain prompts as well, become prompts by the format.

    Args:
        name: of a file, folder or hub data set (`data.sources`), or of a .txt file with a question a line.

    Raises:
        UserError: it cannot be read, or a row has no prompt.
    """
    rows = _lines(name) if name.endswith(".txt") else _pairs(name, prompt_format, tokenizer)
    found: dict[str, Prompt] = {}
    count = 0
    for count, (row, pair) in enumerate(rows, 1):  # noqa: B007
        question, context = (row["question"], pair.context) if "question" in row else (pair.prompt, "")
        if pair.prompt == question and "question" in row or prompt_format.chat and not pair.chat:
            rendered = prompt_format.prompt(question, context, tokenizer)
            pair = pair._replace(prompt=rendered, chat=prompt_format.chat)
        prompt = Prompt(question, pair)
        found.setdefault(prompt.key, prompt)
    if not found:
        raise UserError(f"--prompts '{one_line(name)}' has no prompts")
    return list(found.values()), count - len(found)


def _pairs(
    name: str, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[dict[str, Any], PreferencePair]]:
    source = open_source(name, "predict")
    template = prompt_format.prompt_template or RowOptions().prompt_template
    options = RowOptions(prompt_template=template, chat=lambda: ChatTemplate(tokenizer))
    row_format = get_format(find_format(source.columns, source.name, completions=False))
    for number, row in source.rows():
        if isinstance(row, BadRow):
            raise row
        yield row, row_to_pair(row, row_format, options, source.location(number), completions=False)


def _lines(name: str) -> Iterable[tuple[dict[str, Any], PreferencePair]]:
    """The lines of a text file as questions; their prompts are made later."""
    try:
        lines = local_path(name).read_text(encoding="utf-8-sig").splitlines()
        questions = [text({"question": line.strip()}, "question") for line in lines if line.strip()]
    except (OSError, ValueError, BadCell) as error:
        raise UserError(f"--prompts '{one_line(name)}' cannot be read: {reason_of(error)}") from error
    return [({"question": question}, PreferencePair(question, "", "")) for question in questions]
