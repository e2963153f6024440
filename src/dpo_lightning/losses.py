"""Policy PairLogps + reference PairLogps -> per-pair loss. Pure tensor code, one function per loss, found by name.

Notation: beta is the strength of the KL constraint; the margin of a pair is
h = (log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x)), in nats, y_w chosen and y_l rejected.
Names and parameters are TRL's. Adding a loss is one function with `@loss`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.errors import UserError
from dpo_lightning.logps import PairLogps

LossFunction = Callable[..., Tensor]
LOSSES: dict[str, LossFunction] = {}


def loss(function: LossFunction) -> LossFunction:
    """Registers a loss under its function's name."""
    LOSSES[function.__name__] = function
    return function


def log_ratios(policy: PairLogps, reference: PairLogps) -> Tensor:
    """log pi(y|x) - log pi_ref(y|x) summed over the completion, [B, 2]: chosen, rejected."""
    return policy.sums - reference.sums


def margins(policy: PairLogps, reference: PairLogps) -> Tensor:
    """h of the module docstring, [B]."""
    ratios = log_ratios(policy, reference)
    return ratios[:, 0] - ratios[:, 1]


@loss
def sigmoid(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, -log sigmoid(beta h): Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With `label_smoothing` e, the share of labels taken to be flipped, it is conservative DPO (Mitchell 2023,
    "A note on DPO with noisy preferences", eq. 3): -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    """
    logits = beta * margins(policy, reference)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


@loss
def hinge(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """max(0, 1 - beta h): the SLiC-HF calibration loss (Zhao et al. 2023, arXiv 2305.10425, eq. 1) on DPO's rewards."""
    return F.relu(1 - beta * margins(policy, reference))


@loss
def ipo(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(h - 1/(2 beta))^2: Azar et al. 2023 (arXiv 2310.12036), eq. 17, beta being its tau.

    The log-ratios in h are averaged over a completion's tokens, as the paper's authors do, so that the target does
    not depend on length.
    """
    ratios = log_ratios(policy, reference) / policy.lengths
    return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)) ** 2


@loss
def sft(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Mean negative log-likelihood of the batch's chosen tokens, the same value for every pair (as in TRL).

    Mixed into DPO it keeps the chosen log-probs from falling (RPO, Pang et al. 2024, arXiv 2404.19733, eq. 1).
    """
    value = -policy.sums[:, 0].sum() / policy.lengths[:, 0].sum()
    return value.expand(policy.num_pairs)


class PreferenceLoss:
    """A weighted sum of losses with their parameters checked: policy and reference PairLogps -> [B].

    Args:
        loss_type: a name in `LOSSES` or several.
        loss_weights: a weight for each; left out, 1 each.
        beta: strength of the KL constraint, > 0.
        label_smoothing: of `sigmoid`, in [0, 0.5).

    Raises:
        UserError: an unknown name, weights that do not match, or a parameter out of its range.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
    ) -> None:
        names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
        if unknown := [name for name in names if name not in LOSSES]:
            raise UserError(f"model.loss_type '{unknown[0]}' is unknown: it is one of {', '.join(LOSSES)}")
        if not names or len(weights) != len(names):
            raise UserError(f"model.loss_weights has {len(weights)} weights for {len(names)} losses; give one for each")
        if not beta > 0:
            raise UserError(f"model.beta is {beta}: it must be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"model.label_smoothing is {label_smoothing}: it must be in [0, 0.5)")
        if label_smoothing and "sigmoid" not in names:
            raise UserError(f"model.label_smoothing is {label_smoothing}, but of the losses only sigmoid uses it")
        self.terms = list(zip(weights, (LOSSES[name] for name in names), strict=True))
        self.parameters = {"beta": beta, "label_smoothing": label_smoothing}

    def __call__(self, policy: PairLogps, reference: PairLogps) -> Tensor:
        losses = [weight * function(policy, reference, **self.parameters) for weight, function in self.terms]
        return torch.stack(losses).sum(0)
