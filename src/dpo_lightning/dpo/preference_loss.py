"""The loss of a run: PairLogps of policy and reference -> per-pair loss and rewards.

`PreferenceLoss` checks the loss settings, adds up the losses of a mixture, and applies what any loss can be combined
with: f-divergences, LD-DPO, WPO, and weights and margins from the data.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.dpo.logps import PairLogps
from dpo_lightning.dpo.losses import LOSSES, Loss, Pairs
from dpo_lightning.errors import UserError, did_you_mean
from dpo_lightning.parsing import Finite, NotNegative, Positive, Share, check_setting


def alpha_score(ratios: Tensor, alpha: float) -> Tensor:
    """f'(t) = (t^(alpha - 1) - 1) / (alpha - 1) at t = exp(ratios), log t at alpha = 1. (The paper's is 1 - alpha.)"""
    if abs(alpha - 1) < 1e-6:
        return ratios
    # Beyond e^80 float32 would overflow; TRL's limit too.
    return torch.expm1(((alpha - 1) * ratios).clamp(max=80.0)) / (alpha - 1)


# f-DPO, Wang et al. 2023 (arXiv 2309.16240), table 1: the log-ratios of DPO become f'(t) at t = pi(y|x) / pi_ref(y|x),
# up to a constant that cancels. Each takes the log-ratios and `f_alpha_divergence_coef`.
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratios, _: ratios,
    "forward_kl": lambda ratios, _: alpha_score(ratios, 0.0),  # 1 - 1/t
    "js_divergence": lambda ratios, _: math.log(2) + F.logsigmoid(ratios),  # log(2 t / (1 + t))
    "alpha_divergence": alpha_score,
}


def length_desensitized(logps: PairLogps, ld_alpha: float) -> Tensor:
    """Summed log-probs [B, 2], the tokens beyond the length of the pair's shorter completion multiplied by `ld_alpha`.

    LD-DPO, Liu et al. 2024 (arXiv 2409.06411): 1 is plain DPO, 0 compares the same number of tokens on both sides.
    """
    lengths = logps.lengths
    starts = lengths.flatten().cumsum(0) - lengths.flatten()
    position = torch.arange(len(logps.sequence), device=starts.device) - starts[logps.sequence]
    excess = position >= lengths.amin(1)[logps.sequence // 2]
    return logps._replace(token_logps=torch.where(excess, ld_alpha * logps.token_logps, logps.token_logps)).sums


@torch.no_grad()
def wpo_weights(policy: PairLogps) -> Tensor:
    """How likely the policy is to generate a pair's completions itself, [B], without gradient.

    WPO, Zhou et al. 2024 (arXiv 2406.11827), eq. 2 with its weight alignment: the geometric mean over tokens of
    p(token) / (sum of p^2 over the vocabulary), multiplied over both completions.
    """
    assert policy.log_sum_squares is not None  # `pair_logps(..., sum_squares=True)`
    aligned = policy._replace(token_logps=policy.token_logps - policy.log_sum_squares)
    return (aligned.sums / policy.lengths).sum(1).exp()


def gradient_weights(losses: Tensor, policy: PairLogps) -> Tensor:
    """How strongly the losses [B] still pull at their pairs: |dL/d log pi| of y_w plus that of y_l, [B].

    For `sigmoid` it is 2 beta sigmoid(-beta h): beta at equal models, and nearly 0 once the margin is wide. The graph
    is kept for the backward pass.
    """
    (slopes,) = torch.autograd.grad(losses.sum(), policy.token_logps, retain_graph=True)
    return (policy._replace(token_logps=slopes.abs()).sums / policy.lengths).sum(1)


class PreferenceLoss:
    """A weighted sum of losses: log-probs of policy and reference -> [B].

    Args:
        loss_type: one or several names in `LOSSES`, which `import_loss` adds to.
        loss_weights: a weight for each loss; 1 each by default.
        beta: strength of the KL constraint, or what the loss's docstring calls beta.
        label_smoothing: share of labels assumed to be flipped, for losses that have this parameter.
        options: the losses' own parameters (`dpop_lambda`, ...), and those that apply to any loss:
            `f_divergence_type` (`reverse_kl`, `forward_kl`, `js_divergence`, `alpha_divergence`) and
            `f_alpha_divergence_coef` (0.5), see `F_DIVERGENCES`; `ld_alpha`, see `length_desensitized`; `use_weighting`
            (False), see `wpo_weights`.

    Attributes:
        needs_reference: whether any of the losses compares with a reference.
        needs_kl: whether any of them needs the batch's KL divergence, for which batches have `mismatched` pairs.
        use_weighting: whether the policy's PairLogps must have `log_sum_squares`.

    Raises:
        UserError: an unknown name or option, a wrong number of weights, a parameter out of its range, or a combination
            that has no meaning.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        loss_weights: Sequence[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        if unknown := [name for name in names if name not in LOSSES]:
            near = did_you_mean(unknown[0], LOSSES)
            known = f"it is one of {', '.join(LOSSES)}, or a function that your own settings name (my_module:my_loss)"
            raise UserError(f"model.loss_type '{unknown[0]}' is unknown: {known}{near}")
        self.losses = [LOSSES[name] for name in names]
        self.weights = self._checked_weights(loss_weights)
        check_setting("model.beta", beta, Positive)
        self.beta = beta
        common, own = self._split_options(options or {})
        if label_smoothing:
            if not any("label_smoothing" in term.parameters for term in self.losses):
                unused = f"the loss {self._named()} does not use it"
                raise UserError(f"model.label_smoothing is {label_smoothing}, but {unused}: set it to 0")
            own["label_smoothing"] = label_smoothing
        self.parameters = [self._own_parameters(term, own) for term in self.losses]
        self._set_common(**common)
        self.needs_reference = not all(term.reference_free for term in self.losses)
        self.needs_kl = any(term.unpaired for term in self.losses)

    # ------------------------------------------------------------------ settings

    def _named(self) -> str:
        return "+".join(term.name for term in self.losses)

    def _checked_weights(self, weights: Sequence[float] | None) -> list[float]:
        count = len(self.losses)
        weights = [1.0] * count if weights is None else list(weights)
        if not count or len(weights) != count:
            raise UserError(f"model.loss_weights has {len(weights)} weights for {count} losses; give one for each")
        for weight in weights:
            check_setting("a weight of model.loss_weights", weight, NotNegative)
        return weights

    def _split_options(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        elsewhere = ("beta", "label_smoothing")
        common = list(inspect.signature(self._set_common).parameters)
        own = list(dict.fromkeys(name for term in self.losses for name in term.parameters if name not in elsewhere))
        for name in options:
            if name in elsewhere:
                raise UserError(f"model.loss_options has '{name}': set model.{name} instead")
            if name not in common + own:
                users = [term.name for term in LOSSES.values() if name in term.parameters]
                why = f"is a parameter of {' and '.join(users)}" if users else "is unknown"
                raise UserError(
                    f"model.loss_options has '{name}', which {why}: with loss_type {self._named()} it may have "
                    f"{', '.join(own + common)}{did_you_mean(name, own + common)}"
                )
        return {n: v for n, v in options.items() if n in common}, {n: v for n, v in options.items() if n in own}

    def _own_parameters(self, term: Loss, options: Mapping[str, Any]) -> dict[str, Any]:
        values = {"beta": self.beta} if "beta" in term.parameters else {}
        for name, parameter in term.parameters.items():
            if name != "beta":
                where = f"model.{name}" if name == "label_smoothing" else f"model.loss_options.{name}"
                values[name] = options.get(name, parameter.default)
                if values[name] is parameter.empty:
                    raise UserError(f"{where} is missing: the loss {term.name} has no default for it")
                check_setting(where, values[name], parameter.annotation)
        return values

    def _set_common(
        self,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        ld_alpha: float | None = None,
        use_weighting: bool = False,
    ) -> None:
        options = "model.loss_options"
        if f_divergence_type not in F_DIVERGENCES:
            known = ", ".join(F_DIVERGENCES) + did_you_mean(f_divergence_type, F_DIVERGENCES)
            raise UserError(f"{options}.f_divergence_type '{f_divergence_type}' is unknown: it is one of {known}")
        if f_divergence_type != "reverse_kl":
            self._require(f"{options}.f_divergence_type {f_divergence_type}", lambda term: term.f_divergence)
        check_setting(f"{options}.f_alpha_divergence_coef", f_alpha_divergence_coef, Finite)
        if f_alpha_divergence_coef != 0.5 and f_divergence_type != "alpha_divergence":
            raise UserError(
                f"{options}.f_alpha_divergence_coef is {f_alpha_divergence_coef}, but f_divergence_type is "
                f"{f_divergence_type}: only alpha_divergence uses it"
            )
        if ld_alpha is not None:
            check_setting(f"{options}.ld_alpha", ld_alpha, Share)
            self._require(f"{options}.ld_alpha", lambda term: not term.reference_free and not term.unpaired)
        check_setting(f"{options}.use_weighting", use_weighting, bool)
        if use_weighting:
            self._require(f"{options}.use_weighting", lambda term: not term.sorts and not term.unpaired)
        self.divergence, self.alpha = F_DIVERGENCES[f_divergence_type], f_alpha_divergence_coef
        self.ld_alpha, self.use_weighting = ld_alpha, use_weighting

    def _require(self, what: str, fits: Callable[[Loss], bool]) -> None:
        """Raises UserError if a setting has no meaning for one of the losses. It never applies to plain likelihoods."""
        terms = [term for term in self.losses if term.preference]
        wrong = [term.name for term in terms if not fits(term)] if terms else [self._named()]
        if wrong:
            able = [term.name for term in LOSSES.values() if term.preference and fits(term)]
            raise UserError(f"{what} has no meaning for the loss {wrong[0]}; it has for {', '.join(able)}")

    def check_columns(self, weight: Tensor, margin: Tensor) -> None:
        """Refuses weights and margins that the losses cannot use. To be called on the host, since it reads the values.

        Args:
            weight: [B], as in PairBatch.
            margin: [B], as in PairBatch.

        Raises:
            UserError: a margin other than 0, or a weight other than 1, that has no meaning for the loss.
        """
        if (margin != 0).any():
            self._require("a margin other than 0 (column `margin` of the data)", lambda term: term.margin)
        if any(term.sorts for term in self.losses) and (weight != 1).any():
            self._require("a weight other than 1 (column `weight` of the data)", lambda term: not term.sorts)

    def check_unpaired(self, name: str) -> None:
        """Raises UserError if one of the losses cannot use rows with one completion, which the data set `name` has."""
        if not self.needs_kl or any(term.preference and not term.unpaired for term in self.losses):
            raise UserError(
                f"the {name} data have rows with one completion and a label, but the loss {self._named()} compares two "
                "completions: set model.loss_type: kto (or data.format: prompt_completion, which ignores the labels)"
            )

    def check_batches(self, *sizes: int) -> None:
        """Raises UserError if a loss compares rows of a batch, but a batch size is 1."""
        if self.needs_kl and 1 in sizes:
            raise UserError(
                "model.loss_type kto compares a row with the other rows of its batch: set data.batch_size (and "
                "data.eval_batch_size) to 2 or more"
            )

    # ------------------------------------------------------------------ values

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None = None,
        weight: Tensor | None = None,
        margin: Tensor | None = None,
        kl: Tensor | None = None,
    ) -> Tensor:
        """Loss of each pair, [B]; training minimizes its mean.

        Args:
            policy: log-probs with gradients.
            reference: of the same pairs; None if not `needs_reference`.
            weight: [B], multiplies each pair's loss. The mean is still over pairs, not over weights, so that
                accumulated and distributed batches add up to the same gradient; weights should average about 1.
            margin: [B], in the unit of beta h; see `check_columns`.
            kl: the KL divergence in the batch, if `needs_kl`: a scalar in nats; None is 0, as before the first step.
        """
        pairs = self._pairs(policy, reference, margin)
        pairs = pairs if kl is None else pairs._replace(kl=kl)
        terms = zip(self.weights, self.losses, self.parameters, strict=True)
        losses = torch.stack([factor * self._values(term, pairs, own) for factor, term, own in terms]).sum(0)
        if self.use_weighting:
            losses = losses * wpo_weights(policy)
        return losses if weight is None else losses * weight

    @staticmethod
    def _values(term: Loss, pairs: Pairs, own: Mapping[str, Any]) -> Tensor:
        values = term.function(pairs, **own)
        if values.shape != pairs.margin.shape:
            shape, wanted = list(values.shape), list(pairs.margin.shape)
            raise UserError(f"the loss {term.name} returns the shape {shape}: it must be {wanted}, a value per pair")
        return values

    def _pairs(self, policy: PairLogps, reference: PairLogps | None, margin: Tensor | None) -> Pairs:
        own = self._sums(policy)
        anchor = torch.zeros_like(own) if reference is None else self._sums(reference)
        return Pairs(
            policy=own,
            reference=anchor,
            scores=self.divergence(own - anchor, self.alpha),
            lengths=policy.lengths,
            margin=own.new_zeros(len(own)) if margin is None else margin,
            nll=-policy.sums[:, 0],
        )

    def _sums(self, logps: PairLogps) -> Tensor:
        return logps.sums if self.ld_alpha is None else length_desensitized(logps, self.ld_alpha)

    def rewards(self, policy: PairLogps, reference: PairLogps | None) -> Tensor:
        """Implicit rewards [B, 2]: beta times the log-ratio, or without a reference beta times log pi(y|x).

        That of a missing completion is 0.

        `simpo` and `orpo` compare means over tokens, so their rewards are means too, as in TRL's trainers.
        """
        if reference is not None:
            return self.beta * (policy.sums - reference.sums)
        per_token = any(term.per_token for term in self.losses)
        return self.beta * (policy.sums / policy.lengths if per_token else policy.sums)
