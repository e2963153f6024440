"""Replies of a model to prompts."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_lightning.models.policy import position_count, without_adapter
from dpo_lightning.models.reply import Reply
from dpo_lightning.models.sampling import Draws
from dpo_lightning.models.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

LEAVING = 0.25  # of a batch's rows that have finished are taken out of it


def prompt_room(model: "PreTrainedModel", max_new_tokens: int) -> int:
    """The longest prompt, in tokens, to which a reply of `max_new_tokens` fits into the model's positions."""
    return max(1, _positions(model) - max_new_tokens)


def _positions(model: "PreTrainedModel") -> int:
    return position_count(model.config) or 10**9


@torch.no_grad()
def generate(
    model: "PreTrainedModel",
    input_ids: Tensor,
    attention_mask: Tensor,
    tokenizer: "PreTrainedTokenizerBase",
    max_new_tokens: int,
    draws: Draws | None = None,
    samples: int = 1,
    **options: Any,
) -> list[Reply]:
    """Replies to a batch of prompts, with a KV cache: greedy, or sampled with `draws`.

    The model's own generation settings (sampling, penalties) are not used, so that replies show the model itself. A
    prompt is read once for all of its samples. Finished rows leave the batch, so that it does not wait for its longest
    reply. Models with another state than a KV cache, and sharded ones, do neither.

    Args:
        input_ids: prompts padded on the left, [B, T] int64, on the model's device; cut from the left to `prompt_room`.
        attention_mask: [B, T] int64, 0 at padding.
        draws: random numbers for B * samples rows.
        samples: replies to each prompt; they are returned prompt by prompt.
        options: more arguments of the model's `generate`, such as a streamer.
    """
    eos, room = tokenizer.eos_token_id, prompt_room(model, max_new_tokens)
    limit = min(max_new_tokens, _positions(model) - 1)
    own = model.generation_config
    # In train mode gradient checkpointing would switch the KV cache off.
    with evaluating(model), weights_cast_once(model):
        try:
            rows = _new_tokens(
                model, input_ids[:, -room:], attention_mask[:, -room:], eos, limit, draws, samples, options
            )
        finally:
            model.generation_config = own
    replies = []
    for ids in rows:
        stopped = eos in ids
        ids = ids[: ids.index(eos)] if stopped else ids
        replies.append(Reply(tokenizer.decode(ids, skip_special_tokens=False), ids, stopped))
    return replies


def _new_tokens(
    model: "PreTrainedModel",
    ids: Tensor,
    mask: Tensor,
    eos: int,
    limit: int,
    draws: Draws | None,
    samples: int,
    options: dict[str, Any],
) -> list[list[int]]:
    """The new tokens of each row; those after EOS mean nothing.

    Each time enough rows have finished, `generate` of transformers returns, and continues with the others and their
    part of the cache, which has the keys and values of all tokens but the last.
    """
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    cache, width = _selectable_cache(model), ids.shape[1]

    def extend(ids: Tensor, mask: Tensor, count: int, **options: Any) -> Tensor:
        config = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=eos, pad_token_id=eos)
        model.generation_config = config  # the model's own values would fill gaps in ours
        # Ranks with sharded weights take part in each other's steps until all have finished.
        options |= {"generation_config": config, "synced_gpus": is_sharded(model)}
        if getattr(model.config, "output_router_logits", False):
            options["output_router_logits"] = False  # for the router's loss, which fails with a cache and padding
        extended: Tensor = model.generate(input_ids=ids, attention_mask=mask, **options, **cache)
        return extended

    def enough_finished(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        finished = (input_ids[:, width:] == eos).any(1)
        return (finished.float().mean() >= LEAVING).expand(len(finished))

    if samples > 1:
        if cache and width > 1 and mask[:, -2].all():
            extend(ids[:, :-1], mask[:, :-1], 1)
            for state in cache.values():
                state.batch_repeat_interleave(samples)
        ids, mask = ids.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)
    criteria = [*options.pop("stopping_criteria", ()), *([enough_finished] if cache else [])]
    options["stopping_criteria"] = StoppingCriteriaList(criteria)
    options["logits_processor"] = LogitsProcessorList([draws] if draws else [])
    rows = torch.arange(len(ids), device=ids.device)
    replies: dict[int, list[int]] = {}
    while len(rows):
        ids = extend(ids, mask, width + limit - ids.shape[1], **options)
        finished = (ids[:, width:] == eos).any(1)
        if not cache or ids.shape[1] == width + limit or finished.float().mean() < LEAVING:
            finished[:] = True  # at the limit, or stopped from outside
        replies |= dict(zip(rows[finished].tolist(), ids[finished, width:].tolist(), strict=True))
        left = (~finished).nonzero()[:, 0]
        rows, ids = rows[left], ids[left]
        mask = F.pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)
        for state in cache.values():
            state.batch_select_indices(left)
        if draws:
            draws.keep(left)
    return [replies[row] for row in range(len(replies))]


def _selectable_cache(model: "PreTrainedModel") -> "dict[str, Cache]":
    """An empty KV cache as an argument of the model; none where its rows cannot be repeated and selected.

    These are models with a recurrent state, and sharded ones, whose ranks have to make the same steps.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    arguments = inspect.signature(without_adapter(model).forward).parameters
    name = "cache" if "cache" in arguments else "past_key_values"  # transformers 5.24 renamed it
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return {name: cache} if plain and name in arguments and not is_sharded(model) else {}


@contextmanager
def weights_cast_once(model: "PreTrainedModel") -> Iterator[None]:
    """Under autocast, casts each weight once in the block instead of for each new token. Needs `no_grad`.

    Lightning's autocast keeps no cast weights, and PyTorch's keeps only those that train. A sharded model's weights are
    cast each time, since its gathered weights are not to stay in memory.
    """
    device = model.device.type
    if not torch.is_autocast_enabled(device) or is_sharded(model):
        yield
        return
    frozen = [p for p in model.parameters() if p.dtype == torch.float32 and not p.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad = True
        # Nothing is kept in inference mode, in which Lightning predicts and tests.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=True),
        ):
            yield
    finally:
        for weight in frozen:
            weight.requires_grad = False
        torch.clear_autocast_cache()  # an inner autocast does not clear it at its end


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode during the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
