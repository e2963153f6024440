"""Hidden states -> log-probs of the tokens that they predict, without a [B, T, V] tensor of logits.

On a CPU a plain linear head is computed a part of the vocabulary at a time, which stays in the cache (`_HeadLogps`).
Other heads and devices compute the logits of a few tokens at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_lightning.internals.torch import has_hooks
from dpo_lightning.models.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGITS_KEPT = 2**28  # bytes of logits that are kept for the backward pass; of more, it computes them again
LOGITS_IN_CACHE, LOGITS_AT_ONCE = 2**21, 2**26  # elements that a CPU and that a GPU works on in one go
LEAST_PART = 512  # tokens of the vocabulary in one product, at least


def head_logps(model: "PreTrainedModel", hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] float32 of `targets` [N] from hidden states [N, H].

    If the logits [N, V] take more than `LOGITS_KEPT`, they never exist all at once, and the backward pass computes them
    again.
    """
    if (weight := plain_head(model)) is not None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return _HeadLogps.apply(hidden, weight, targets, dtype)

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return target_logps(_logits(model, hidden), targets)

    rows = _rows_kept(model, hidden)
    if len(targets) <= rows:
        return chunk_logps(hidden, targets)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks])


def plain_head(model: "PreTrainedModel") -> Tensor | None:
    """The weights [V, H] of a head on a CPU that is nothing but a matrix product; None for any other."""
    head, config = model.get_output_embeddings(), model.config
    transformed = any(
        getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "final_logit_softcapping")
    )
    if type(head) is not nn.Linear or head.bias is not None or transformed or has_hooks(head):
        return None
    return head.weight if head.weight.device.type == "cpu" and not is_sharded(model) else None


@contextmanager
def sparse_embedding(model: "PreTrainedModel") -> Iterator[None]:
    """For a forward pass: of weights tied to a plain head, the embedding's gradient has only the rows of its tokens.

    It is added to the head's, so that the sum is dense. DistributedDataParallel would not allow it.
    """
    embedding, weight = model.get_input_embeddings(), plain_head(model)
    tied = type(embedding) is nn.Embedding and embedding.weight is weight and weight.requires_grad
    if not tied or embedding.sparse or torch.distributed.is_initialized():
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False


@torch.no_grad()
def head_log_sum_squares(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """Log of the sum of squared token probabilities, [N] float32, from hidden states [N, H]."""
    rows = _rows_kept(model, hidden)
    return torch.cat([log_sum_squares(_logits(model, chunk)) for chunk in hidden.split(rows)])


def _rows_kept(model: "PreTrainedModel", hidden: Tensor) -> int:
    return max(1, LOGITS_KEPT // (hidden.element_size() * model.get_output_embeddings().weight.shape[0]))


def _logits(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    config = model.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


class _HeadLogps(torch.autograd.Function):
    """Log-probs [N] float32 of `targets` [N] from hidden states [N, H] and the head's weights [V, H].

    Products are in `dtype`, all else in float32. Each part of the weights is converted just before its product, and its
    gradient just after it, so that the only passes over [V, H] that leave the cache read the weights and write their
    gradient. The target's own logit, whose rounding is the largest error of a log-prob in 16 bits, is in float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the log-probabilities."""
        states, kept = hidden.to(dtype), []
        parts = _parts(targets, len(weight))
        keep = any(ctx.needs_input_grad) and len(states) * len(weight) * states.element_size() <= LOGITS_KEPT
        totals, rounded = torch.full((2, len(states)), -torch.inf, dtype=torch.float32)
        for part, rows, columns in parts:
            logits = states @ weight[part].to(dtype).t()
            totals = torch.logaddexp(totals, logits.float().logsumexp(-1))
            rounded[rows] = logits[rows, columns].float()
            if keep:
                kept.append(logits)
        own = (states.float() * weight.index_select(0, targets).to(dtype).float()).sum(-1)
        totals += torch.log1p((own - totals).exp() - (rounded - totals).exp())
        ctx.save_for_backward(states, weight, own, totals, *kept)
        ctx.parts, ctx.hidden_dtype = parts, hidden.dtype
        return own - totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Returns the gradients of hidden states and weights; a logit's is 1 at the target minus its probability."""
        states, weight, own, totals, *kept = ctx.saved_tensors
        at_target = grad * -torch.expm1(own - totals)
        totals, factor = totals[:, None], -grad[:, None]
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_states = torch.zeros(states.shape, dtype=torch.float32)
        for i, (part, rows, columns) in enumerate(ctx.parts):
            some = weight[part].to(states.dtype)
            logits = kept[i] if kept else states @ some.t()
            of_logits = (logits.float() - totals).exp_().mul_(factor)
            of_logits[rows, columns] = at_target[rows]
            of_logits = of_logits.to(states.dtype)
            of_states += of_logits @ some
            if of_weight is not None:
                of_weight[part] = of_logits.t() @ states
        return of_states.to(ctx.hidden_dtype), of_weight, None, None


def _parts(targets: Tensor, vocabulary: int) -> list[tuple[slice, Tensor, Tensor]]:
    """Parts of the vocabulary, each with the rows whose targets are in it, and their columns in it."""
    width = max(LEAST_PART, LOGITS_IN_CACHE // len(targets))
    starts = range(0, vocabulary, width)
    ordered, rows = targets.sort()
    bounds = torch.searchsorted(ordered, torch.tensor([*starts, vocabulary])).tolist()
    return [
        (slice(start, start + width), rows[first:end], ordered[first:end] - start)
        for start, first, end in zip(starts, bounds, bounds[1:], strict=False)
    ]


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-softmax in float32 of logits [N, V] at `targets` [N]. The backward pass overwrites the logits."""
    return _TargetLogps.apply(logits, targets)


class _TargetLogps(torch.autograd.Function):
    """Log-softmax in float32 of logits [N, V], at `targets` [N] only: [N] float32.

    Apart from the logits, in the dtype they come in, nothing of their size is kept: the backward pass overwrites them
    with their gradient. Both passes go through blocks of rows that fit into the cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the log-probabilities."""
        totals = torch.cat([block.float().logsumexp(-1) for block in logits.split(_block_rows(logits))])
        ctx.save_for_backward(logits, targets, totals)
        return logits.gather(1, targets[:, None]).squeeze(1).float() - totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of the logits: (1 at the target - probability) times that of the log-probability."""
        logits, targets, totals = ctx.saved_tensors
        rows = _block_rows(logits)
        for block, *columns in zip(*(t.split(rows) for t in (logits, targets, totals, grad)), strict=True):
            target, total, factor = (column[:, None] for column in columns)
            gradient = (block.float() - total).exp_().mul_(-factor)
            block.copy_(gradient.scatter_add_(1, target, factor))
        return logits, None


def _block_rows(logits: Tensor) -> int:
    elements = LOGITS_IN_CACHE if logits.device.type == "cpu" else LOGITS_AT_ONCE
    return max(1, elements // logits.shape[1])


@torch.no_grad()
def log_sum_squares(logits: Tensor) -> Tensor:
    """Log of the sum of squared token probabilities, [N] float32, from logits [N, V]."""
    return (2 * logits.float().log_softmax(-1)).logsumexp(-1)
