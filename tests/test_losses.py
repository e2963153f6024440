"""Losses against numbers worked out by hand, and their arguments' checks."""

import math
import re

import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.logps import PairLogps
from dpo_lightning.losses import PreferenceLoss


def logps(*pairs):
    """PairLogps from, per pair, the token log-probs of the chosen and of the rejected completion."""
    tokens = [token for pair in pairs for side in pair for token in side]
    sequence = [2 * b + s for b, pair in enumerate(pairs) for s, side in enumerate(pair) for _ in side]
    return PairLogps(torch.tensor(tokens), torch.tensor(sequence), len(pairs))


# Pair 1: log-ratios chosen (-1 - 1) - (-2 - 3) = 3, rejected -4 - (-2) = -2, so h = 5.
# Pair 2: chosen -1 - (-0.5) = -0.5, rejected (-1 - 1) - (-2 - 1) = 1, so h = -1.5.
POLICY = logps(([-1.0, -1.0], [-4.0]), ([-1.0], [-1.0, -1.0]))
REFERENCE = logps(([-2.0, -3.0], [-2.0]), ([-0.5], [-2.0, -1.0]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # -log sigmoid(0.5), -log sigmoid(-0.15)
        ({"loss_type": "sigmoid", "beta": 0.1}, [0.474077, 0.770957]),
        # 0.9 * 0.474077 + 0.1 * 0.974077; 0.9 * 0.770957 + 0.1 * 0.620957
        ({"loss_type": "sigmoid", "beta": 0.1, "label_smoothing": 0.1}, [0.524077, 0.755957]),
        # 1 - 0.5; 1 + 0.15
        ({"loss_type": "hinge", "beta": 0.1}, [0.5, 1.15]),
        # 1 - 2.5 is below 0
        ({"loss_type": "hinge", "beta": 0.5}, [0.0, 1.75]),
        # means per token: 3/2 + 2 = 3.5 and -0.5 - 0.5 = -1; minus 1 / 0.2 = 5; squared
        ({"loss_type": "ipo", "beta": 0.1}, [2.25, 36.0]),
        # 3 nats over 3 chosen tokens
        ({"loss_type": "sft"}, [1.0, 1.0]),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1], "beta": 0.1}, [0.574077, 0.870957]),
    ],
)
def test_hand_derived_values(settings, expected):
    torch.testing.assert_close(
        PreferenceLoss(**settings)(POLICY, REFERENCE), torch.tensor(expected), rtol=1e-5, atol=1e-5
    )


def test_policy_equal_to_reference_costs_ln_2():
    torch.testing.assert_close(PreferenceLoss()(POLICY, POLICY), torch.full((2,), math.log(2)))


def test_sigmoid_gradient_is_beta_times_the_wrong_ones_probability():
    tokens = POLICY.token_logps.clone().requires_grad_()
    PreferenceLoss(beta=0.1)(POLICY._replace(token_logps=tokens), REFERENCE).sum().backward()
    wrong = [0.1 / (1 + math.exp(0.5)), 0.1 / (1 + math.exp(-0.15))]  # beta * sigmoid(-beta h)
    expected = [-wrong[0], -wrong[0], wrong[0], -wrong[1], wrong[1], wrong[1]]
    torch.testing.assert_close(tokens.grad, torch.tensor(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "sigmoyd"}, "model.loss_type 'sigmoyd' is unknown: it is one of sigmoid, hinge, ipo, sft"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"beta": 0.0}, "model.beta is 0.0: it must be above 0"),
        ({"beta": math.nan}, "model.beta is nan"),
        ({"label_smoothing": 0.5}, "model.label_smoothing is 0.5: it must be in [0, 0.5)"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "only sigmoid uses it"),
        ({"loss_type": []}, "0 weights for 0 losses"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        PreferenceLoss(**settings)
