"""PreferencePair -> EncodedPair(prompt_ids, chosen_ids, rejected_ids): tokens, EOS, truncation.

Prompt and completions are tokenized apart, so no token spans the boundary between them, and the prompt's tokens
are the same whatever follows. Every completion ends in EOS, which is trained like any other token: a model taught
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


MAX_LENGTH, SHORTEST = 1024, 8  # tokens of a pair: where none are given, and the fewest


class EncodedPair(NamedTuple):
    """Token ids of one pair. The two completions end in EOS and are never empty; the prompt has at least one token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    weight: float = 1.0  # what the pair's loss is multiplied by
    margin: float = 0.0  # what the loss demands beyond chosen over rejected


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
    """Checks what the pairs will need of a tokenizer.

    Raises:
        UserError: it has no EOS token, or a `model_max_length` that no prompt and completion fit into.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name}' has no EOS token, so replies could never be taught to end")
    length = tokenizer.model_max_length
    # Of a tokenizer that does not know it, 1e30.
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= SHORTEST or length % 1:
        raise UserError(
            f"tokenizer '{name}': its model_max_length (in tokenizer_config.json) is {str(length)[:60]!r}: it must be "
            f"a whole number of at least {SHORTEST}"
        )


def pair_length(asked: int | None, positions: int | None, hint: Callable[[], float]) -> int:
    """Tokens of a prompt and completion together: as asked for, or what tokenizer and model allow up to `MAX_LENGTH`.

    Args:
        positions: of the model; None where it does not number them.
        hint: the tokenizer's own number, which gives way to the user's; the model's positions do not.

    Raises:
        UserError: more was asked for than the model has positions, or it has too few for any pair.
    """
    most: float = positions or math.inf
    if most < (asked or SHORTEST):
        wanted = f"data.max_length is {asked}" if asked else f"a prompt and a completion need {SHORTEST} tokens"
        mend = f"lower it to {positions}" if asked and most >= SHORTEST else "take another model"
        raise UserError(f"{wanted}, but this model has {positions} positions: {mend}")
    if asked:
        return asked
    found = int(min(MAX_LENGTH, hint(), most))
    if found < MAX_LENGTH:
        rank_zero_info(f"data.max_length: {found} tokens, which is what the tokenizer and the model can take")
    return found


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[str],
    max_length: int | None = None,
    chat: Sequence[bool] | None = None,
) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's own BOS if it adds one, cut from the left to `max_length` tokens.

    A tokenizer that also appends EOS has it taken off again: the prompt is to be continued. A prompt that a chat
    template rendered (`chat`, one bool per prompt) brings its special tokens along and gets no others.
    """
    rendered = list(chat or [False] * len(prompts))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded: list[list[int]] = [[]] * len(prompts)
    for is_chat in set(rendered):
        places = [place for place, value in enumerate(rendered) if value == is_chat]
        texts = [prompts[place] for place in places]
        for place, ids in zip(places, _token_ids(tokenizer, texts, add_special_tokens=not is_chat), strict=True):
            ends_in_eos = not is_chat and len(ids) > 1 and ids[-1] == eos
            encoded[place] = ids[:-1] if ends_in_eos else ids
    return encoded if max_length is None else [cut_prompt(ids, max_length, bos) for ids in encoded]


def _token_ids(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in Python
        return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    # What calling the tokenizer does, without the offsets, masks and batch object that it makes: a fifth of the time.
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]


def cut_prompt(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt; a leading BOS keeps its place, since models are trained to see it."""
    if len(ids) <= length:
        return ids
    keeps_bos = length > 1 and bos_token_id is not None and ids[0] == bos_token_id
    return ids[:1] + ids[len(ids) - length + 1 :] if keeps_bos else ids[len(ids) - length :]


def encode_completions(tokenizer: "PreTrainedTokenizerBase", completions: Sequence[str]) -> list[list[int]]:
    """Token ids of completions, each ended by EOS. The empty text is EOS alone.

    SentencePiece tokenizers such as Llama 2's put a blank before what they take for the beginning of a text. A
    completion is no beginning: theirs are read behind a line break, whose tokens are taken off again.
    """
    eos = tokenizer.eos_token_id
    if not any(completions):
        return [[eos] for _ in completions]
    line_break, alone, behind = _token_ids(tokenizer, ["\n", "a", "\na"], add_special_tokens=False)
    encoded = _token_ids(tokenizer, completions, add_special_tokens=False)
    if line_break + alone != behind:  # a blank, or nothing to go by
        texts = [f"\n{completion}" for completion in completions]
        for place, ids in enumerate(_token_ids(tokenizer, texts, add_special_tokens=False)):
            if ids[: len(line_break)] == line_break:
                encoded[place] = ids[len(line_break) :]
    return [ids + [eos] for ids in encoded]


def encode_batch(columns: dict[str, list], tokenizer: "PreTrainedTokenizerBase", max_length: int) -> dict[str, list]:
    """Encodes columns `prompt`, `chosen`, `rejected` (text) and, if there, `chat`, `weight`, `margin`.

    Completions that a model generated have their ids already, without EOS: in `chosen_tokens`, `rejected_tokens`.

    A pair whose prompt and longer completion exceed `max_length` tokens loses tokens from the left of its prompt.
    Only a completion that leaves no room for a single prompt token is shortened, and it keeps its EOS.

    Returns:
        Columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ids), `weight` and `margin` (1 and 0 where
        `columns` has none), `length` (tokens of the pair's row in a shared-prefix batch), `prompt_cut` and
        `completion_cut` (whether something was cut).
    """
    eos = tokenizer.eos_token_id
    completions = [
        [[*ids, eos] for ids in columns[f"{side}_tokens"]]
        if f"{side}_tokens" in columns
        else encode_completions(tokenizer, columns[side])
        for side in ("chosen", "rejected")
    ]
    prompts = encode_prompts(tokenizer, columns["prompt"], chat=columns.get("chat"))
    out: dict[str, list] = {key: [] for key in (*EncodedPair._fields, "length", "prompt_cut", "completion_cut")}
    out["weight"] = [float(weight) for weight in columns.get("weight", [1.0] * len(prompts))]
    out["margin"] = [float(margin) for margin in columns.get("margin", [0.0] * len(prompts))]
    for prompt, chosen, rejected in zip(prompts, *completions, strict=True):
        longest = max(len(chosen), len(rejected))
        room = max_length - 1
        if longest > room:
            chosen, rejected = (ids if len(ids) <= room else ids[: room - 1] + [eos] for ids in (chosen, rejected))
        cut = cut_prompt(prompt, max_length - min(longest, room), tokenizer.bos_token_id)
        out["prompt_ids"].append(cut)
        out["chosen_ids"].append(chosen)
        out["rejected_ids"].append(rejected)
        out["length"].append(len(cut) + len(chosen) + len(rejected) - 2)
        out["prompt_cut"].append(len(cut) < len(prompt))
        out["completion_cut"].append(longest > room)
    return out


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A digest of everything in the tokenizer that decides the ids, equal across processes and loads."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, type(tokenizer).__name__)
    return hashlib.sha256(f"{state}{special}".encode()).hexdigest()
