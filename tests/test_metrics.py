import torch

from dpo_lightning.metrics import PAIR_METRICS, PairMetrics
from test_losses import POLICY, REFERENCE, logps


def test_values_are_means_over_pairs():
    metrics = PairMetrics(beta=0.1)
    metrics.update(torch.tensor([0.5, 1.5]), POLICY, REFERENCE)
    found = {name: round(float(value), 5) for name, value in metrics.compute().items()}
    # Log-ratios per token: (1, 2), -2 and -0.5, (1, 0); half their squares: 0.5, 2, 2 and 0.125, 0.5, 0.
    assert found == {
        "loss": 1.0,
        "rewards/chosen": 0.125,
        "rewards/rejected": -0.05,
        "rewards/margins": 0.175,
        "rewards/accuracies": 0.5,
        "rewards/displaced": 0.5,
        "logps/chosen": -1.5,
        "logps/rejected": -3.0,
        "kl": round((4.5 / 3 + 0.625 / 3) / 2, 5),
    }
    assert tuple(found) == PAIR_METRICS


def test_a_short_last_batch_and_several_ranks_do_not_bias():
    big = logps(*[([-1.0], [-2.0])] * 7)
    small = logps(([-5.0], [-2.0]))
    whole, first, second = (PairMetrics(beta=0.1) for _ in range(3))
    whole.update(torch.zeros(8), logps(*[([-1.0], [-2.0])] * 7, ([-5.0], [-2.0])), logps(*[([-1.0], [-1.0])] * 8))
    first.update(torch.zeros(7), big, logps(*[([-1.0], [-1.0])] * 7))
    second.update(torch.zeros(1), small, logps(([-1.0], [-1.0])))
    # What torchmetrics does across ranks: states with dist_reduce_fx="sum" are added.
    first.sums, first.pairs = first.sums + second.sums, first.pairs + second.pairs
    for name, value in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], value)
    assert float(first.compute()["rewards/accuracies"]) == 0.875


def test_nothing_seen_is_nothing_said():
    metrics = PairMetrics(beta=0.1)
    assert metrics.compute() == {}
    metrics.update(torch.tensor([0.5, 1.5]), POLICY, REFERENCE)
    metrics.reset()
    assert metrics.compute() == {}
