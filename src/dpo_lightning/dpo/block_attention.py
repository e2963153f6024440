"""Attention of packed pairs on a CPU: matrix products in blocks that fit into its cache.

It is faster there than SDPA, whose backward pass takes several times as long at the lengths of preference pairs
(benchmarks/NOTES.md).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.data.batching import consecutive
from dpo_lightning.internals.torch import softmax_gradient

QUERIES = 128  # queries per pair and block
SCORES = 2**21  # elements of a block's scores, at most
KEPT = 2**24  # elements of probabilities up to which the backward pass reuses them instead of computing them again


class Block(NamedTuple):
    """Some queries of a few pairs, and all keys that any of them attends to."""

    pairs: slice
    queries: slice
    keys: slice
    masked: slice  # of these keys: those that not every query attends to
    mask: Tensor  # [pairs or 1, 1, queries, masked keys], added to the scores

    def of_queries(self, rows: Tensor) -> Tensor:
        """This block's part of [KV heads, n, heads per KV head, m, D]."""
        return rows[:, self.pairs, :, self.queries]

    def of_keys(self, rows: Tensor) -> Tensor:
        """This block's part of [KV heads, n, m, D]."""
        return rows[:, self.pairs, self.keys]


class PairRows:
    """The tokens of a packed row arranged as n rows of m columns, one per pair: prompt, chosen, rejected, padding.

    Args:
        prompt, chosen, rejected: [n] numbers of tokens in each pair's parts.
    """

    def __init__(self, prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> None:
        self.prompt, self.tokens, self.lengths = prompt, prompt + chosen, prompt + chosen + rejected
        self.columns = int(self.lengths.max())
        total, first = self.tokens.sum(), np.cumsum(self.tokens) - self.tokens
        runs = np.stack([first, total + np.cumsum(rejected) - rejected], axis=1)
        token = consecutive(runs.ravel(), np.stack([self.tokens, rejected], axis=1).ravel())
        slot = consecutive(np.arange(len(prompt)) * self.columns, self.lengths)
        filled = np.full(len(prompt) * self.columns, len(token))
        filled[slot] = token
        self.token = torch.from_numpy(filled)  # [n * m] int64, position in the packed row; T at padding
        self.slot = torch.from_numpy(slot[np.argsort(token)])  # [T] int64, position of each token in [n * m]
        self._blocks: dict[Any, list[Block]] = {}

    def blocks(self, heads: int, window: int | None, dtype: torch.dtype) -> list[Block]:
        """Blocks that cover every query once; kept, because all layers need the same."""
        if (key := (heads, window, dtype)) not in self._blocks:
            self._blocks[key] = list(self._make_blocks(heads, window, dtype))
        return self._blocks[key]

    def _make_blocks(self, heads: int, window: int | None, dtype: torch.dtype) -> Iterator[Block]:
        rows = min(self.columns, QUERIES)
        step = max(1, SCORES // (heads * rows * self.columns))
        for s in range(0, len(self.lengths), step):
            few = slice(s, s + step)
            prompt, tokens, lengths = self.prompt[few], self.tokens[few], self.lengths[few]
            longest, alone = int(lengths.max()), not (lengths > tokens).any()
            p, t = (torch.from_numpy(counts)[:, None, None, None] for counts in (prompt, tokens))
            for a in range(0, longest, rows):
                b = min(a + rows, longest)
                first = max(0, a - int((tokens - prompt).max()) - window + 1) if window else 0
                masked = first if window else a if alone else min(a, int(prompt.min()))
                query, key = torch.arange(a, b)[:, None], torch.arange(masked, b)
                unseen = (key > query)[None, None]
                if not alone:
                    unseen = unseen | (query >= t) & (key >= p) & (key < t)
                if window:
                    query_position, key_position = (column - (t - p) * (column >= t) for column in (query, key))
                    unseen = unseen | (query_position - key_position >= window)
                mask = torch.zeros(unseen.shape, dtype=dtype).masked_fill_(unseen, -torch.inf)
                yield Block(few, slice(a, b), slice(first, b), slice(masked - first, None), mask)


def attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, rows: PairRows, scale: float, window: int | None
) -> Tensor:
    """Attention [T, H, D] of a packed row's query [T, H, D] to its key and value [T, KV heads, D].

    Tokens after those of the pairs are padding: their attention is 0.
    """
    return _BlockAttention.apply(query, key, value, rows, scale, window)


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pairs: PairRows, scale: float, window: int | None
    ) -> Tensor:
        """Attention, as `attend_in_blocks` describes it."""
        ctx.pairs, ctx.scale, ctx.count = pairs, scale, len(query)
        with torch.autocast("cpu", enabled=False):
            token = pairs.token.clamp_max(len(query) - 1)
            key, value = _rows(key, token, pairs), _rows(value, token, pairs)
            query = _shared(_rows(query, token, pairs), key)
            ctx.blocks = pairs.blocks(query.shape[0] * query.shape[2], window, query.dtype)
            output, kept = value.new_empty(*query.shape[:-1], value.shape[-1]), []
            keep = any(ctx.needs_input_grad) and query[..., 0].numel() * pairs.columns <= KEPT
            for block in ctx.blocks:
                p = _probabilities(block, query, key, scale)
                target = block.of_queries(output)
                target.copy_(torch.bmm(p, block.of_keys(value).flatten(0, 1)).view(target.shape))
                kept += [p] if keep else []
            ctx.save_for_backward(query, key, value, *kept)
            return _tokens(output.transpose(1, 2).flatten(0, 1), pairs, ctx.count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of query, key and value."""
        (query, key, value, *kept), pairs = ctx.saved_tensors, ctx.pairs
        grad = F.pad(grad, (0, 0, 0, 0, 0, 1))  # a zero for padding
        grad = _shared(_rows(grad, pairs.token, pairs), key)
        grad_query = torch.empty_like(query)
        # The blocks of a pair are summed in float32.
        several = pairs.columns > QUERIES
        dtype, add = (torch.float32, Tensor.add_) if several else (key.dtype, Tensor.copy_)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=dtype) for tensor in (key, value))
        for i, block in enumerate(ctx.blocks):
            p = kept[i] if kept else _probabilities(block, query, key, ctx.scale)
            g = _batched(block.of_queries(grad))
            target = block.of_keys(grad_value)
            add(target, torch.bmm(p.transpose(1, 2), g).view(target.shape))
            slopes = torch.bmm(g, block.of_keys(value).flatten(0, 1).transpose(1, 2))
            slopes = softmax_gradient(slopes, p)
            target = block.of_queries(grad_query)
            target.copy_(_product(slopes, block.of_keys(key).flatten(0, 1), ctx.scale).view(target.shape))
            target, q = block.of_keys(grad_key), _batched(block.of_queries(query))
            add(target, _product(slopes.transpose(1, 2), q, ctx.scale).view(target.shape))
        grad_query = _tokens(grad_query.transpose(1, 2).flatten(0, 1), pairs, ctx.count)
        grad_key, grad_value = (_tokens(rows, pairs, ctx.count).to(key.dtype) for rows in (grad_key, grad_value))
        return grad_query, grad_key, grad_value, None, None, None


def _rows(tokens: Tensor, index: Tensor, pairs: PairRows) -> Tensor:
    """Tokens [T, heads, D] as [heads, n, m, D]."""
    return tokens.transpose(0, 1).index_select(1, index).unflatten(1, (-1, pairs.columns))


def _tokens(rows: Tensor, pairs: PairRows, count: int) -> Tensor:
    """[heads, n, m, D] as `count` tokens [count, heads, D], of which those after the pairs' are 0."""
    tokens = rows.flatten(1, 2).index_select(1, pairs.slot).transpose(0, 1)
    return F.pad(tokens, (0, 0, 0, 0, 0, count - len(tokens))) if count > len(tokens) else tokens


def _shared(rows: Tensor, key: Tensor) -> Tensor:
    """Rows [H, n, m, D] grouped by the heads that share keys: [KV heads, n, H / KV heads, m, D]."""
    return rows.unflatten(0, (key.shape[0], -1)).transpose(1, 2).contiguous()


def _batched(block: Tensor) -> Tensor:
    """[KV heads, n, h, m, D] as a batch of matrices, [KV heads * n, h * m, D]."""
    return block.flatten(0, 1).flatten(1, 2)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right for batches of matrices, in one kernel."""
    shape = (*left.shape[:2], right.shape[2])
    return torch.baddbmm(left.new_empty(1, 1, 1).expand(shape), left, right, beta=0, alpha=scale)


def _probabilities(block: Block, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Attention probabilities of a block, [KV heads * pairs, heads per KV head * queries, keys]."""
    q, k = block.of_queries(query), block.of_keys(key)
    scores = _product(_batched(q), k.flatten(0, 1).transpose(1, 2), scale)
    scores.view(*q.shape[:-1], -1)[..., block.masked].add_(block.mask)
    return torch.softmax(scores, -1)
