"""Per-pair losses and log-probs -> the metrics of preference training, as means over pairs.

The state is sums and counts, so a short last batch has the right weight, and several ranks give what one rank would.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from dpo_lightning.dpo.half_precision import keep_float32
from dpo_lightning.dpo.logps import PairLogps

PAIR_METRICS = (
    "loss",
    "rewards/chosen",  # beta * log-ratio of the chosen completion; see PreferenceLoss.rewards
    "rewards/rejected",
    "rewards/margins",  # chosen - rejected
    "rewards/accuracies",  # share of pairs with a positive margin
    "rewards/displaced",  # share of pairs whose chosen log-prob fell below the reference's
    "logps/chosen",  # summed over the completion, nats
    "logps/rejected",
    "kl",
    "logps/first_token",  # of the chosen completion's first token, nats
    "rewards/first_displaced",  # share of pairs in which it is `FIRST_FALL` less likely than under the reference
    "gradient_weight",  # see `preference_loss.gradient_weights`; in training only
)
FIRST_FALL = 1.0  # nats
OF_REFERENCE = {"rewards/displaced", "rewards/first_displaced", "kl"}  # left out without a reference
OF_CHOSEN = {"rewards/chosen", "rewards/displaced", "logps/chosen", "logps/first_token", "rewards/first_displaced"}
OF_REJECTED, OF_BOTH = {"rewards/rejected", "logps/rejected"}, {"rewards/margins", "rewards/accuracies"}


class PairMetrics(Metric):
    """Means over pairs of `PAIR_METRICS`, under TRL's names where TRL has them.

    `kl` estimates, per pair, how far the policy is from the reference on the data's completion tokens: the mean of
    half the squared log-ratio (the k2 estimator of Schulman 2020, "Approximating KL divergence"), in nats per token.
    The tokens are the data's, not samples of the policy, so read it as a distance that starts at 0.

    Where rows have one completion, what is about chosen ones is a mean over good completions, what is about rejected
    ones over bad completions, and the margin is the difference of their mean rewards.

    The state stays float32 if the module is converted to 16 bits.

    Args:
        reference_free: leave out what compares with a reference.
        keep_margins: keep each pair's margin for `all_margins`.
        in_training: every `update` has the pairs' gradient weights.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor
    margins: list[Tensor]

    def __init__(self, reference_free: bool = False, keep_margins: bool = False, in_training: bool = False) -> None:
        super().__init__()
        self.reference_free, self.keep_margins, self.in_training = reference_free, keep_margins, in_training
        for state in ("sums", "counts"):  # of each metric
            self.add_state(state, torch.zeros(len(PAIR_METRICS), dtype=torch.float32), dist_reduce_fx="sum")
        if keep_margins:
            self.add_state("margins", [], dist_reduce_fx="cat")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> torch.nn.Module:
        # A count in bfloat16 stops growing at 256, or with 16 pairs a batch at 4,096.
        return super()._apply(keep_float32(fn), *args, **kwargs)

    @torch.no_grad()
    def update(
        self,
        losses: Tensor,
        rewards: Tensor,
        policy: PairLogps,
        reference: PairLogps | None,
        gradients: Tensor | None = None,
    ) -> None:
        """Adds a batch of B pairs: `losses` [B], `rewards` [B, 2], log-probs, and in training gradient weights [B]."""
        logps, lengths = policy.sums, policy.lengths
        chosen, rejected = rewards.unbind(1)
        other = policy.token_logps if reference is None else reference.token_logps
        distance = policy._replace(token_logps=0.5 * (policy.token_logps - other).square())
        first = policy.first_tokens[:, 0]
        fall = first.new_zeros(len(first)) if reference is None else reference.first_tokens[:, 0] - first
        values = (
            losses,
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).float(),
            (chosen < 0).float(),
            logps[:, 0],
            logps[:, 1],
            distance.sums.sum(1) / lengths.sum(1),
            first,
            (fall > FIRST_FALL).float(),
            torch.zeros_like(losses) if gradients is None else gradients,
        )
        good, bad = (lengths > 0).unbind(1)
        both = good & bad
        counted = [
            good if name in OF_CHOSEN else bad if name in OF_REJECTED else both if name in OF_BOTH else good | bad
            for name in PAIR_METRICS
        ]
        rows = torch.stack(counted)
        self.sums += (torch.stack(values) * rows).sum(1)
        self.counts += rows.sum(1)
        if self.keep_margins:
            self.margins.append(torch.where(both, chosen - rejected, torch.nan))

    def compute(self) -> dict[str, Tensor]:
        """The mean of each metric over all pairs, a float32 scalar; without those that have no value yet."""
        counts = dict(zip(PAIR_METRICS, self.counts.tolist(), strict=True))
        means = dict(zip(PAIR_METRICS, self.sums / self.counts, strict=True))
        if not counts["rewards/margins"] and counts["rewards/chosen"] and counts["rewards/rejected"]:
            means["rewards/margins"], counts["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"], 1
        left_out = set() if self.in_training else {"gradient_weight"}
        left_out |= OF_REFERENCE if self.reference_free else set()
        return {name: means[name] for name in PAIR_METRICS if counts[name] and name not in left_out}

    def all_margins(self) -> Tensor:
        """The margins [n] of all ranks' pairs since the last reset; n may be 0. To be called on all ranks."""
        with self.sync_context():
            margins = dim_zero_cat(self.margins) if len(self.margins) else self.sums.new_zeros(0)
        return margins[~margins.isnan()]  # a row with one completion has none
