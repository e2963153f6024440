"""Log-probs of policy and reference -> per-pair loss. Pure tensor code, one function per loss, found by name.

Notation: y_w is the chosen and y_l the rejected completion, r_w and r_l their log-ratios log pi(y|x) - log pi_ref(y|x)
in nats, h = r_w - r_l, beta the strength of the KL constraint, m a pair's margin (0 unless the data has one).
Names and parameters are TRL's, and so are the values of losses that TRL has; docs/losses.md compares them all.

To add a loss, write one function with `@loss()`. It takes `Pairs`; its keyword-only arguments are its parameters with
their ranges and defaults, and the decorator's flags say what it can be combined with. `preference_loss` mixes losses.
Users name their own without any change here: `model.loss_type: my_module:my_loss`.
"""

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.errors import UserError
from dpo_lightning.parsing import NotNegative, Positive, Range
from dpo_lightning.worker import imported_function

FlippedShare = Annotated[float, Range("in [0, 0.5)", lambda value: 0 <= value < 0.5)]
SomeFlippedShare = Annotated[float, Range("in (0, 0.5) for exo_pair, usually 1e-3", lambda value: 0 < value < 0.5)]


class Pairs(NamedTuple):
    """The inputs of a loss for B pairs. Columns are chosen, rejected; log-probs are sums over a completion, in nats."""

    policy: Tensor  # [B, 2] log pi(y|x)
    reference: Tensor  # [B, 2] log pi_ref(y|x); zeros where there is no reference
    scores: Tensor  # [B, 2] the log-ratios, transformed by the f-divergence if there is one
    lengths: Tensor  # [B, 2] completion tokens
    margin: Tensor  # [B] m
    nll: Tensor  # [B] -log pi(y_w|x) of the full completion, whatever ld_alpha is

    @property
    def ratios(self) -> Tensor:
        """r_w and r_l, [B, 2]."""
        return self.policy - self.reference

    def logits(self, beta: float) -> Tensor:
        """beta h - m, [B]; with an f-divergence h is the difference of its scores."""
        return beta * (self.scores[:, 0] - self.scores[:, 1]) - self.margin

    def token_mean_nll(self) -> Tensor:
        """Each pair's part of the negative log-likelihood, [B]: their mean is the mean over the batch's tokens."""
        return self.nll * len(self.nll) / self.lengths[:, 0].sum()


class Loss(NamedTuple):
    """A loss and what it can be combined with."""

    function: Callable[..., Tensor]
    reference_free: bool  # needs the policy's log-probs alone
    f_divergence: bool  # reads `scores`, so that another divergence than the reverse KL makes sense
    margin: bool  # has a logit that a pair's margin is subtracted from
    sorts: bool  # sorts within the batch, so that a value belongs to no pair and cannot be weighted
    per_token: bool  # compares log-probs averaged over tokens, not sums: only where no reference is used
    preference: bool  # compares chosen with rejected; False for a plain likelihood, to which no option applies

    @property
    def name(self) -> str:
        """Its name in `loss_type`."""
        return self.function.__name__

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The function's keyword-only parameters; those without an annotation may have any value."""
        parameters = inspect.signature(self.function, eval_str=True).parameters
        return {
            name: p.replace(annotation=Any) if p.annotation is p.empty else p
            for name, p in parameters.items()
            if p.kind == p.KEYWORD_ONLY
        }


LOSSES: dict[str, Loss] = {}


def loss(
    *,
    reference_free: bool = False,
    f_divergence: bool = False,
    margin: bool = False,
    sorts: bool = False,
    per_token: bool = False,
    preference: bool = True,
) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a loss, `Pairs` and its own parameters -> [B], under its function's name; see `Loss` for the flags."""

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = function.__name__
        if (known := LOSSES.get(name)) and known.function.__module__ != function.__module__:
            raise UserError(f"there is already a loss called {name}: rename the function in {function.__module__}")
        LOSSES[name] = Loss(function, reference_free, f_divergence, margin, sorts, per_token, preference)
        return function

    return register


def import_loss(name: str) -> None:
    """Imports and registers a user's function, named `package.module:function`; without `@loss()` it has no flags.

    Raises:
        UserError: it cannot be imported, or has parameters that are not keyword-only.
    """
    function = imported_function(name, "model.loss_type")
    own = list(inspect.signature(function).parameters.values())[1:]
    if wrong := [p.name for p in own if p.kind != p.KEYWORD_ONLY]:
        raise UserError(f"model.loss_type '{name}': {wrong[0]} must be keyword-only, as in (pairs, *, {wrong[0]})")
    decorated = next((known for known in LOSSES.values() if known.function is function), None)
    LOSSES[name] = decorated or Loss(function, False, False, False, False, False, True)


# ---------------------------------------------------------------------- losses of the chosen-rejected difference


def smoothed_sigmoid(logits: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z): cross entropy if a share e of labels is flipped."""
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


@loss(f_divergence=True, margin=True)
def sigmoid(pairs: Pairs, *, beta: Positive, label_smoothing: FlippedShare = 0.0) -> Tensor:
    """DPO, -log sigmoid(beta h - m): Rafailov et al. 2023 (arXiv 2305.18290), eq. 7.

    With `label_smoothing` it is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences & relationship
    to IPO", eq. 3), which TRL's loss of this name is not; with margins it is DPO with an offset (Amini et al. 2024,
    arXiv 2402.10571).
    """
    return smoothed_sigmoid(pairs.logits(beta), label_smoothing)


@loss(f_divergence=True, margin=True)
def hinge(pairs: Pairs, *, beta: Positive) -> Tensor:
    """max(0, 1 - (beta h - m)): the SLiC-HF calibration loss (Zhao et al. 2023, arXiv 2305.10425, eq. 1) on DPO's h."""
    return F.relu(1 - pairs.logits(beta))


@loss(f_divergence=True)
def ipo(pairs: Pairs, *, beta: Positive) -> Tensor:
    """(h - 1/(2 beta))^2: Azar et al. 2023 (arXiv 2310.12036), eq. 17, beta being its tau.

    The log-ratios in h are averaged over a completion's tokens, as the paper's authors do, so that the target does
    not depend on length.
    """
    scores = pairs.scores / pairs.lengths
    return (scores[:, 0] - scores[:, 1] - 1 / (2 * beta)) ** 2


@loss(f_divergence=True, margin=True)
def robust(pairs: Pairs, *, beta: Positive, label_smoothing: FlippedShare = 0.0) -> Tensor:
    """Robust DPO, ((1 - e) L(z) - e L(-z)) / (1 - 2 e), L = -log sigmoid, z = beta h - m, e = label_smoothing.

    Chowdhury et al. 2024 (arXiv 2403.00409): its expectation under labels flipped with probability e is DPO's loss
    under the true ones. Its minimum is below 0.
    """
    logits = pairs.logits(beta)
    clean, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


@loss(f_divergence=True)
def exo_pair(pairs: Pairs, *, beta: Positive, label_smoothing: SomeFlippedShare = 0.0) -> Tensor:
    """EXO for pairs, KL(q || (1 - e, e)) with q = (sigmoid(beta h), sigmoid(-beta h)), e = label_smoothing.

    Ji et al. 2024 (arXiv 2402.00856), eq. 16: the reverse KL from the policy to the preferences, infinite at e = 0.
    """
    logits = pairs.logits(beta)
    log_q, log_p = (
        (F.logsigmoid(logits), F.logsigmoid(-logits)),
        (math.log1p(-label_smoothing), math.log(label_smoothing)),
    )
    return torch.stack([q.exp() * (q - p) for q, p in zip(log_q, log_p, strict=True)]).sum(0)


@loss(f_divergence=True)
def discopop(pairs: Pairs, *, beta: Positive, discopop_tau: Positive = 0.05) -> Tensor:
    """Log-ratio modulated loss, (1 - s) * -log sigmoid(z) + s * exp(-z), s = sigmoid(z / tau), z = beta h.

    Lu et al. 2024 (arXiv 2406.08414), eq. 5, a loss found by a language model.
    """
    logits = pairs.logits(beta)
    gate = logits / discopop_tau
    # s * exp(-z) in one exponential: apart, a very negative z gives 0 * inf.
    return -F.logsigmoid(logits) * torch.sigmoid(-gate) + torch.exp(F.logsigmoid(gate) - logits)


@loss(f_divergence=True, margin=True)
def sigmoid_norm(pairs: Pairs, *, beta: Positive) -> Tensor:
    """Length-normalized DPO, -log sigmoid(beta (r_w/|y_w| - r_l/|y_l|) - m).

    Lambert et al. 2024 (Tulu 3, arXiv 2411.15124). Per-token log-ratios are small, so beta is larger than DPO's (5 in
    the paper).
    """
    return -F.logsigmoid(pairs._replace(scores=pairs.scores / pairs.lengths).logits(beta))


@loss(margin=True)
def dpop(pairs: Pairs, *, beta: Positive, dpop_lambda: NotNegative = 50.0) -> Tensor:
    """DPO-Positive, -log sigmoid(beta (h - lambda max(0, -r_w)) - m): Pal et al. 2024 (arXiv 2402.13228), section 4.

    The penalty on r_w < 0 keeps the chosen completion from becoming less likely than under the reference, which plain
    DPO allows as long as the rejected one falls faster. The paper uses lambda = 50 with beta = 0.3.
    """
    return -F.logsigmoid(pairs.logits(beta) - beta * dpop_lambda * F.relu(-pairs.ratios[:, 0]))


# ---------------------------------------------------------------------- losses of each completion's own log-ratio


@loss()
def nca_pair(pairs: Pairs, *, beta: Positive) -> Tensor:
    """-log sigmoid(beta r_w) - 1/2 log sigmoid(-beta r_w) - 1/2 log sigmoid(-beta r_l).

    Noise contrastive alignment for two completions, Chen et al. 2024 (arXiv 2402.05369): it holds each log-ratio in
    place where DPO holds only their difference.
    """
    rewards = beta * pairs.ratios
    return -F.logsigmoid(rewards[:, 0]) - 0.5 * F.logsigmoid(-rewards).sum(1)


@loss()
def bco_pair(pairs: Pairs, *, beta: Positive) -> Tensor:
    """Binary classifier optimization, -log sigmoid(beta r_w) - log sigmoid(-beta r_l).

    Jung et al. 2024 (arXiv 2404.04656). As in TRL 1.16 the paper's reward shift, a running mean of the rewards, is 0,
    so that a pair's loss depends on no other pair.
    """
    return -F.logsigmoid(beta * pairs.ratios[:, 0]) - F.logsigmoid(-beta * pairs.ratios[:, 1])


@loss()
def sppo_hard(pairs: Pairs, *, beta: Positive) -> Tensor:
    """(r_w - 1/(2 beta))^2 + (r_l + 1/(2 beta))^2: self-play preference optimization with hard labels.

    Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with win probabilities 1 and 0, beta being 1/eta.
    """
    target = pairs.ratios.new_tensor([0.5 / beta, -0.5 / beta])
    return (pairs.ratios - target).square().sum(1)


@loss()
def apo_zero(pairs: Pairs, *, beta: Positive) -> Tensor:
    """Anchored preference optimization, 1 - sigmoid(beta r_w) + sigmoid(beta r_l): chosen up, rejected down.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7, for chosen completions better than the policy's own.
    """
    return torch.sigmoid(-beta * pairs.ratios[:, 0]) + torch.sigmoid(beta * pairs.ratios[:, 1])


@loss()
def apo_down(pairs: Pairs, *, beta: Positive) -> Tensor:
    """Anchored preference optimization, sigmoid(beta r_w) + 1 - sigmoid(beta h): both down, the rejected one more.

    D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8, for chosen completions worse than the policy's own.
    """
    return torch.sigmoid(beta * pairs.ratios[:, 0]) + torch.sigmoid(-beta * (pairs.ratios[:, 0] - pairs.ratios[:, 1]))


# ---------------------------------------------------------------------- losses of a batch's distribution


@loss(sorts=True)
def aot(pairs: Pairs, *, beta: Positive, label_smoothing: FlippedShare = 0.0) -> Tensor:
    """Alignment via optimal transport, paired: the sigmoid loss of beta (u_(i) - v_(i)), both sorted in the batch.

    Melnyk et al. 2024 (arXiv 2406.05882): u = log pi(y_w|x) - log pi(y_l|x) shall dominate the same difference v under
    the reference in distribution, not pair by pair. It depends on which pairs share a batch, on accumulation and ranks.
    """
    differences = pairs.policy[:, 0] - pairs.policy[:, 1]
    of_reference = pairs.reference[:, 0] - pairs.reference[:, 1]
    return smoothed_sigmoid(beta * (differences.sort().values - of_reference.sort().values), label_smoothing)


@loss(sorts=True)
def aot_unpaired(pairs: Pairs, *, beta: Positive, label_smoothing: FlippedShare = 0.0) -> Tensor:
    """As `aot` with u = r_w and v = r_l: chosen log-ratios shall dominate rejected ones of any prompt.

    Melnyk et al. 2024 (arXiv 2406.05882), its unpaired setting.
    """
    ratios = pairs.ratios.sort(dim=0).values
    return smoothed_sigmoid(beta * (ratios[:, 0] - ratios[:, 1]), label_smoothing)


# ---------------------------------------------------------------------- reference-free losses


@loss(reference_free=True, preference=False)
def sft(pairs: Pairs) -> Tensor:
    """Negative log-likelihood of the chosen completions, averaged over the batch's tokens (as in TRL).

    Mixed into DPO it keeps the chosen log-probs from falling (RPO, Pang et al. 2024, arXiv 2404.19733, eq. 1, which
    averages over a pair's tokens). A pair's value is its part of the batch's mean, so its weight counts for it alone.
    """
    return pairs.token_mean_nll()


@loss(reference_free=True, margin=True, per_token=True)
def simpo(
    pairs: Pairs, *, beta: Positive, simpo_gamma: NotNegative = 0.5, label_smoothing: FlippedShare = 0.0
) -> Tensor:
    """-log sigmoid(beta (log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|) - gamma - m).

    Meng et al. 2024 (arXiv 2405.14734), eq. 6. A per-token log-prob is small, so beta is about 2 and gamma about
    half of it. (TRL adds `cpo_alpha` times the `sft` loss unless that is set to 0; here it is a mixture of the two.)
    """
    means = pairs.policy / pairs.lengths
    return smoothed_sigmoid(beta * (means[:, 0] - means[:, 1]) - simpo_gamma - pairs.margin, label_smoothing)


@loss(reference_free=True, per_token=True)
def orpo(pairs: Pairs, *, beta: Positive) -> Tensor:
    """-log p_w - beta log sigmoid(log odds(p_w) - log odds(p_l)): Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7.

    p is the geometric mean of a completion's token probabilities, odds(p) = p / (1 - p), beta the paper's lambda. The
    first term is the negative log-likelihood of the pair's chosen tokens; TRL's covers the prompt's tokens too.
    """
    means = (pairs.policy / pairs.lengths).clamp(max=-1e-6)  # a certain completion has infinite odds
    log_odds = means - torch.log(-torch.expm1(means))
    return pairs.nll / pairs.lengths[:, 0] - beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])


@loss(reference_free=True, margin=True)
def cpo(pairs: Pairs, *, beta: Positive, cpo_alpha: NotNegative = 1.0, label_smoothing: FlippedShare = 0.0) -> Tensor:
    """-log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x)) - m) + alpha * `sft`: Xu et al. 2024 (arXiv 2401.08417), eq. 3.

    DPO with a uniform reference, held in place by the likelihood of the chosen completions.
    """
    logits = beta * (pairs.policy[:, 0] - pairs.policy[:, 1]) - pairs.margin
    return smoothed_sigmoid(logits, label_smoothing) + cpo_alpha * pairs.token_mean_nll()
