"""Warnings, each with its remedy, for runs that teach nothing although their metrics look fine.

Margins grow and accuracies reach 1 as soon as the model tells the rejected completion from the chosen one, whatever its
replies are. Each check takes facts and returns a warning or None; `before_training` and `after_training` collect them.
"""

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence

from lightning.pytorch import Trainer

from dpo_lightning.callbacks.context import find_callback
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.data.columns import thumbs
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.data.prompt_format import read_prompt_format
from dpo_lightning.dpo.metrics import FIRST_FALL
from dpo_lightning.dpo.preference_loss import PreferenceLoss

CHECKED_PAIRS = 1000  # of the training data
RARE = 0.05  # a smaller share of the rows is an accident and no warning
SHORT_REST = 0.05  # a smaller share of a run is not worth stopping for
FEW_STEPS, ENOUGH_STEPS = 30, 60  # optimizer steps; 62 taught SQL at the founding recipe's learning rate of 1e-5
LEAST_BALANCE, MOST_BALANCE = 0.95, 1.4  # good to bad completions of kto, weighted: 1 to 4/3, and a little beyond
NO_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "YI", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")
AFTER_A_WORD = ",.:;!?)"  # punctuation that a blank follows


def before_training(trainer: Trainer) -> Iterator[str]:
    """Warnings about the training data and the length of the run.

    A model that an earlier run trained, as in `rounds`, knows such prompts and may need few steps.
    """
    trained = read_prompt_format(trainer.lightning_module.hparams.name_or_path)
    yield from about_data(trainer.datamodule, knows_plain_text=trained is not None and not trained.chat)
    by_epochs = trainer.max_steps < 0 and trainer.overfit_batches == 0 and trainer.limit_train_batches == 1.0
    balance = unbalanced(*thumbs(trainer.datamodule.datasets["train"]), trainer.lightning_module.loss)
    steps = too_few_steps(trainer.estimated_stepping_batches, trainer.max_epochs) if by_epochs and not trained else None
    yield from filter(None, [balance, steps])
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            yield f"nothing is trained, because trainer.{name} is 0: the model stays as it is"
            return


def about_data(data: PreferenceDataModule, knows_plain_text: bool = False) -> Iterator[str]:
    """Warnings about the training data."""
    pairs = data.pairs("train", range(min(CHECKED_PAIRS, len(data.datasets["train"]))))
    special_tokens = set(getattr(data.tokenizer, "get_added_vocab", dict)())
    chat_model = bool(data.tokenizer.chat_template) and not knows_plain_text
    yield from filter(
        None, [plain_for_a_chat_model(pairs, chat_model, special_tokens), joined(pairs), ends_in_blank(pairs)]
    )


def after_training(trainer: Trainer) -> Iterator[str]:
    """Warnings about the last replies."""
    replies = find_callback(trainer, RepliesCallback)
    if not replies or len(replies.showings) < 2 or not trainer.global_step:
        return
    before, after = replies.showings[0].texts, replies.showings[-1].texts
    wanted = [pair.chosen for pair in replies.pairs[: len(after)]]
    if warning := empty_replies(before, after, wanted):
        yield warning
    elif not 0 < trainer.max_steps < FEW_STEPS:  # otherwise the user asked for a short trial
        yield from filter(None, [same_replies(before, after, wanted)])


def too_few_steps(steps: float, epochs: int | None) -> str | None:
    """Checks that a run of `epochs` epochs, which are `steps` optimizer steps in all, is long enough."""
    if not 0 < steps < FEW_STEPS or not epochs or epochs < 0:
        return None
    enough = math.ceil(ENOUGH_STEPS * epochs / steps)
    return (
        f"the run has only {steps:.0f} optimizer steps, too few to change the replies (about {ENOUGH_STEPS} taught a "
        f"model of GPT-2's size SQL): set trainer.max_epochs: {enough}, or make batches smaller (data.batch_size or "
        "data.batch_tokens)"
    )


def plain_for_a_chat_model(pairs: Sequence[PreferencePair], has_template: bool, special_tokens: set[str]) -> str | None:
    """Checks that a model with a chat template is not trained on plain text.

    Prompts with a special token are conversations that were rendered already.
    """
    if not has_template or any(pair.chat for pair in pairs):
        return None
    if any(token in pair.prompt for pair in pairs for token in special_tokens):
        return None
    return (
        "the tokenizer has a chat template, so the model was probably taught to answer conversations, but the training "
        "data are plain text, which it may not answer at all: give the prompts as messages (data.format: messages, or "
        "lists of role and content as prompt, chosen, rejected), or train a base model"
    )


def joined(pairs: Sequence[PreferencePair]) -> str | None:
    """Checks for completions that follow a word or its punctuation without a blank."""
    share = _share(pairs, lambda pair: runs_together(pair.prompt, pair.chosen))
    return share and (
        f"the completions of {share} follow their prompt without a blank ('Answer:SELECT'), as in "
        "no text that the model was pretrained on: begin completions with a blank (of context, question, answer "
        'rows: data.completion_template: " {answer}"), or end prompts in a new line'
    )


def ends_in_blank(pairs: Sequence[PreferencePair]) -> str | None:
    """Checks for prompts that end in a blank, which tokenizers make part of the next word."""
    share = _share(pairs, lambda pair: pair.prompt.endswith((" ", "\t")))
    return share and (
        f"the prompts of {share} end in a blank, but in a model's tokens a blank belongs to the word after it, so that "
        "completions begin as in no text that the model was pretrained on: leave it out of the prompt and begin the "
        "completion with it (of context, question, answer rows: at the end of data.prompt_template, and "
        'data.completion_template: " {answer}")'
    )


def unbalanced(good: int, bad: int, loss: PreferenceLoss) -> str | None:
    """Checks that the weights of `kto` make up for different numbers of rows with a good and with a bad completion.

    Ethayarajh et al. 2024, eq. 8: the ratio of the weighted numbers should be between 1 and 4/3.
    """
    options = next((own for term, own in zip(loss.losses, loss.parameters, strict=True) if term.unpaired), None)
    if options is None or not good + bad:
        return None
    if not good or not bad:
        one, other = ("true", "false") if good else ("false", "true")
        return f"all {good + bad} labels are {one}, but kto learns from the contrast of both: add rows that are {other}"
    of_good, of_bad = options["desirable_weight"], options["undesirable_weight"]
    desirable, undesirable = good * of_good, bad * of_bad
    if undesirable and LEAST_BALANCE <= desirable / undesirable <= MOST_BALANCE:
        return None
    remedy = (
        f"desirable_weight: {(of_bad or 1) * bad / good:.3g}"
        if good < bad
        else f"undesirable_weight: {(of_good or 1) * good / bad:.3g}"
    )
    return (
        f"{good} labels are true and {bad} false, weighted {desirable:g} to {undesirable:g}, a ratio that for "
        f"kto should be between 1 and 4/3: set model.loss_options: {{{remedy}}}"
    )


def _share(pairs: Sequence[PreferencePair], condition: Callable[[PreferencePair], bool]) -> str | None:
    """How many of the plain-text pairs meet a condition, "48 of 96 rows (50%)"; None where their share is small.

    Conversations do not count: their chat template separates prompt and reply.
    """
    plain = [pair for pair in pairs if not pair.chat and pair.chosen]
    count = sum(map(condition, plain))
    rows = f"the first {len(plain):,} rows" if len(pairs) == CHECKED_PAIRS else f"{len(plain):,} rows"
    return f"{count:,} of {rows} ({count / len(plain):.0%})" if plain and count / len(plain) >= RARE else None


def runs_together(prompt: str, completion: str) -> bool:
    """Whether a blank is missing between two words, or punctuation and a word, in scripts that have blanks."""
    if not prompt or not completion or not _in_a_word(completion[0]):
        return False
    if prompt[-1] in AFTER_A_WORD:
        word = prompt.rstrip(AFTER_A_WORD)
        return bool(word) and (_in_a_word(word[-1]) or not word[-1].isalnum() and not word[-1].isspace())
    return _in_a_word(prompt[-1])


def _in_a_word(character: str) -> bool:
    return character.isalnum() and not unicodedata.name(character, "").startswith(NO_BLANKS)


def empty_replies(before: Sequence[str], after: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Checks that not all replies are empty after training, unless empty ones are wanted."""
    if not after or any(text.strip() for text in after) or not any(text.strip() for text in wanted):
        return None
    since = "though before they were not" if any(text.strip() for text in before) else "as it was before"
    return (
        f"after the training every reply that was checked is empty, {since}: the margin and the accuracy only "
        "say that a preferred completion is likelier than a rejected one, not that the model answers; "
        "train longer (trainer.max_epochs), raise model.learning_rate, set model.loss_type: [sigmoid, sft], and for an "
        "instruct model give the data as messages"
    )


def same_replies(before: Sequence[str], after: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Checks that training changed a reply, unless all were right from the beginning."""
    right = [text.strip() for text in after] == [text.strip() for text in wanted]
    if not after or list(before) != list(after) or right:
        return None
    return (
        "after the training every reply that was checked is the same as before, so nothing visible was learnt: train "
        "longer (trainer.max_epochs), raise model.learning_rate, or set model.loss_type: [sigmoid, sft]"
    )


def nothing_left(step: int, pull: float, loss: float, steps: float, stops: bool) -> str | None:
    """Says that the loss teaches no more, unless the run is almost over anyway.

    Args:
        step: optimizer steps that are done.
        pull: gradient weight of the loss as a share of that at the first step.
        loss: the training loss.
        steps: of the whole run; infinite if nothing limits it.
        stops: the run ends here.
    """
    rest = 1 - step / steps
    if rest <= 0 or rest < SHORT_REST and not stops:
        return None
    left = f"{rest:.0%} of the run is" if math.isfinite(steps) else "an endless run is"
    ends = "the run ends here (guards.stop_when_learned)" if stops else "stop here (guards.stop_when_learned: true)"
    return (
        f"step {step}: nothing is left to learn from these pairs: the loss is {loss:.2g}, its gradient {pull:.1%} of "
        f"that at the first step, and {left} left; {ends}; for better replies set model.loss_type: [sigmoid, sft], "
        "which goes on teaching the chosen completions, or give rejected ones that are harder to tell from them "
        "(data.rejected: shuffled or generated)"
    )


def first_token_displaced(step: int, share: float) -> str:
    """Says that chosen completions have become unlikely to begin as they should."""
    return (
        f"step {step}: the first token of the chosen completion has lost more than {FIRST_FALL:g} nat against the "
        f"reference in {share:.0%} of the pairs, although the margins grow: replies will begin otherwise, and what "
        "follows cannot repair that; set model.loss_type: [sigmoid, sft], or lower model.learning_rate "
        "(docs/troubleshooting.md)"
    )
