"""Causal LMs on running text: their perplexity, and how far one's predictions are from another's."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.models.policy import position_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 256  # tokens that a model reads at a time: no more than their [WINDOW, V] logits are in memory
ROWS = 32  # of the logits, converted to float32 at a time

Predict = Callable[[Tensor], Tensor]  # token ids [T] -> the logits [T - 1, V] of all but the first


def windows(ids: Sequence[int], model: "PreTrainedModel") -> list[Tensor]:
    """Token ids cut into pieces of the same length, but for the last, that the model has positions for."""
    length = min(WINDOW, position_count(model.config) or WINDOW)
    pieces = torch.tensor(ids, device=model.device).split(length)
    return [piece for piece in pieces if len(piece) > 1]  # the first token of a piece is not predicted


@torch.no_grad()
def predictions(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    """The logits [T - 1, V] of the tokens `ids` [T] but for the first, each from those before it."""
    return model(input_ids=ids[None], use_cache=False).logits[0, :-1]


@torch.no_grad()
def compare(policy: Predict, reference: Predict | None, texts: Sequence[Tensor]) -> dict[str, float]:
    """The policy's `perplexity` on texts, the `reference_perplexity`, and the `kl` from the reference; sums in float32.

    Perplexity is exp of the mean negative log-likelihood of a token. `kl` is the mean over positions of KL(policy ||
    reference) between the two distributions of the next token, in nats, over the whole vocabulary.

    Args:
        reference: left out, there is only `perplexity`.
        texts: token ids, [T] each.
    """
    totals = torch.zeros(3, device=texts[0].device)
    for ids in texts:
        logits = policy(ids)
        others = logits if reference is None else reference(ids)
        for rows in zip(ids[1:].split(ROWS), logits.split(ROWS), others.split(ROWS), strict=True):
            targets, own, other = rows[0], *(part.float().log_softmax(-1) for part in rows[1:])
            likelihoods = (F.nll_loss(part, targets, reduction="sum") for part in (own, other))
            kl = F.kl_div(other, own, reduction="sum", log_target=True)
            totals += torch.stack([*likelihoods, kl])
    nll, reference_nll, kl = (totals / sum(len(ids) - 1 for ids in texts)).unbind()
    found = {"perplexity": nll.exp()}
    if reference is not None:
        found |= {"reference_perplexity": reference_nll.exp(), "kl": kl}
    return {name: value.item() for name, value in found.items()}
