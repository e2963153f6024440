"""What in the training data would teach something else than was meant: the checks of `inspect`, before any training.

A check is a function of `Examined` in `CHECKS`. It returns what was found and what to do about it, or None. Checks that
read texts or tokens do so in a sample of the rows.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch

from dpo_lightning.callbacks.learning_checks import about_data, unbalanced
from dpo_lightning.data.columns import distinct, id_counts, id_lists, numeric_column, text_keys, thumbs
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.near_duplicates import near_duplicates
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.dpo.losses import Loss
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.errors import UserError
from dpo_lightning.visible import one_line

SAMPLE = 5_000  # pairs whose texts and tokens are read
MOST_TOKENS = 5_000_000  # of the pairs that are searched for near-duplicates
COMMON, FEW = 0.05, 0.01  # shares of the pairs that are worth a line, for what is no error and for what is one
LONGER, TIMES, FEWEST = 0.65, 1.2, 20  # chosen is longer in so many of the pairs, and so much; in fewer it is chance
ALIKE, MANY_ALIKE = 0.8, 0.2  # tokens of two completions in common, and pairs like that
AGAINST_DISPLACEMENT = {"dpop", "sft", "nca_pair", "cpo", "orpo"}  # losses that hold the chosen log-probs up
PER_TOKEN = {"ipo", "sigmoid_norm"}  # besides those that `Loss.per_token` marks
# What chat templates mark turns and texts with.
MARKS = re.compile(r"<\|[a-z_]{2,24}\|>|<｜[^｜<>\s]{2,24}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|</s>")
SIDES = ("prompt", "chosen", "rejected")
ABOUT_DATA = 3  # checks of `about_data`


class Finding(NamedTuple):
    """What was found in the data, and what to do about it."""

    what: str
    remedy: str


class Examined(NamedTuple):
    """The training data, and a sample of them."""

    data: PreferenceDataModule
    loss: PreferenceLoss
    positions: np.ndarray  # of all pairs, each once
    keys: dict[str, np.ndarray]  # a hash of each text of all pairs, for each of prompt, chosen and rejected
    lengths: dict[str, np.ndarray]  # their tokens
    pairs: list[PreferencePair]  # the sample's texts
    ids: dict[str, list[np.ndarray]]  # the sample's tokens

    def of(self, found: Sequence[bool] | np.ndarray, what: str = "training pairs") -> str:
        """The number and the share of true values: "412 of 5,000 training pairs (8.2%)"."""
        return f"{np.sum(found):,} of {len(found):,} {what} ({np.mean(found):.1%})"


def examine(data: PreferenceDataModule, loss: PreferenceLoss) -> Iterator[str]:
    """A line on how many checks there were, and two for each finding.

    Args:
        data: set up for "fit".
        loss: of the run.
    """
    train = data.datasets["train"]
    positions = distinct(train)
    sample = _some(positions, SAMPLE)
    lengths = {side: id_counts(train, f"{side}_ids")[positions] for side in SIDES}
    keys = {side: text_keys(train, side)[positions] for side in SIDES}
    ids = {side: id_lists(train, f"{side}_ids", sample) for side in SIDES}
    examined = Examined(data, loss, positions, keys, lengths, data.pairs("train", sample.tolist()), ids)
    found = [_finding(line) for line in about_data(data)]
    found += filter(None, (check(examined) for check in CHECKS))
    notes = [f"texts and tokens in a sample of {SAMPLE:,} pairs"] if len(sample) < len(positions) else []
    if not find_spec("rensa"):
        notes.append("near-duplicates only after pip install rensa")
    elif len(searched := _affordable(examined)) < len(positions):
        notes.append(f"near-duplicates among {len(searched):,} of {len(positions):,}")
    note = f" ({'; '.join(notes)})" if notes else ""
    yield f"{len(found) or 'nothing'} found in {len(CHECKS) + ABOUT_DATA} checks of the data{note}"
    for what, remedy in found:
        yield one_line(f"  warning: {what}")
        yield one_line(f"    to do: {remedy}")


def _finding(warning: str) -> Finding:
    """A warning or an error of a run, whose remedy follows the first colon or semicolon."""
    what, *remedy = re.split("[:;] ", warning, maxsplit=1)
    return Finding(what, "".join(remedy) or "see docs/data.md")


def _some(positions: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the positions, the same every time."""
    if len(positions) <= most:
        return positions
    return np.sort(np.random.default_rng(0).choice(positions, most, replace=False))


# ---------------------------------------------------------------------- loss and lengths


def loss_that_does_not_fit(examined: Examined) -> Finding | None:
    """Rows, weights or margins that `fit` will refuse, or that the loss makes little of."""
    data, loss = examined.data, examined.loss
    good, bad = thumbs(data.datasets["train"])
    for name, pairs in data.datasets.items():
        try:
            if any(thumbs(pairs)):
                loss.check_unpaired(name)
            loss.check_columns(*(torch.tensor(numeric_column(pairs, column)) for column in ("weight", "margin")))
        except UserError as error:
            return _finding(f"fit will refuse this, since {error}")
    if loss.needs_kl and not good + bad:
        return Finding(
            "model.loss_type kto is for rows with one completion and a label: of these pairs it judges each one alone",
            "model.loss_type: sigmoid compares the two",
        )
    balance = unbalanced(good, bad, loss)
    return _finding(balance) if balance else None


def length_bias(examined: Examined) -> Finding | None:
    """Chosen completions that are nearly always longer, or shorter, than the rejected ones.

    Preferences like that teach length (Singhal et al. 2023, arXiv 2310.03716; Park et al. 2024, arXiv 2403.19159).
    """
    chosen, rejected = (examined.lengths[side] for side in ("chosen", "rejected"))
    both = (chosen > 0) & (rejected > 1)  # an empty rejected completion is EOS alone, and meant
    loss = examined.loss
    if both.sum() < FEWEST or loss.ld_alpha is not None or any(_per_token(term) for term in loss.losses):
        return None
    ratio = float(np.median(chosen[both] / rejected[both]))
    for word, cases, times, other in (
        ("longer", chosen > rejected, ratio, "long"),
        ("shorter", chosen < rejected, 1 / ratio, "short"),
    ):
        if cases[both].mean() >= LONGER and times >= TIMES:
            medians = " against ".join(f"{np.median(side[both]):.0f}" for side in (chosen, rejected))
            return Finding(
                f"chosen is {word} than rejected in {examined.of(cases[both])}, in the median {medians} tokens, so the "
                f"model may learn {other} replies instead of better ones (Park et al. 2024, arXiv 2403.19159)",
                "model.loss_options: {ld_alpha: 0.5} or model.loss_type: sigmoid_norm, or pairs of more equal lengths",
            )
    return None


def _per_token(term: Loss) -> bool:
    return term.per_token or term.name in PER_TOKEN


def displacement(examined: Examined) -> Finding | None:
    """Completions with nearly the same tokens: what pushes one down pushes the other down with it.

    Pal et al. 2024 (arXiv 2402.13228) for pairs with a small edit distance; Razin et al. 2024 (arXiv 2410.08847), whose
    better measure of similarity (CHES) needs the model.
    """
    if AGAINST_DISPLACEMENT & {term.name for term in examined.loss.losses}:
        return None
    sides = zip(examined.ids["chosen"], examined.ids["rejected"], strict=True)
    shares = np.array([_in_common(chosen, rejected) for chosen, rejected in sides if len(chosen) and len(rejected) > 1])
    if not len(shares) or (alike := shares >= ALIKE).mean() < MANY_ALIKE:
        return None
    return Finding(
        f"chosen and rejected share at least {ALIKE:.0%} of their tokens in {examined.of(alike)}, so the likelihood of "
        "chosen may fall together with that of rejected (Pal et al. 2024, arXiv 2402.13228; Razin et al. 2024, "
        "arXiv 2410.08847)",
        "model.loss_type: dpop or [sigmoid, sft]; the report shows how many pairs are displaced",
    )


def _in_common(one: np.ndarray, other: np.ndarray) -> float:
    """The share of tokens of two completions, EOS left out, that both have, each as often as it occurs."""
    common = (Counter(one[:-1].tolist()) & Counter(other[:-1].tolist())).total()
    return 2 * common / max(1, len(one) + len(other) - 2)


# ---------------------------------------------------------------------- special tokens


def foreign_marks(examined: Examined) -> Finding | None:
    """Marks of a chat template, such as <|im_start|>, that are no tokens of this tokenizer and not in its template."""
    tokenizer = examined.data.tokenizer
    known = set(getattr(tokenizer, "get_added_vocab", dict)()) | set(MARKS.findall(str(tokenizer.chat_template)))
    marks = [{*MARKS.findall("\n".join(pair[:3]))} - known for pair in examined.pairs]
    found = np.array([bool(row) for row in marks])
    if found.mean() < FEW:
        return None
    names = ", ".join(name for name, _ in Counter(name for row in marks for name in row).most_common(3))
    chat = any(pair.chat for pair in examined.pairs)
    return Finding(
        f"{names} in the texts of {examined.of(found)}: to this tokenizer these are several ordinary tokens",
        "set data.chat_template to a template with the model's own marks"
        if chat
        else "give the rows as messages, which the model's own chat template renders, or take the marks out",
    )


def eos_in_completions(examined: Examined) -> Finding | None:
    """Plain completions that contain the end token, which is added to each: what follows it is never generated."""
    eos = examined.data.tokenizer.eos_token_id
    found = np.array(
        [
            not pair.chat and any((ids[:-1] == eos).any() for ids in sides)
            for pair, *sides in zip(examined.pairs, examined.ids["chosen"], examined.ids["rejected"], strict=True)
        ]
    )
    if not found.any():
        return None
    return Finding(
        f"a completion contains the end token {examined.data.tokenizer.eos_token} itself in {examined.of(found)}, but "
        "replies stop at the first one",
        "remove it from the texts: one is added to every completion",
    )


def doubled_bos(examined: Examined) -> Finding | None:
    """Plain prompts that begin with BOS although the tokenizer puts one in front."""
    bos = examined.data.tokenizer.bos_token_id
    found = np.array([len(ids) > 1 and ids[0] == ids[1] == bos for ids in examined.ids["prompt"]])
    if not found.any():
        return None
    token = examined.data.tokenizer.bos_token
    return Finding(f"the prompts of {examined.of(found)} begin with two {token}", "remove it: the tokenizer adds one")


# ---------------------------------------------------------------------- pairs that repeat or contradict others


def contradictions(examined: Examined) -> Finding | None:
    """Pairs that another one contradicts: the same prompt, and chosen and rejected the other way around."""
    prompt, chosen, rejected = (examined.keys[side] for side in SIDES)
    pairs, swapped = (np.stack(columns).T for columns in ((prompt, chosen, rejected), (prompt, rejected, chosen)))
    found = np.isin(_one_key(pairs), _one_key(swapped)) & (chosen != rejected)
    if not found.any():
        return None
    first = examined.data.locations("train", examined.positions[np.flatnonzero(found)[:1]].tolist())[0]
    return Finding(
        f"{examined.of(found)} contradict another one, with the same prompt and the completions the other way around "
        f"(the first: {first})",
        "decide for one of the two, or leave both out",
    )


def _one_key(keys: np.ndarray) -> np.ndarray:
    """Hashes [n, 3] -> a hash of each row, [n]."""
    return (keys * np.array([1, 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)).sum(1, dtype=np.uint64)


def repeated_in_training(examined: Examined) -> Finding | None:
    """Rows that are in the training data more than once, or nearly."""
    train = examined.data.datasets["train"]
    keys = _one_key(np.stack([examined.keys[side] for side in SIDES]).T)
    exact = len(keys) - len(np.unique(keys))
    near = np.zeros(1, bool)
    if find_spec("rensa"):
        rows = _affordable(examined)
        parts = [id_lists(train, f"{side}_ids", rows) for side in SIDES]
        # Rankings share a prompt, so the completions must be alike as well.
        completions = [np.concatenate(part) for part in zip(*parts[1:], strict=True)]
        texts = [np.concatenate(part) for part in zip(*parts, strict=True)]
        near = near_duplicates(completions)[0] & near_duplicates(texts)[0]
    if exact / len(keys) < FEW and near.mean() < COMMON:
        return None
    also = f" and {near.mean():.1%} nearly" if near.mean() >= COMMON else ""
    return Finding(
        f"{exact:,} of {len(keys):,} training pairs repeat another one exactly{also}, so that they count for more than "
        "others and are learnt by heart",
        "leave them out (data.on_bad_row: skip does it for exact ones), or train for fewer epochs",
    )


def held_out_in_training(examined: Examined) -> Finding | None:
    """Held-out prompts that are training prompts, or nearly: results on them do not tell what was learnt."""
    data, train = examined.data, examined.data.datasets["train"]
    lines = []
    for name, pairs in data.datasets.items():
        if name == "train":
            continue
        found = np.isin(text_keys(pairs, "prompt"), examined.keys["prompt"])
        words, example = "are training prompts", ""
        if find_spec("rensa") and len(pairs) >= FEWEST:
            rows = _affordable(examined)
            asked = id_lists(pairs, "prompt_ids", np.arange(len(pairs)))
            _, matches = near_duplicates(id_lists(train, "prompt_ids", rows), asked)
            words += " or nearly one"
            found[list(matches)] = True
            if matches:
                position, match = next(iter(matches.items()))
                (here,), (there,) = data.locations(name, [position]), data.locations("train", [int(rows[match])])
                example = f" (the first: {here}, and {there})"
        if found.mean() >= FEW:
            lines.append(f"{examined.of(found, f'{name} prompts')} {words}{example}")
    if not lines:
        return None
    return Finding(
        "; ".join(lines) + ", so that results on them do not tell what was learnt",
        "leave them out of one of the two, or let data.val_size and data.test_size split rows off by context or prompt",
    )


def _affordable(examined: Examined) -> np.ndarray:
    """Positions of pairs to search for near-duplicates: all, or a sample with about `MOST_TOKENS` tokens."""
    tokens = sum(lengths.mean() for lengths in examined.lengths.values())
    return _some(examined.positions, int(MOST_TOKENS / tokens))


CHECKS: tuple[Callable[[Examined], Finding | None], ...] = (
    loss_that_does_not_fit,
    length_bias,
    displacement,
    foreign_marks,
    eos_in_completions,
    doubled_bos,
    contradictions,
    repeated_in_training,
    held_out_in_training,
)
