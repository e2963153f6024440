"""Greedy replies of a model to prompts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpo_lightning.models.policy import position_count
from dpo_lightning.models.reply import Reply
from dpo_lightning.models.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase


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
    processors: "Sequence[LogitsProcessor]" = (),
    **options: Any,
) -> list[Reply]:
    """Greedy replies to a batch of prompts, with a KV cache.

    The model's own generation settings (sampling, penalties) are not used, so that replies show the model itself.

    Args:
        input_ids: prompts padded on the left, [B, T] int64, on the model's device; cut from the left to `prompt_room`.
        attention_mask: [B, T] int64, 0 at padding.
        processors: applied to each new token's logits.
        options: more arguments of the model's `generate`, such as a streamer.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    eos, room = tokenizer.eos_token_id, prompt_room(model, max_new_tokens)
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, _positions(model) - 1), do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    # In train mode gradient checkpointing would switch the KV cache off.
    with evaluating(model), weights_cast_once(model):
        own, model.generation_config = model.generation_config, config  # its values would fill gaps in ours
        try:
            output = model.generate(
                input_ids=input_ids[:, -room:],
                attention_mask=attention_mask[:, -room:],
                generation_config=config,
                logits_processor=LogitsProcessorList(processors),
                **options,
            )
        finally:
            model.generation_config = own
    replies = []
    for ids in output[:, input_ids[:, -room:].shape[1] :].tolist():
        stopped = eos in ids
        ids = ids[: ids.index(eos)] if stopped else ids
        replies.append(Reply(tokenizer.decode(ids, skip_special_tokens=False), ids, stopped))
    return replies


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
