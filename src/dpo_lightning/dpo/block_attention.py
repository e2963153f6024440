"""Causal attention on a CPU as plain matrix products, in blocks that stay in its cache.

There it is faster than scaled dot-product attention, whose backward pass takes several times as long at the lengths
of preference pairs (benchmarks/NOTES.md).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from dpo_lightning.dpo.packing import Sequences

QUERIES = 128  # of a sequence that are worked on at a time
SCORES = 2**20  # elements of scores that exist at a time
KEPT = 2**24  # elements of probabilities that are kept for the backward pass; if there are more, they are made again


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, sequences: "Sequences", scale: float, window: int | None
) -> Tensor:
    """Attention [sum of queries, H, D] of query [sum of queries, H, D] to key and value [sum of keys, KV heads, D]."""
    return _BlockAttention.apply(query, key, value, sequences, scale, window)


class Block(NamedTuple):
    """Some queries of a few sequences, with the keys that any of them sees."""

    sequences: slice
    queries: slice
    keys: slice
    masked: slice  # of these keys: the ones that not every query sees
    mask: Tensor  # [sequences or 1, 1, queries, masked keys], to be added to scores

    def of_queries(self, rows: Tensor) -> Tensor:
        """Of [KV heads, n, heads that share keys, m, D]."""
        return rows[:, self.sequences, :, self.queries]

    def of_keys(self, rows: Tensor) -> Tensor:
        """Of [KV heads, n, m, D]."""
        return rows[:, self.sequences, self.keys]


def blocks_of(sequences: "Sequences", heads: int, window: int | None, dtype: torch.dtype) -> list[Block]:
    """Blocks that cover every query once, made once for all layers."""
    found = sequences.blocks.get((heads, window, dtype))
    if found is None:
        found = sequences.blocks[heads, window, dtype] = list(_blocks(sequences, heads, window, dtype))
    return found


def _blocks(sequences: "Sequences", heads: int, window: int | None, dtype: torch.dtype) -> Iterator[Block]:
    rows = min(sequences.max_queries, QUERIES)
    step = max(1, SCORES // (heads * rows * sequences.max_keys))
    offsets = sequences.keys - sequences.queries  # of a sequence's first query among its keys
    for s in range(0, len(offsets), step):
        few = slice(s, s + step)
        offset = torch.from_numpy(offsets[few] if offsets[few].any() else offsets[:1])[:, None, None, None]
        nearest, farthest = int(offset.min()), int(offset.max())
        longest = int(sequences.keys[few].max())
        for a in range(0, int(sequences.queries[few].max()), rows):
            b = min(a + rows, sequences.max_queries)
            first = max(0, nearest + a - window + 1) if window else 0
            last = min(longest, farthest + b)
            masked = first if window else nearest + a
            own, keys = offset + torch.arange(a, b)[:, None], torch.arange(masked, last)
            unseen = (keys > own) | (keys <= own - window) if window else keys > own
            # No -inf: rows of padding may see nothing, which must not become NaN.
            mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, torch.finfo(dtype).min / 2)
            yield Block(few, slice(a, b), slice(first, last), slice(masked - first, None), mask)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: "Sequences", scale: float, window: int | None
    ) -> Tensor:
        """See `attend_in_blocks`."""
        ctx.sequences, ctx.scale = sequences, scale
        of_queries, of_keys = sequences.padding
        with torch.autocast("cpu", enabled=False):
            key, value = _rows(key, of_keys, sequences), _rows(value, of_keys, sequences)
            query = _shared(_rows(query, of_queries, sequences), key)
            ctx.blocks = blocks_of(sequences, query.shape[0] * query.shape[2], window, query.dtype)
            output, kept = value.new_empty(*query.shape[:-1], value.shape[-1]), []
            keep = any(ctx.needs_input_grad) and query[..., 0].numel() * sequences.max_keys <= KEPT
            for block in ctx.blocks:
                p = _probabilities(block, query, key, scale)
                target = block.of_queries(output)
                target.copy_(torch.bmm(p, block.of_keys(value).flatten(0, 1)).view(target.shape))
                kept += [p] if keep else []
            ctx.save_for_backward(query, key, value, *kept)
            return _tokens(output.transpose(1, 2).flatten(0, 1), sequences.real[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients of query, key and value."""
        (query, key, value, *kept), sequences = ctx.saved_tensors, ctx.sequences
        of_queries, of_keys = sequences.real
        grad = F.pad(grad, (0, 0, 0, 0, 0, 1))  # what the padding is filled with
        grad = _shared(_rows(grad, sequences.zero_padding, sequences), key)
        grad_query = torch.empty_like(query)
        # Several blocks of a sequence are summed in float32.
        several = sequences.max_queries > QUERIES
        dtype, add = (torch.float32, Tensor.add_) if several else (key.dtype, Tensor.copy_)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
        for i, block in enumerate(ctx.blocks):
            p = kept[i] if kept else _probabilities(block, query, key, ctx.scale)
            g = _batched(block.of_queries(grad))
            target = block.of_keys(grad_value)
            add(target, torch.bmm(p.transpose(1, 2), g).view(target.shape))
            slopes = torch.bmm(g, block.of_keys(value).flatten(0, 1).transpose(1, 2))
            slopes = torch.ops.aten._softmax_backward_data(slopes, p, -1, p.dtype)
            target = block.of_queries(grad_query)
            target.copy_(_product(slopes, block.of_keys(key).flatten(0, 1), ctx.scale).view(target.shape))
            target, q = block.of_keys(grad_key), _batched(block.of_queries(query))
            add(target, _product(slopes.transpose(1, 2), q, ctx.scale).view(target.shape))
        grad_query = _tokens(grad_query.transpose(1, 2).flatten(0, 1), of_queries)
        grad_key, grad_value = (_tokens(rows, of_keys).to(key.dtype) for rows in (grad_key, grad_value))
        return grad_query, grad_key, grad_value, None, None, None


def _rows(tokens: Tensor, index: Tensor, sequences: "Sequences") -> Tensor:
    """Tokens [T, heads, D] as rows of one length, [heads, n, m, D]."""
    return tokens.transpose(0, 1).index_select(1, index).unflatten(1, (len(sequences.queries), -1))


def _tokens(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [heads, n, m, D] as tokens [T, heads, D]."""
    return rows.flatten(1, 2).index_select(1, index).transpose(0, 1)


def _shared(rows: Tensor, key: Tensor) -> Tensor:
    """Rows [H, n, m, D] by the heads that share keys: [KV heads, n, H / KV heads, m, D]."""
    return rows.unflatten(0, (key.shape[0], -1)).transpose(1, 2).contiguous()


def _batched(block: Tensor) -> Tensor:
    return block.flatten(0, 1).flatten(1, 2)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    shape = (*left.shape[:2], right.shape[2])
    return torch.baddbmm(left.new_empty(1, 1, 1).expand(shape), left, right, beta=0, alpha=scale)


def _probabilities(block: Block, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """[KV heads * sequences, heads that share keys * queries, keys]."""
    q, k = block.of_queries(query), block.of_keys(key)
    scores = _product(_batched(q), k.flatten(0, 1).transpose(1, 2), scale)
    scores.view(*q.shape[:-1], -1)[..., block.masked].add_(block.mask)
    return torch.softmax(scores, -1)
