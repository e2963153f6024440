"""PreferencePair -> EncodedPair(prompt_ids, chosen_ids, rejected_ids): tokens, EOS, truncation.

Prompt and completions are tokenized separately, so no token spans the boundary between them, and the prompt's tokens
are the same whatever follows. Every completion ends in EOS, which is trained like any other token: a model trained
without it never stops.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MAX_LENGTH, SHORTEST = 1024, 8  # tokens of a prompt and completion together: the default, and the least that is allowed


class EncodedPair(NamedTuple):
    """Token ids of one pair. Both completions end in EOS; the prompt has at least one token.

    Of a row with one completion, the other one has no ids at all.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float = 1.0  # multiplies the pair's loss
    margin: float = 0.0  # by how much the loss wants chosen above rejected


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer from a local folder or the hub.

    Raises:
        UserError: it cannot be found or reached, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    from dpo_lightning.models.hub import from_hub_or_folder

    tokenizer = from_hub_or_folder(
        "tokenizer", name_or_path, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code
    )
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", name: str) -> None:
    """Raises UserError for a tokenizer without EOS, or with a `model_max_length` that is too short for any pair."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no EOS token, so that a model could not learn to end its replies")
    length = tokenizer.model_max_length
    # A tokenizer that does not know its length has 1e30.
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= SHORTEST or length % 1:
        raise UserError(
            f"tokenizer '{name}': its model_max_length (in tokenizer_config.json) is {str(length)[:60]!r}: it must be "
            f"a whole number of at least {SHORTEST}"
        )


def pair_length(setting: int | None, positions: int | None, hint: Callable[[], float]) -> int:
    """The limit on tokens of a prompt and completion together.

    Args:
        setting: the user's `data.max_length`; without it, what tokenizer and model allow, up to `MAX_LENGTH`.
        positions: that the model has; None if it has no limit.
        hint: the tokenizer's own limit, which the setting overrides.

    Raises:
        UserError: the setting is more than the model has positions, or it has too few for any pair.
    """
    most: float = positions or math.inf
    if most < (setting or SHORTEST):
        wanted = f"data.max_length is {setting}" if setting else f"a prompt and a completion need {SHORTEST} tokens"
        remedy = f"lower it to {positions}" if setting and most >= SHORTEST else "take another model"
        raise UserError(f"{wanted}, but this model has {positions} positions: {remedy}")
    if setting:
        return setting
    length = int(min(MAX_LENGTH, hint(), most))
    if length < MAX_LENGTH:
        rank_zero_info(f"data.max_length: {length} tokens, which is what the tokenizer and the model can take")
    return length


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_length: int | None = None,
    chat: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, with BOS if the tokenizer adds one, cut from the left to `max_length` tokens.

    An EOS that the tokenizer appends is removed, since the prompt is to be continued. A prompt that a chat template
    rendered (`chat`, a bool per prompt) has its special tokens already and gets no others.
    """
    rendered = list(chat or [False] * len(prompts))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded: list[list[int]] = [[]] * len(prompts)
    for is_chat in set(rendered):
        rows = [row for row, value in enumerate(rendered) if value == is_chat]
        texts = [prompts[row] for row in rows]
        for row, ids in zip(rows, _token_ids(tokenizer, texts, add_special_tokens=not is_chat), strict=True):
            ends_in_eos = not is_chat and len(ids) > 1 and ids[-1] == eos
            encoded[row] = ids[:-1] if ends_in_eos else ids
    return encoded if max_length is None else [cut_prompt(ids, max_length, bos) for ids in encoded]


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    # As calling the tokenizer, in a fifth of the time: without its offsets, masks and batch object.
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]


def cut_prompt(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt. A leading BOS is kept, since models are trained to see it."""
    if len(ids) <= length:
        return ids
    keeps_bos = length > 1 and bos_token_id is not None and ids[0] == bos_token_id
    return ids[:1] + ids[len(ids) - length + 1 :] if keeps_bos else ids[len(ids) - length :]


def encode_completions(tokenizer: "PreTrainedTokenizerBase", completions: Sequence[str]) -> list[list[int]]:
    """Token ids of completions, each ending in EOS. The empty text is EOS alone.

    SentencePiece tokenizers such as Llama 2's put a blank in front of a text. Since a completion continues one, they
    encode it after a line break, whose tokens are then removed.
    """
    eos = tokenizer.eos_token_id
    if not any(completions):
        return [[eos] for _ in completions]
    line_break, alone, after_break = _token_ids(tokenizer, ["\n", "a", "\na"], add_special_tokens=False)
    encoded = _token_ids(tokenizer, completions, add_special_tokens=False)
    if line_break + alone != after_break:  # "a" alone gets a blank
        texts = [f"\n{completion}" for completion in completions]
        for row, ids in enumerate(_token_ids(tokenizer, texts, add_special_tokens=False)):
            if ids[: len(line_break)] == line_break:
                encoded[row] = ids[len(line_break) :]
    return [ids + [eos] for ids in encoded]


def encode_batch(columns: dict[str, list], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> dict[str, list]:
    """Encodes the columns `prompt`, `chosen`, `rejected` (text) and, if there are any, `chat`, `weight`, `margin`.

    Where `label` is true there is only a chosen completion, where it is false only a rejected one.
    Completions that a model generated already have ids, without EOS, in `chosen_tokens` or `rejected_tokens`.

    If the prompt and the longer completion exceed `max_length` tokens, the prompt is cut from the left. A completion is
    cut only if it leaves no room for a single prompt token, and it keeps its EOS.

    Returns:
        The columns of EncodedPair (weight 1 and margin 0 by default), `length` (tokens of the pair's row in a
        shared-prefix batch), `prompt_cut` and `completion_cut` (whether something was cut).
    """
    eos = tokenizer.eos_token_id
    completions = [
        [[*ids, eos] for ids in columns[f"{side}_tokens"]]
        if f"{side}_tokens" in columns
        else encode_completions(tokenizer, columns[side])
        for side in ("chosen", "rejected")
    ]
    prompts = encode_prompts(tokenizer, columns["prompt"], chat=columns.get("chat"))
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "length", "prompt_cut", "completion_cut")
    rows = []
    labels = columns.get("label", [None] * len(prompts))
    for prompt, chosen, rejected, label in zip(prompts, *completions, labels, strict=True):
        if label is not None:  # there is one completion
            chosen, rejected = (chosen, []) if label else ([], rejected)
        longest = max(len(chosen), len(rejected))
        room = max_length - 1
        if longest > room:
            chosen, rejected = (ids if len(ids) <= room else ids[: room - 1] + [eos] for ids in (chosen, rejected))
        cut = cut_prompt(prompt, max_length - min(longest, room), tokenizer.bos_token_id)
        length = len(cut) + max(len(chosen) - 1, 0) + max(len(rejected) - 1, 0)
        rows.append((cut, chosen, rejected, length, len(cut) < len(prompt), longest > room))
    defaults = {"weight": [1.0] * len(rows), "margin": [0.0] * len(rows)}
    floats = {name: list(map(float, columns.get(name, default))) for name, default in defaults.items()}
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)) | floats


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of everything in a tokenizer that decides the ids, the same in every process."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__)
    return hashlib.sha256(f"{state}{special}".encode()).hexdigest()
