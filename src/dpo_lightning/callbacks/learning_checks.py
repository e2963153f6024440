"""Facts about a run -> a warning and its remedy, where nothing will be learnt, or was, although the numbers look fine.

A margin grows and an accuracy reaches 1 as soon as the rejected completion is told from the chosen one, whatever the
replies are. Each function takes facts and gives a text or None; `before_training` and `after_training` collect them.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from lightning.pytorch import Trainer

from dpo_lightning.callbacks.context import find_callback
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.data.pair import PreferencePair

LOOKED_AT = 1000  # training pairs
FEW = 0.05  # share of rows that is an accident rather than a habit
FEW_STEPS, ENOUGH_STEPS = 30, 60  # optimizer steps; 62 taught SQL at the founding recipe's learning rate of 1e-5
NO_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")
AFTER_A_WORD = ",.:;!?)"  # punctuation that a blank follows


def before_training(trainer: Trainer) -> Iterator[str]:
    """What is to be said of the training data and the length of the run, before the first step."""
    data = trainer.datamodule
    pairs = data.pairs("train", range(min(LOOKED_AT, len(data.datasets["train"]))))
    tokenizer = data.tokenizer
    written_out = set(getattr(tokenizer, "get_added_vocab", dict)())
    by_epochs = trainer.max_steps < 0 and trainer.overfit_batches == 0 and trainer.limit_train_batches == 1.0
    warnings = [
        plain_for_a_chat_model(pairs, bool(tokenizer.chat_template), written_out),
        joined(pairs),
        ends_in_blank(pairs),
        too_few_steps(trainer.estimated_stepping_batches, trainer.max_epochs) if by_epochs else None,
        no_steps(trainer.max_steps, trainer.max_epochs, trainer.limit_train_batches),
    ]
    yield from filter(None, warnings)


def after_training(trainer: Trainer) -> Iterator[str]:
    """What is to be said of the replies after the last step."""
    replies = find_callback(trainer, RepliesCallback)
    if replies and len(replies.showings) > 1 and trainer.global_step:
        first, last = replies.showings[0], replies.showings[-1]
        wanted = [pair.chosen for pair in replies.pairs[: len(last.texts)]]
        warning = empty_replies(first.texts, last.texts, wanted)
        if not warning and not 0 < trainer.max_steps < FEW_STEPS:  # else so few steps are asked for as a trial
            warning = same_replies(first.texts, last.texts, wanted)
        if warning:
            yield warning


def no_steps(max_steps: int, max_epochs: int | None, limit: float) -> str | None:
    """A run that trains nothing, by its settings."""
    for name, value in {"max_steps": max_steps, "max_epochs": max_epochs, "limit_train_batches": limit}.items():
        if value == 0:
            return f"nothing is trained, because trainer.{name} is 0: the model stays as it is"
    return None


def too_few_steps(steps: float, epochs: int | None) -> str | None:
    """A run of too few optimizer steps to learn anything.

    Args:
        steps: of the whole run.
        epochs: that these are.
    """
    if not 0 < steps < FEW_STEPS or not epochs or epochs < 0:
        return None
    enough = math.ceil(ENOUGH_STEPS * epochs / steps)
    return (
        f"the run has only {steps:.0f} optimizer steps, too few to change the replies (about {ENOUGH_STEPS} taught a "
        f"model of GPT-2's size SQL): set trainer.max_epochs: {enough}, or make data.batch_size smaller"
    )


def plain_for_a_chat_model(pairs: Sequence[PreferencePair], has_template: bool, markers: set[str]) -> str | None:
    """Plain prompts for a model that was taught to answer in its chat template.

    Args:
        pairs: of the training data.
        has_template: the tokenizer has a chat template.
        markers: special tokens; a prompt with one of them is a rendered conversation already.
    """
    if not has_template or any(pair.chat for pair in pairs):
        return None
    if any(marker in pair.prompt for pair in pairs for marker in markers):
        return None
    return (
        "the tokenizer has a chat template, so the model was probably taught to answer conversations, but the training "
        "data are plain text, which it may not answer at all: give the prompts as messages (data.format: messages, or "
        "lists of role and content as prompt, chosen, rejected), or train a base model"
    )


def joined(pairs: Sequence[PreferencePair]) -> str | None:
    """Completions that begin without a blank, right after a word or its punctuation."""
    share = _share(pairs, lambda pair: runs_together(pair.prompt, pair.chosen))
    if share < FEW:
        return None
    return (
        f"the completions of {share:.0%} of the rows follow their prompt without a blank ('Answer:SELECT'), as in "
        "no text that the model was pretrained on: begin completions with a blank (of context, question, answer "
        'rows: data.completion_template: " {answer}"), or end prompts in a new line'
    )


def ends_in_blank(pairs: Sequence[PreferencePair]) -> str | None:
    """Prompts that end in a blank, which the tokenizer would have made part of the next word."""
    share = _share(pairs, lambda pair: pair.prompt.endswith((" ", "\t")))
    if share < FEW:
        return None
    return (
        f"the prompts of {share:.0%} of the rows end in a blank, but in a model's tokens a blank belongs to the word "
        "after it: leave it out of the prompt and begin the completion with it (of context, question, answer rows: "
        "data.prompt_template and data.completion_template)"
    )


def runs_together(prompt: str, completion: str) -> bool:
    """Whether two words, or punctuation and a word, lack the blank between them, in scripts that have blanks."""
    if not prompt or not completion or not _in_a_word(completion[0]):
        return False
    if prompt[-1] in AFTER_A_WORD:
        word = prompt.rstrip(AFTER_A_WORD)
        return bool(word) and (_in_a_word(word[-1]) or not word[-1].isalnum() and not word[-1].isspace())
    return _in_a_word(prompt[-1])


def _in_a_word(character: str) -> bool:
    return character.isalnum() and not unicodedata.name(character, "").startswith(NO_BLANKS)


def _share(pairs: Sequence[PreferencePair], is_so: Callable[[PreferencePair], bool]) -> float:
    """Of the pairs of plain text; a chat template parts prompt and reply itself."""
    plain = [pair for pair in pairs if not pair.chat and pair.chosen]
    return sum(map(is_so, plain)) / len(plain) if plain else 0.0


def empty_replies(before: Sequence[str], after: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Replies that are all empty after the training, though others were wanted."""
    if not after or any(text.strip() for text in after) or not any(text.strip() for text in wanted):
        return None
    since = "as it was before" if not any(text.strip() for text in before) else "though before they were not"
    return (
        f"after the training every reply that was looked at is empty, {since}: the margin and the accuracy "
        "only tell that a preferred completion is likelier than a rejected one, not that the model answers; "
        "train longer (trainer.max_epochs), raise model.learning_rate, set model.loss_type: [sigmoid, sft], and for an "
        "instruct model give the data as messages"
    )


def same_replies(before: Sequence[str], after: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Replies that the training did not change, though others were wanted."""
    right = [text.strip() for text in after] == [text.strip() for text in wanted]
    if not after or list(before) != list(after) or right:
        return None
    return (
        "after the training every reply that was looked at is the same as before: nothing that shows was learnt; train "
        "longer (trainer.max_epochs), raise model.learning_rate, or set model.loss_type: [sigmoid, sft]"
    )
