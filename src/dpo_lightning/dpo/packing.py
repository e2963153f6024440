"""Attention over a row of packed pairs (`to_packed`): sequences of variable length, without a mask.

Each pair is two causal sequences: the prompt with the chosen part, and the rejected part, whose keys are the prompt's
and its own. `attend_packed` is an attention implementation for transformers. The model's forward pass hands it the
batch's `Plan` as the argument `plan`; without one, as in generation, it is ordinary scaled dot-product attention.
"""

import inspect
from collections.abc import Callable
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_lightning.data.batching import PairBatch, consecutive
from dpo_lightning.dpo.block_attention import PairRows, attend_in_blocks
from dpo_lightning.internals.transformers import attention_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED = "packed_pairs"


class Sequences:
    """n sequences of a packed row. The queries of sequence i are the last `queries[i]` of its `keys[i]` tokens.

    Args:
        queries, keys: [n] numbers of tokens.
        key_index: [sum of keys] int64, the position of each key in the row; None if queries and keys are the same.
    """

    def __init__(self, queries: np.ndarray, keys: np.ndarray, key_index: np.ndarray | None, device: torch.device):
        self.queries, self.keys, self.device = queries, keys, device
        self.max_queries, self.max_keys = int(queries.max()), int(keys.max())
        self.key_index = None if key_index is None else self._on_device(key_index)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, non_blocking=True)

    @cached_property
    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Cumulative numbers of queries and of keys, from 0 on, [n + 1] int32 each."""

        def cumulative(counts: np.ndarray) -> Tensor:
            return self._on_device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))

        return cumulative(self.queries), cumulative(self.keys)

    @cached_property
    def padding(self) -> tuple[Tensor, Tensor]:
        """Indices that pad queries to [n, max_queries] and keys to [n, max_keys], flattened, int64.

        Each row is padded with its last token.
        """

        def padded(counts: np.ndarray) -> Tensor:
            end = np.cumsum(counts)[:, None]
            return self._on_device(np.minimum(end - counts[:, None] + np.arange(counts.max()), end - 1).ravel())

        return padded(self.queries), padded(self.keys)

    @cached_property
    def real(self) -> Tensor:
        """Indices of the elements of the flattened [n, max_queries] that are no padding, int64."""
        return self._on_device(consecutive(np.arange(len(self.queries)) * self.max_queries, self.queries))


class Plan:
    """Which tokens of a packed row attend to which, for all layers. Each kernel reads the property that it needs."""

    def __init__(self, batch: PairBatch) -> None:
        self.prompt, chosen, self.rejected_tokens = self.parts = np.array(batch.lengths).T
        self.tokens, self.device = self.prompt + chosen, batch.input_ids.device

    @cached_property
    def rows(self) -> PairRows:
        """The tokens arranged as one row per pair, for the CPU."""
        return PairRows(*self.parts)

    @cached_property
    def chosen(self) -> Sequences:
        """The prompt and chosen part of every pair, the first tokens of the row."""
        return Sequences(self.tokens, self.tokens, None, self.device)

    @cached_property
    def rejected(self) -> Sequences | None:
        """The rejected parts, with their prompts among the keys; None if all are empty."""
        some = self.rejected_tokens > 0
        if not some.any():
            return None
        rejected, tokens = self.rejected_tokens, self.tokens
        first = np.stack([np.cumsum(tokens) - tokens, tokens.sum() + np.cumsum(rejected) - rejected], axis=1)
        counts = np.stack([self.prompt, rejected], axis=1)
        key_index = consecutive(first[some].ravel(), counts[some].ravel())
        return Sequences(rejected[some], counts[some].sum(axis=1), key_index, self.device)


def inputs(model: "PreTrainedModel", batch: PairBatch) -> dict[str, Any]:
    """Arguments of a model's forward pass over a packed batch. Makes `attend_packed` the model's attention.

    It is not set back afterwards, because gradient checkpointing runs it in the backward pass too.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    if attention_in_use(model) != PACKED:
        AttentionInterface.register(PACKED, attend_packed)
        AttentionMaskInterface.register(PACKED, AttentionMaskInterface()["sdpa"])  # for calls without a plan
        model.set_attn_implementation(PACKED)
    # A mask of four dimensions is passed on as it is. Without one transformers would make a [T, T] mask.
    no_mask = batch.input_ids.new_empty(1, 1, 0, 0)
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": no_mask,
        "plan": Plan(batch),
    }


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plan: Plan | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention [1, T, H, D] of query [1, H, T, D] to key and value, which may have fewer heads.

    Raises:
        ValueError: the model's scores are soft-capped, or its attention has sinks.
    """
    if plan is None:
        from transformers import AttentionInterface

        others |= {"scaling": scaling, "sliding_window": sliding_window}
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **others)
    if others.get("softcap") is not None or others.get("s_aux") is not None:
        raise ValueError("soft-capped attention and attention with sinks cannot be packed")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (heads[0].transpose(0, 1).to(dtype) for heads in (query, key, value))
    # Some models apply their window in masks alone and do not pass it on.
    window = sliding_window or getattr(module, "sliding_window", None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if device == "cpu":
        return attend_in_blocks(query, key, value, plan.rows, scale, window)[None], None
    attend = attend_varlen if _takes_varlen(query, value) else attend_padded
    return attend_in_pieces(attend, query, key, value, plan, scale, window)[None], None


def attend_in_pieces(
    attend: Callable, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float, window: int | None
) -> Tensor:
    """Attention [T, H, D] by a kernel that takes `Sequences`: first chosen, then rejected parts."""
    first, rejected = len(query) - int(plan.rejected_tokens.sum()), plan.rejected
    outputs = [attend(query[:first], key[:first], value[:first], plan.chosen, scale, window)]
    if rejected is not None and rejected.key_index is not None:
        keys, values = key.index_select(0, rejected.key_index), value.index_select(0, rejected.key_index)
        outputs.append(attend(query[first:], keys, values, rejected, scale, window))
    return torch.cat(outputs)


def _takes_varlen(query: Tensor, value: Tensor) -> bool:
    in_16_bits = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and in_16_bits and query.shape[-1] == value.shape[-1] and has_varlen(query.device)


@cache
def has_varlen(device: torch.device) -> bool:
    """Whether torch (2.12 or later) and this GPU have FlashAttention for variable lengths and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    grouped_queries = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return grouped_queries and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """Attention [T, H, D] by FlashAttention on CUDA, which aligns the last query with the last key."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys = sequences.cumulative
    output: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), queries, keys,
        sequences.max_queries, sequences.max_keys, scale=scale,
        window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output


def attend_padded(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """Attention [T, H, D] by SDPA over rows padded on the right; causality hides the padding from real tokens."""
    (queries, keys), n, m = sequences.padding, len(sequences.queries), sequences.max_queries
    query, key, value = (
        heads.index_select(0, index).unflatten(0, (n, -1)).transpose(1, 2)
        for heads, index in ((query, queries), (key, keys), (value, keys))
    )
    offset = torch.from_numpy(sequences.keys - sequences.queries).to(query.device, non_blocking=True)
    # The last key that each query attends to. Padding has to attend to one too, or its softmax is NaN.
    last = offset[:, None, None, None] + torch.arange(m, device=query.device)[:, None]
    last = last.clamp_max(sequences.max_keys - 1)
    causal = sequences.key_index is None and not (window and window < sequences.max_keys)
    seen = None
    if not causal:
        columns = torch.arange(sequences.max_keys, device=query.device)
        seen = columns <= last
        if window:
            seen &= columns > last - window
    output = F.scaled_dot_product_attention(
        query, key, value, seen, is_causal=causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, sequences.real)
