"""Hidden states -> log-probs of the tokens that they predict. The LM head runs on a chunk of them at a time."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HEAD_CHUNK = 1024  # predicted tokens whose [chunk, V] logits exist at a time


LOGITS_IN_CACHE, LOGITS_AT_ONCE = 2**20, 2**26  # elements that a CPU and that a GPU works on in one go


def head_logps(model: "PreTrainedModel", hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] float32 of `targets` [N] from hidden states [N, H], the head applied in chunks.

    If there are several chunks, the backward pass computes their logits again, so that only the [HEAD_CHUNK, V] logits
    of one chunk exist at any time.
    """
    if len(targets) <= HEAD_CHUNK:
        return _target_logps(_logits(model, hidden), targets)

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return _target_logps(_logits(model, hidden), targets)

    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def head_log_sum_squares(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """Log of the sum of squared token probabilities, [N] float32, from hidden states [N, H]."""
    return torch.cat([_log_sum_squares(_logits(model, chunk)) for chunk in hidden.split(HEAD_CHUNK)])


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


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
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
def _log_sum_squares(logits: Tensor) -> Tensor:
    return (2 * logits.float().log_softmax(-1)).logsumexp(-1)
