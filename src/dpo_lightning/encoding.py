"""PreferencePair -> EncodedPair(prompt_ids, chosen_ids, rejected_ids): tokens, EOS, truncation.

Prompt and completions are tokenized apart, so no token spans the boundary between them, and the prompt's tokens
are the same whatever follows. Every completion ends in EOS, which is trained like any other token: a model taught
without it never stops.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedPair(NamedTuple):
    """Token ids of one pair. The two completions end in EOS and are never empty; the prompt has at least one token."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def load_tokenizer(name_or_path: str, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Loads a tokenizer from a local folder or the hub.

    Raises:
        UserError: it cannot be found or reached, or it has no EOS token.
    """
    from transformers import AutoTokenizer

    from dpo_lightning.hub import from_hub_or_folder

    tokenizer = from_hub_or_folder(
        "tokenizer", name_or_path, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code
    )
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer '{name_or_path}' has no EOS token, so replies could never be taught to end")
    return tokenizer


def encode_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's own BOS if it adds one, cut from the left to `max_length` tokens.

    A tokenizer that also appends EOS has it taken off again: the prompt is to be continued.
    """
    encoded = tokenizer(list(prompts), add_special_tokens=True, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    prompt_ids = []
    for ids in encoded:
        if len(ids) > 1 and ids[-1] == eos:
            ids = ids[:-1]
        prompt_ids.append(cut_prompt(ids, max_length, bos))
    return prompt_ids


def cut_prompt(ids: list[int], length: int, bos_token_id: int | None) -> list[int]:
    """The last `length` tokens of a prompt; a leading BOS keeps its place, since models are trained to see it."""
    if len(ids) <= length:
        return ids
    keeps_bos = length > 1 and bos_token_id is not None and ids[0] == bos_token_id
    return ids[:1] + ids[len(ids) - length + 1 :] if keeps_bos else ids[len(ids) - length :]


def encode_completions(tokenizer: "PreTrainedTokenizerBase", completions: Sequence[str]) -> list[list[int]]:
    """Token ids of completions, each ended by EOS. The empty text is EOS alone."""
    encoded = tokenizer(list(completions), add_special_tokens=False, verbose=False)["input_ids"]
    return [ids + [tokenizer.eos_token_id] for ids in encoded]


def encode_batch(
    columns: dict[str, list[str]], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> dict[str, list]:
    """Encodes columns `prompt`, `chosen`, `rejected` (text); made for `datasets.Dataset.map(batched=True)`.

    A pair whose prompt and longer completion exceed `max_length` tokens loses tokens from the left of its prompt.
    Only a completion that leaves no room for a single prompt token is shortened, and it keeps its EOS.

    Returns:
        Columns `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of ids), `length` (tokens of the pair's row in a
        shared-prefix batch), `prompt_cut` and `completion_cut` (whether something was cut).
    """
    eos = tokenizer.eos_token_id
    completions = [encode_completions(tokenizer, columns[side]) for side in ("chosen", "rejected")]
    prompts = encode_prompts(tokenizer, columns["prompt"], max_length=10**9)
    out: dict[str, list] = {key: [] for key in (*EncodedPair._fields, "length", "prompt_cut", "completion_cut")}
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
