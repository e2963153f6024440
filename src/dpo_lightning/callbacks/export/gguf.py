"""A model as a GGUF file, compared with the Hugging Face folder that it was converted from.

The comparison is what shows a wrong prompt, a BOS too many, a stop token that does not stop, or weights in the wrong
order, of which none is an error while converting.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dpo_lightning.callbacks.export.modelfile import jinja_template
from dpo_lightning.data.batching import collate_prompts
from dpo_lightning.data.encoding import encode_prompts, load_tokenizer
from dpo_lightning.data.prompt_format import PromptFormat
from dpo_lightning.data.rendering import render_chats
from dpo_lightning.errors import UserError
from dpo_lightning.models.generate import generate, prompt_room
from dpo_lightning.models.hub import first_line
from dpo_lightning.models.llama_cpp import Engine
from dpo_lightning.models.policy import load_policy, position_count
from dpo_lightning.storage.progress import progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

USER = {"role": "user", "content": "How many singers are there?"}
SYSTEM = {"role": "system", "content": "CREATE TABLE singer (name VARCHAR, age INTEGER)"}
PROMPTS, LONGEST = 20, 64  # asked; tokens of a reply, at most
SPARE = 8  # tokens of context beyond a prompt and its reply


def prepare(folder: Path, prompt_format: PromptFormat) -> None:
    """Makes a Hugging Face folder of ours say all that llama.cpp's converter reads, and nothing that runs code."""
    tokenizer = load_tokenizer(str(folder))
    if (template := jinja_template(prompt_format)) is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    said = {"add_bos_token": adds_bos(tokenizer), "add_eos_token": False}
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        values.pop("auto_map", None)  # Python code
        if path.name == "tokenizer_config.json":
            values |= said
        elif "n_positions" in values:
            values["n_ctx"] = values["n_positions"]  # its older name, which the converter reads
        path.write_text(json.dumps(values), encoding="utf-8")


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompts begin with BOS, whatever the tokenizer's settings say."""
    (ids,) = encode_prompts(tokenizer, ["a"])
    return ids[:1] == [tokenizer.bos_token_id]


class Comparison(NamedTuple):
    """Greedy replies of a GGUF file beside those of the folder that it was made from.

    Attributes:
        prompts: that were asked.
        expected: the folder's replies.
        replies: the file's.
        same_tokens: for each prompt, whether both make the same token ids of it; None where transformers ran the file.
        by_tokens: the file's replies to the folder's token ids, where its own are others.
        templates: the prompts that the folder's template and the file's make of a conversation, where they differ.
    """

    prompts: list[str]
    expected: list[str]
    replies: list[str]
    same_tokens: list[bool] | None = None
    by_tokens: list[str] | None = None
    templates: tuple[str, str] | None = None


def compare(
    folder: Path, file: Path, prompts: Sequence[str], prompt_format: PromptFormat, limit: int, engine: bool
) -> Comparison:
    """Asks the folder's model and the file's the same prompts, in float32.

    Args:
        prompts: as in training; the first `PROMPTS` that leave room for a reply are asked.
        limit: tokens of a reply.
        engine: whether llama.cpp runs the file; else transformers does, with the folder's tokenizer.

    Raises:
        UserError: the file cannot be loaded.
    """
    model, tokenizer = load_policy(str(folder)), load_tokenizer(str(folder))
    limit = min(limit, LONGEST, (position_count(model.config) or LONGEST) // 2)
    room = prompt_room(model, limit)
    encoded = encode_prompts(tokenizer, prompts, None, [prompt_format.chat] * len(prompts))
    asked = [(text, ids) for text, ids in zip(prompts, encoded, strict=True) if 0 < len(ids) <= room][:PROMPTS]
    if not asked:
        raise UserError(f"the model's positions leave no room for a prompt and a reply of {limit} tokens")
    texts, tokens = [text for text, _ in asked], [ids for _, ids in asked]
    expected = greedy(model, tokenizer, tokens, limit)
    if not engine:
        return Comparison(texts, expected, greedy(load_gguf(file, model.config), tokenizer, tokens, limit))
    del model
    bos = tokenizer.bos_token if adds_bos(tokenizer) else ""
    given = [text.removeprefix(bos) if prompt_format.chat else text for text in texts]  # llama.cpp adds it, too
    with Engine(file, max(map(len, tokens)) + limit + SPARE) as llama:

        def answered(prompts: Sequence[str | list[int]]) -> list[str]:
            batches = progress([[prompt] for prompt in prompts], "Replies by llama.cpp", len(prompts), "replies")
            return [llama.reply(prompt, limit) for (prompt,) in batches]

        same = [llama.tokens(text) == ids for text, ids in zip(given, tokens, strict=True)]
        replies = answered(given)
        by_tokens = None if all(same) else answered(tokens)
        templates = _unlike(llama, tokenizer, prompt_format, bos)
    return Comparison(texts, expected, replies, same, by_tokens, templates)


def greedy(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[list[int]], limit: int
) -> list[str]:
    """Greedy replies to token ids, without special tokens."""
    batch = collate_prompts(prompts, range(len(prompts)))
    replies = generate(model, batch.input_ids, batch.attention_mask, tokenizer, limit)
    return [tokenizer.decode(reply.token_ids, skip_special_tokens=True) for reply in replies]


def load_gguf(file: Path, config: "PretrainedConfig") -> "PreTrainedModel":
    """A GGUF file's model, in float32, by transformers' own loader.

    Args:
        config: of the folder; what transformers makes of the file's lacks the positions of GPT-2.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, config=config, dtype="float32")
    except Exception as error:  # a damaged or unsupported file can fail in any way
        raise UserError(f"transformers cannot load the GGUF file: {first_line(error)}") from error


def _unlike(
    llama: Engine, tokenizer: "PreTrainedTokenizerBase", prompt_format: PromptFormat, bos: str
) -> tuple[str, str] | None:
    """The two prompts of the first conversation that the folder and the file render differently."""
    for messages in ([USER], [SYSTEM, USER]):
        if prompt_format.chat:
            try:
                (expected,) = render_chats(tokenizer, None, [(messages, True)])
            except ValueError:  # a template may refuse system messages
                continue
        else:
            context = SYSTEM["content"] if len(messages) == 2 else ""
            expected = prompt_format.prompt(USER["content"], context, tokenizer)
        if (found := llama.rendered(messages)).removeprefix(bos) != expected.removeprefix(bos):
            return expected, found
    return None
