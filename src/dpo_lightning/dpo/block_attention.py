"""Causal attention on a CPU as plain matrix products, in blocks that stay in its cache.

There it is faster than scaled dot-product attention, whose backward pass takes several times as long at the lengths
of preference pairs (benchmarks/NOTES.md).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dpo_lightning.dpo.packing import Sequences

QUERIES = 128  # of a sequence that are worked on at a time
SCORES = 2**19  # elements of scores that exist at a time
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
    unseen: Tensor  # [sequences or 1, 1, 1, queries, keys from `checked` on] bool: what a query must not see
    checked: int


def blocks_of(sequences: "Sequences", heads: int, window: int | None) -> Iterator[Block]:
    """Blocks that cover every query once."""
    rows = min(sequences.max_queries, QUERIES)
    step = max(1, SCORES // (heads * rows * sequences.max_keys))
    offsets = sequences.keys - sequences.queries  # of a sequence's first query among its keys
    for s in range(0, len(offsets), step):
        few = slice(s, s + step)
        offset = torch.from_numpy(offsets[few] if offsets[few].any() else offsets[:1])[:, None, None, None, None]
        nearest, farthest = int(offset.min()), int(offset.max())
        longest = int(sequences.keys[few].max())
        for a in range(0, int(sequences.queries[few].max()), rows):
            b = min(a + rows, sequences.max_queries)
            first = max(0, nearest + a - window + 1) if window else 0
            last = min(longest, farthest + b)
            checked = first if window else nearest + a
            own, keys = offset + torch.arange(a, b)[:, None], torch.arange(checked, last)
            unseen = (keys > own) | (keys <= own - window) if window else keys > own
            yield Block(few, slice(a, b), slice(first, last), unseen, checked - first)


def probabilities(query: Tensor, key: Tensor, block: Block, heads: int) -> Tensor:
    """Softmax of the scores of a block, [sequences * KV heads, queries of all heads that share keys, keys]."""
    scores = torch.bmm(query, key.transpose(1, 2))
    rows = block.unseen.shape[-2]
    # The lowest number instead of -inf: rows of padding may see nothing, which must not become NaN.
    scores.view(-1, heads, query.shape[1] // rows, rows, key.shape[1])[..., block.checked :].masked_fill_(
        block.unseen, torch.finfo(scores.dtype).min
    )
    return torch.softmax(scores, -1)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: "Sequences", scale: float, window: int | None
    ) -> Tensor:
        """See `attend_in_blocks`."""
        ctx.sequences, ctx.scale, ctx.window = sequences, scale, window
        heads, n = key.shape[1], len(sequences.queries)
        with torch.autocast("cpu", enabled=False):
            of_queries, of_keys = sequences.padding
            # [n, KV heads, heads that share keys, m, D] and [n, KV heads, m, D]
            query = _rows(query.mul(scale), of_queries, n).unflatten(1, (heads, -1))
            key, value = _rows(key, of_keys, n), _rows(value, of_keys, n)
            output = value.new_empty(*query.shape[:-1], value.shape[-1])
            kept = []
            keep = query[..., 0].numel() * sequences.max_keys <= KEPT and any(ctx.needs_input_grad)
            for block in blocks_of(sequences, query.shape[1] * query.shape[2], window):
                q, k, v = _of_block(block, query, key, value)
                p = probabilities(q, k, block, heads)
                target = output[block.sequences, :, :, block.queries]
                target.copy_(torch.bmm(p, v).view(target.shape))
                kept += [p] if keep else []
            ctx.save_for_backward(query, key, value, *kept)
            return _tokens(output.flatten(1, 2), sequences.real[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gives the gradients of query, key and value."""
        (query, key, value, *kept), sequences = ctx.saved_tensors, ctx.sequences
        heads, n = key.shape[1], len(sequences.queries)
        of_queries, of_keys = sequences.real
        rows = grad.new_zeros(n * sequences.max_queries, *grad.shape[1:]).index_copy_(0, of_queries, grad)
        rows = rows.unflatten(0, (n, -1)).transpose(1, 2).contiguous().unflatten(1, (heads, -1))
        grad_query = torch.empty_like(query)
        # Sums over blocks are of float32, a single block needs none.
        dtype = torch.float32 if sequences.max_queries > QUERIES else key.dtype
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
        for i, block in enumerate(blocks_of(sequences, query.shape[1] * query.shape[2], ctx.window)):
            q, k, v = _of_block(block, query, key, value)
            p = kept[i] if kept else probabilities(q, k, block, heads)
            g = _flat(rows[block.sequences, :, :, block.queries])
            _add(grad_value, block, torch.bmm(p.transpose(1, 2), g))
            scores = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            target = grad_query[block.sequences, :, :, block.queries]
            target.copy_(torch.bmm(scores, k).view(target.shape))
            _add(grad_key, block, torch.bmm(scores.transpose(1, 2), q))
        return (
            _tokens(grad_query.flatten(1, 2), of_queries).mul_(ctx.scale),
            _tokens(grad_key, of_keys).to(key.dtype),
            _tokens(grad_value, of_keys).to(value.dtype),
            None, None, None,
        )  # fmt: skip


def _rows(tokens: Tensor, index: Tensor, n: int) -> Tensor:
    """Tokens [T, heads, D] as n rows of one length, [n, heads, m, D]."""
    return tokens.index_select(0, index).unflatten(0, (n, -1)).transpose(1, 2).contiguous()


def _tokens(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [n, heads, m, D] -> tokens [T, heads, D]."""
    return rows.transpose(1, 2).flatten(0, 1).index_select(0, index)


def _of_block(block: Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block's queries, keys and values, [sequences * KV heads, ..., D]."""
    keys, values = (tensor[block.sequences, :, block.keys].flatten(0, 1) for tensor in (key, value))
    return _flat(query[block.sequences, :, :, block.queries]), keys, values


def _flat(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1).flatten(1, 2)


def _add(gradient: Tensor, block: Block, part: Tensor) -> None:
    target = gradient[block.sequences, :, block.keys]
    target += part.view(target.shape)
