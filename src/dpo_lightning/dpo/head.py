"""Hidden states -> log-probs of the tokens that they predict, without a [B, T, V] tensor of logits.

On a CPU a plain linear head is computed a part of the vocabulary at a time, which stays in the cache (`_HeadLogps`).
Other heads and devices compute the logits of a few tokens at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_lightning.dpo.products import padding_for
from dpo_lightning.internals.torch import has_hooks
from dpo_lightning.models.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LOGITS_KEPT = 2**28  # bytes of logits that are kept for the backward pass; of more, it computes them again
LOGITS_IN_CACHE, LOGITS_AT_ONCE = 2**21, 2**26  # elements that a CPU and that a GPU works on in one go
LEAST_PART = 512  # tokens of the vocabulary in one product, at least


def head_logps(model: "PreTrainedModel", hidden: Tensor, targets: Tensor, tied: "TiedGradient | None" = None) -> Tensor:
    """Log-probabilities [N] float32 of `targets` [N] from hidden states [N, H].

    If the logits [N, V] take more than `LOGITS_KEPT`, they never exist all at once, and the backward pass computes them
    again. `tied` is what `tied_embedding` gave for the forward pass that computed the hidden states.
    """
    if (weight := plain_head(model)) is not None:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        if dtype != torch.float16:  # in which probabilities without the loss scale are too small
            more = padding_for(model, len(targets))
            hidden, padded = F.pad(hidden, (0, 0, 0, more)), F.pad(targets, (0, more))
            return _HeadLogps.apply(hidden, weight, padded, dtype, tied or TiedGradient())[: len(targets)]

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
def tied_embedding(model: "PreTrainedModel") -> Iterator["TiedGradient"]:
    """For a forward pass: `head_logps` will add the gradients of a plain head and of an embedding tied to it."""
    tied, embedding = TiedGradient(), model.get_input_embeddings()
    plain = type(embedding) is nn.Embedding and not embedding.scale_grad_by_freq and not has_hooks(embedding)
    weight = plain_head(model)
    if not plain or weight is None or embedding.weight is not weight or not weight.requires_grad:
        yield tied
        return
    hook = embedding.register_forward_hook(tied.embed)
    try:
        yield tied
    finally:
        hook.remove()


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
    gradient. Kept for the backward pass are the probabilities within each part, without the target's. Its products
    take them as they are: what turns them into the gradient of the logits is one factor for each row. The target's own
    logit, whose rounding is the largest error of a log-prob in 16 bits, is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, tied: "TiedGradient"
    ) -> Tensor:
        """Returns the log-probabilities."""
        states, kept = hidden.to(dtype), []
        parts = _parts(targets, len(weight))
        keep = any(ctx.needs_input_grad) and len(states) * len(weight) * states.element_size() <= LOGITS_KEPT
        totals, rounded = torch.full((2, len(states)), -torch.inf, dtype=torch.float32)
        for part, rows, columns in parts:
            logits = (states @ weight[part].to(dtype).t()).float()
            rounded[rows] = logits[rows, columns]
            greatest, shares = logits.amax(-1), logits.softmax(-1)
            total = greatest - shares.amax(-1).log()  # log-sum-exp: the greatest logit's share is 1 / sum(exp(l - max))
            totals = torch.logaddexp(totals, total)
            if keep:
                shares[rows, columns] = 0
                kept += [shares.to(dtype), total]
        own = (states.float() * weight.index_select(0, targets).to(dtype).float()).sum(-1)
        totals += torch.log1p((own - totals).exp() - (rounded - totals).exp())
        ctx.save_for_backward(states, weight, targets, own, totals, *kept)
        ctx.parts, ctx.hidden_dtype, ctx.tied = parts, hidden.dtype, tied
        return own - totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of hidden states and weights; a logit's is 1 at the target minus its probability."""
        states, weight, targets, own, totals, *kept = ctx.saved_tensors
        at_target = (grad * -torch.expm1(own - totals))[:, None]
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_states = at_target * weight.index_select(0, targets).to(states.dtype)
        for i, (part, rows, columns) in enumerate(ctx.parts):
            some = weight[part].to(states.dtype)
            if kept:
                shares, total = kept[2 * i : 2 * i + 2]
            else:
                shares, total = ((states @ some.t()).float() - totals[:, None]).exp_().to(states.dtype), totals
                shares[rows, columns] = 0
            factor = ((total - totals).exp() * -grad)[:, None]
            of_states += factor * (shares @ some)
            if of_weight is not None:
                of_weight[part] = shares.t() @ (factor * states).to(states.dtype)
        if of_weight is not None:
            of_weight.index_add_(0, targets, (at_target * states).to(of_weight.dtype))
        return of_states.to(ctx.hidden_dtype), ctx.tied.of_head(of_weight), None, None, None


class TiedGradient:
    """The gradient of weights that embedding and head share, as one sum of theirs.

    Autograd would make a second tensor of that size for the embedding, and add it: of a vocabulary of 50,000 a batch
    touches a few hundred rows. Here the head's backward pass, which comes first, leaves its gradient to the
    embedding's, which adds those rows to it.
    """

    def __init__(self) -> None:
        self.shared = False  # the embedding has run, with gradients
        self.gradient: Tensor | None = None

    def of_head(self, gradient: Tensor | None) -> Tensor | None:
        """What the head's backward pass returns for the weights: nothing, if the embedding's is still to come."""
        if not self.shared:
            return gradient
        self.gradient = gradient
        return None

    def embed(self, embedding: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """A forward hook of the embedding."""
        if not torch.is_grad_enabled() or len(inputs) != 1:  # the tokens were given by name
            return None
        self.shared = True
        return _TiedRows.apply(output.detach(), embedding.weight, inputs[0], embedding.padding_idx, self)


class _TiedRows(torch.autograd.Function):
    """Rows [..., H] of the embedding's weights [V, H], already looked up by `tokens` [...]."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, tokens: Tensor, padding: int | None, tied: TiedGradient
    ) -> Tensor:
        """Returns the rows."""
        ctx.save_for_backward(weight, tokens)
        ctx.padding, ctx.tied = padding, tied
        return rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradient of the weights, of embedding and head."""
        weight, tokens = ctx.saved_tensors
        gradient, ctx.tied.gradient = ctx.tied.gradient, None
        if gradient is None:
            gradient = torch.zeros_like(weight)
        grad = grad.to(gradient.dtype)
        if ctx.padding is not None:
            grad = grad.masked_fill((tokens == ctx.padding)[..., None], 0)
        return None, gradient.index_add_(0, tokens.flatten(), grad.flatten(0, -2)), None, None, None


def _parts(targets: Tensor, vocabulary: int) -> list[tuple[slice, Tensor, Tensor]]:
    """Parts of the vocabulary, each with the rows whose targets are in it, and their columns in it."""
    fitting = max(1, LOGITS_IN_CACHE // len(targets))
    width = max(LEAST_PART, 1 << fitting.bit_length() - 1)  # a power of two: few widths need few kernels
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
