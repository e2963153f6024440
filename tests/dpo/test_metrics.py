import pytest
import torch
from test_losses import POLICY, REFERENCE, logps

from dpo_lightning.dpo.metrics import OF_REFERENCE, PAIR_METRICS, PairMetrics
from dpo_lightning.dpo.preference_loss import PreferenceLoss, gradient_weights

rewards = PreferenceLoss(beta=0.1).rewards


def test_values_are_means_over_pairs():
    metrics = PairMetrics()
    metrics.update(torch.tensor([0.5, 1.5]), rewards(POLICY, REFERENCE), POLICY, REFERENCE)
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
        "logps/first_token": -1.0,  # of -1 and -1
        "rewards/first_displaced": 0.0,
    }
    assert tuple(found) == PAIR_METRICS[:-1]


def test_a_short_last_batch_and_several_ranks_do_not_bias():
    big = logps(*[([-1.0], [-2.0])] * 7)
    small = logps(([-5.0], [-2.0]))
    both = logps(*[([-1.0], [-2.0])] * 7, ([-5.0], [-2.0]))
    whole, first, second = (PairMetrics() for _ in range(3))
    for metrics, policy in ((whole, both), (first, big), (second, small)):
        reference = logps(*[([-1.0], [-1.0])] * policy.num_pairs)
        metrics.update(torch.zeros(policy.num_pairs), rewards(policy, reference), policy, reference)
    # What torchmetrics does across ranks: states with dist_reduce_fx="sum" are added.
    for name in first.metric_state:
        setattr(first, name, getattr(first, name) + getattr(second, name))
    for name, value in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], value)
    assert float(first.compute()["rewards/accuracies"]) == 0.875


def test_nothing_seen_is_nothing_said():
    metrics = PairMetrics()
    assert metrics.compute() == {}
    metrics.update(torch.tensor([0.5, 1.5]), rewards(POLICY, REFERENCE), POLICY, REFERENCE)
    metrics.reset()
    assert metrics.compute() == {}


def test_without_a_reference_nothing_is_compared_with_it():
    metrics = PairMetrics(reference_free=True)
    metrics.update(torch.zeros(2), PreferenceLoss("simpo", beta=2.0).rewards(POLICY, None), POLICY, None)
    found = metrics.compute()
    assert set(PAIR_METRICS[:-1]) - set(found) == OF_REFERENCE
    # beta times the mean log-prob per token: chosen 2 * (-1, -1), rejected 2 * (-4, -1).
    assert (float(found["rewards/chosen"]), float(found["rewards/rejected"])) == (-2.0, -5.0)
    metrics.reset()
    metrics.update(torch.zeros(2), PreferenceLoss("cpo", beta=2.0).rewards(POLICY, None), POLICY, None)
    assert float(metrics.compute()["rewards/chosen"]) == -3.0  # of the sums -2 and -1


def test_a_first_token_counts_as_displaced_from_one_nat_on():
    policy = logps(([-3.0, -1.0], [-9.0]), ([-2.9, -1.0], [-9.0]), ([-2.0], [-9.0, -5.0]))
    reference = logps(([-1.9, -9.0], [-0.0]), ([-2.0, -1.0], [-0.0]), ([-2.0], [-0.0, -5.0]))
    metrics = PairMetrics()
    metrics.update(torch.zeros(3), rewards(policy, reference), policy, reference)
    found = metrics.compute()
    assert float(found["rewards/first_displaced"]) == pytest.approx(1 / 3)
    assert float(found["logps/first_token"]) == pytest.approx((-3.0 - 2.9 - 2.0) / 3)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_gradient_weights_are_the_slopes_in_both_log_probs(loss_type):
    policy = POLICY._replace(token_logps=POLICY.token_logps.clone().requires_grad_())
    losses = PreferenceLoss(loss_type, beta=0.1)(policy, REFERENCE)
    ratios = POLICY.sums - REFERENCE.sums
    h, per_token = (r[:, 0] - r[:, 1] for r in (ratios, ratios / POLICY.lengths))
    expected = {
        "sigmoid": 2 * 0.1 * torch.sigmoid(-0.1 * h),
        "hinge": torch.full_like(h, 2 * 0.1),
        "ipo": 2 * (per_token - 5).abs() * (1 / POLICY.lengths).sum(1),
    }
    torch.testing.assert_close(gradient_weights(losses, policy), expected[loss_type])
    losses.sum().backward()  # the graph is still there


def test_rows_with_one_completion_count_on_their_side_alone():
    metrics = PairMetrics(keep_margins=True)
    policy = logps(([-1.0, -1.0], []), ([-4.0], []), ([], [-3.0]))
    reference = logps(([-2.0, -3.0], []), ([-3.0], []), ([], [-1.0]))
    metrics.update(torch.tensor([0.5, 1.5, 4.0]), rewards(policy, reference), policy, reference)
    found = {name: round(float(value), 5) for name, value in metrics.compute().items()}
    kl = ((0.5 + 2) / 2 + 0.5 + 2) / 3  # log-ratios 1 and 2; -1; -2
    assert found == {
        "loss": 2.0,
        "rewards/chosen": 0.1,  # (0.3 - 0.1) / 2
        "rewards/rejected": -0.2,
        "rewards/margins": 0.3,
        "rewards/displaced": 0.5,
        "logps/chosen": -3.0,
        "logps/rejected": -3.0,
        "kl": round(kl, 5),
        "logps/first_token": -2.5,  # (-1 - 4) / 2
        "rewards/first_displaced": 0.0,
    }
    assert len(metrics.all_margins()) == 0
    metrics.reset()
    metrics.update(torch.zeros(1), torch.tensor([[0.3, 0.0]]), logps(([-1.0], [])), logps(([-4.0], [])))
    assert not {"rewards/rejected", "logps/rejected", "rewards/margins"} & set(metrics.compute())
