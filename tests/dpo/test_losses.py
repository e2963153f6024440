"""Losses against numbers worked out by hand, the checks of their settings, and their table in the docs."""

import inspect
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import REPO
from dpo_lightning.data.batching import EncodedPair, collate
from dpo_lightning.dpo.logps import PairLogps, Scoring, pair_logps
from dpo_lightning.dpo.losses import LOSSES, Pairs, Positive, loss
from dpo_lightning.dpo.preference_loss import F_DIVERGENCES, PreferenceLoss
from dpo_lightning.errors import UserError


def logps(*pairs):
    """PairLogps from, per pair, the token log-probs of the chosen and of the rejected completion."""
    tokens = [token for pair in pairs for side in pair for token in side]
    sequence = [2 * b + s for b, pair in enumerate(pairs) for s, side in enumerate(pair) for _ in side]
    return PairLogps(torch.tensor(tokens), torch.tensor(sequence), len(pairs))


# Pair 1: r_w = (-1 - 1) - (-2 - 3) = 3, r_l = -4 - (-2) = -2, so h = 5.
# Pair 2: r_w = -1 - (-0.5) = -0.5, r_l = (-1 - 1) - (-2 - 1) = 1, so h = -1.5.
POLICY = logps(([-1.0, -1.0], [-4.0]), ([-1.0], [-1.0, -1.0]))
REFERENCE = logps(([-2.0, -3.0], [-2.0]), ([-0.5], [-2.0, -1.0]))

# L(z) = -log sigmoid(z) = log(1 + exp(-z)), s(z) = sigmoid(z); beta is 0.1 where it is not given.
# L(0.5) = 0.474077, L(-0.5) = 0.974077, s(0.5) = 0.622459; L(-0.15) = 0.770957, L(0.15) = 0.620957, s(-0.15) = 0.462570
# L(0.3) = 0.554355, L(-0.3) = 0.854355, s(0.3) = 0.574443; L(0.2) = 0.598139, L(-0.2) = 0.798139, s(-0.2) = 0.450166
# L(-0.05) = 0.718460, L(0.05) = 0.668460, s(-0.05) = 0.487503; L(-0.1) = 0.744397, L(0.1) = 0.644397, s(0.1) = 0.524979
HAND_DERIVED = [
    # L(0.5), L(-0.15)
    ("sigmoid", {}, [0.474077, 0.770957]),
    # conservative: 0.9 * 0.474077 + 0.1 * 0.974077; 0.9 * 0.770957 + 0.1 * 0.620957
    ("sigmoid", {"label_smoothing": 0.1}, [0.524077, 0.755957]),
    # 1 - 0.5; 1 + 0.15
    ("hinge", {}, [0.5, 1.15]),
    # 1 - 2.5 is below 0
    ("hinge", {"beta": 0.5}, [0.0, 1.75]),
    # means per token: 3/2 + 2 = 3.5 and -0.5 - 0.5 = -1; minus 1 / 0.2 = 5; squared
    ("ipo", {}, [2.25, 36.0]),
    # e = 0 is the sigmoid loss; (0.9 * 0.474077 - 0.1 * 0.974077) / 0.8; (0.9 * 0.770957 - 0.1 * 0.620957) / 0.8
    ("robust", {}, [0.474077, 0.770957]),
    ("robust", {"label_smoothing": 0.1}, [0.411577, 0.789707]),
    # log 0.9 = -0.105361, log 0.1 = -2.302585: 0.622459 (-0.474077 + 0.105361) + 0.377541 (-0.974077 + 2.302585);
    # 0.462570 (-0.770957 + 0.105361) + 0.537430 (-0.620957 + 2.302585)
    ("exo_pair", {"label_smoothing": 0.1}, [0.272055, 0.595872]),
    # tau = 1, exp(-0.5) = 0.606531, exp(0.15) = 1.161834: 0.377541 * 0.474077 + 0.622459 * 0.606531;
    # 0.537430 * 0.770957 + 0.462570 * 1.161834
    ("discopop", {"discopop_tau": 1.0}, [0.556524, 0.951765]),
    # tau = 0.05: s(10) = 0.999955 and s(-3) = 0.047426 mix the same two
    ("discopop", {}, [0.606525, 0.789495]),
    # 2 * 3.5 = 7 and 2 * -1 = -2 (means per token as for ipo): log(1 + e^-7), log(1 + e^2)
    ("sigmoid_norm", {"beta": 2.0}, [0.000911, 2.126928]),
    # only pair 2 has r_w < 0: 0.1 * (-1.5 - 2 * 0.5) = -0.25, log(1 + e^0.25)
    ("dpop", {"dpop_lambda": 2.0}, [0.474077, 0.825939]),
    # 0.1 * (-1.5 - 50 * 0.5) = -2.65, log(1 + e^2.65) = 2.65 + log(1 + e^-2.65)
    ("dpop", {}, [0.474077, 2.718267]),
    # 0.554355 + (0.854355 + 0.598139) / 2; 0.718460 + (0.668460 + 0.744397) / 2
    ("nca_pair", {}, [1.280602, 1.424888]),
    # 0.554355 + 0.598139; 0.718460 + 0.744397
    ("bco_pair", {}, [1.152494, 1.462856]),
    # (3 - 5)^2 + (-2 + 5)^2; (-0.5 - 5)^2 + (1 + 5)^2
    ("sppo_hard", {}, [13.0, 66.25]),
    # 1 - 0.574443 + 0.450166; 1 - 0.487503 + 0.524979
    ("apo_zero", {}, [0.875723, 1.037477]),
    # 0.574443 + 1 - 0.622459; 0.487503 + 1 - 0.462570
    ("apo_down", {}, [0.951983, 1.024932]),
    # z = 0: (1 - 0.574443 + 0.450166) / 2; (1 - 0.487503 + 0.524979) / 2
    ("kto", {}, [0.437862, 0.518738]),
    # (2 * 0.425557 + 0.5 * 0.450166) / 2; (2 * 0.512497 + 0.5 * 0.524979) / 2
    ("kto", {"desirable_weight": 2.0, "undesirable_weight": 0.5}, [0.538099, 0.643742]),
    # policy's differences 2 and 1, sorted 1, 2; reference's -3 and 2.5: 4 and -0.5; log(1 + e^-0.4), log(1 + e^0.05)
    ("aot", {}, [0.513015, 0.718460]),
    # 0.9 * 0.513015 + 0.1 * 0.913015; 0.9 * 0.718460 + 0.1 * 0.668460
    ("aot", {"label_smoothing": 0.1}, [0.553015, 0.713460]),
    # chosen -0.5, 3 minus rejected -2, 1: 1.5 and 2; L(0.15), L(0.2)
    ("aot_unpaired", {}, [0.620957, 0.598139]),
    # 2 and 1 nats over 3 chosen tokens, times 2 pairs: their mean is 1 nat per token
    ("sft", {}, [4 / 3, 2 / 3]),
    # means per token -1 and -4, -1 and -1: 2 * 3 - 0.5 = 5.5, -0.5
    ("simpo", {"beta": 2.0}, [0.004078, 0.974077]),
    ("simpo", {"beta": 2.0, "simpo_gamma": 0.0, "label_smoothing": 0.25}, [1.502476, 0.693147]),  # z = 6, 0
    # log odds of e^-1: -1 - log(1 - e^-1) = -0.541325, of e^-4: -3.981515; L(3.440190) = 0.031558; L(0) = 0.693147
    ("orpo", {}, [1.003156, 1.069315]),
    # sums: L(0.1 * 2), L(0.1 * 1); with the sft term
    ("cpo", {"cpo_alpha": 0.0}, [0.598139, 0.644397]),
    ("cpo", {}, [0.598139 + 4 / 3, 0.644397 + 2 / 3]),
    (["sigmoid", "sft"], {"loss_weights": [1.0, 0.1]}, [0.474077 + 0.4 / 3, 0.770957 + 0.2 / 3]),
    # 1 - e^-3 - (1 - e^2) = 7.339269; 1 - e^0.5 - (1 - e^-1) = -1.280842
    ("sigmoid", {"f_divergence_type": "forward_kl"}, [0.392056, 0.759239]),
    # L(-2) - L(3) = 2.078341; L(1) - L(-0.5) = -0.660815
    ("sigmoid", {"f_divergence_type": "js_divergence"}, [0.594620, 0.726734]),
    # alpha = 0.5: 2 (1 - e^-1.5) - 2 (1 - e^1) = 4.990303; 2 (1 - e^0.25) - 2 (1 - e^-0.5) = -1.354989
    ("sigmoid", {"f_divergence_type": "alpha_divergence"}, [0.474443, 0.763190]),
    # one token of each side counts in full: r_w = -1.5 + 3.5 = 2, h = 4; r_l = -1.5 + 2.5 = 1, h = -1.5
    ("sigmoid", {"ld_alpha": 0.5}, [0.513015, 0.770957]),
    # r_w = -1 + 2 = 1, h = 3; r_l = -1 + 2 = 1, h = -1.5
    ("sigmoid", {"ld_alpha": 0.0}, [0.554355, 0.770957]),
]


def preference_loss(loss_type, settings):
    beside = {"loss_weights", "beta", "label_smoothing"}
    own = {name: settings[name] for name in settings if name not in beside}
    return PreferenceLoss(loss_type, **{name: settings[name] for name in settings if name in beside}, options=own)


@pytest.mark.parametrize(("loss_type", "settings", "expected"), HAND_DERIVED)
def test_hand_derived_values(loss_type, settings, expected):
    found = preference_loss(loss_type, settings)(POLICY, REFERENCE)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-6, atol=2e-6)


def test_kto_measures_from_the_batchs_kl_and_takes_rows_with_one_completion():
    # A good completion with r_w = 3, a bad one with r_l = 1; z = 1.
    policy, reference = logps(([-1.0, -1.0], []), ([], [-1.0, -1.0])), logps(([-2.0, -3.0], []), ([], [-2.0, -1.0]))
    found = PreferenceLoss("kto", options={"undesirable_weight": 3})(policy, reference, kl=torch.tensor(1.0))
    torch.testing.assert_close(found, torch.tensor([0.450166, 3 * 0.5]), rtol=2e-6, atol=2e-6)  # s(-0.2), s(0)
    with_sft = PreferenceLoss(["kto", "sft"])(policy, reference)
    torch.testing.assert_close(with_sft, torch.tensor([0.425557 + 2, 0.524979]), rtol=2e-6, atol=2e-6)
    no_good = PreferenceLoss(["kto", "sft"])(logps(([], [-2.0])), logps(([], [-2.0])))
    torch.testing.assert_close(no_good, torch.tensor([0.5]))


def test_every_loss_has_a_hand_derived_value():
    assert {name for name, _, _ in HAND_DERIVED if isinstance(name, str)} == set(LOSSES)


@pytest.mark.parametrize(
    ("loss_type", "settings", "expected"),
    [
        ("sigmoid", {}, [0.554355, 0.770957]),  # L(0.5 - 0.2), and pair 2 has no margin
        ("hinge", {}, [0.7, 1.15]),
        ("robust", {}, [0.554355, 0.770957]),
        ("dpop", {}, [0.554355, 2.718267]),
        ("cpo", {"cpo_alpha": 0.0}, [0.693147, 0.644397]),  # L(0.2 - 0.2)
        ("sigmoid_norm", {"beta": 2.0}, [0.001113, 2.126928]),  # log(1 + e^-6.8)
        ("simpo", {"beta": 2.0}, [0.004979, 0.974077]),  # log(1 + e^-5.3)
    ],
)
def test_a_pairs_margin_is_subtracted_inside_the_logit(loss_type, settings, expected):
    found = preference_loss(loss_type, settings)(POLICY, REFERENCE, margin=torch.tensor([0.2, 0.0]))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-6, atol=2e-6)
    assert LOSSES[loss_type].margin


def test_a_pairs_weight_multiplies_its_loss_alone():
    weight = torch.tensor([0.0, 3.0])
    for name in ("sigmoid", "sft", "cpo"):
        tokens = POLICY.token_logps.clone().requires_grad_()
        found = PreferenceLoss(name)(POLICY._replace(token_logps=tokens), REFERENCE, weight)
        torch.testing.assert_close(found, PreferenceLoss(name)(POLICY, REFERENCE) * weight)
        found.sum().backward()
        assert (tokens.grad[:3] == 0).all() and (tokens.grad[3] != 0).all()


def test_wpo_weighs_a_pair_by_how_likely_the_policy_gives_it():
    # Aligned log-probs per token: pair 1 (0, 0) and -3, pair 2 0 and (0, 0): weights e^-3 and 1.
    policy = POLICY._replace(log_sum_squares=torch.full((6,), -1.0))
    found = PreferenceLoss(options={"use_weighting": True})(policy, REFERENCE)
    torch.testing.assert_close(found, torch.tensor([0.474077 * math.exp(-3), 0.770957]))


@pytest.mark.parametrize("gathered", [True, False])
@torch.no_grad()
def test_wpos_sums_of_squares_are_the_models(model_folder, gathered, monkeypatch):
    monkeypatch.setattr("dpo_lightning.dpo.head.LOGITS_KEPT", 3 * 4 * 128)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    batch = collate([EncodedPair([5, 6], [7, 8, 2], [9, 2]), EncodedPair([5], [7, 2], [2])], [0, 1])
    assert pair_logps(model, batch).log_sum_squares is None
    found = pair_logps(model, batch, Scoring(gathered=gathered), sum_squares=True).log_sum_squares
    after = [model(torch.tensor([ids])).logits[0, -1].softmax(-1) for ids in ([5, 6], [5, 6, 7], [5, 6, 7, 8])]
    torch.testing.assert_close(found[:3], torch.stack([p.square().sum().log() for p in after]), rtol=1e-4, atol=1e-4)
    assert len(found) == len(batch.targets)


AT_ZERO = {  # loss where policy and reference are equal, with beta = 0.1 and label_smoothing = 0.1 where there is one
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0, "robust": math.log(2), "discopop": 0.5 * math.log(2) + 0.5,
    "exo_pair": 0.5 * math.log(0.25 / 0.09), "sigmoid_norm": math.log(2), "dpop": math.log(2),
    "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 50.0, "apo_zero": 1.0, "apo_down": 1.0,
    "kto": 0.5, "aot": math.log(2), "aot_unpaired": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ZERO)
def test_policy_equal_to_reference_costs_what_the_equation_says(name):
    smoothing = 0.1 if "label_smoothing" in LOSSES[name].parameters else 0.0
    found = PreferenceLoss(name, label_smoothing=smoothing)(POLICY, POLICY)
    torch.testing.assert_close(found, torch.full((2,), AT_ZERO[name]))
    assert {name for name, term in LOSSES.items() if not term.reference_free} == set(AT_ZERO)


def test_sigmoid_gradient_is_beta_times_the_wrong_ones_probability():
    tokens = POLICY.token_logps.clone().requires_grad_()
    PreferenceLoss(beta=0.1)(POLICY._replace(token_logps=tokens), REFERENCE).sum().backward()
    wrong = [0.1 / (1 + math.exp(0.5)), 0.1 / (1 + math.exp(-0.15))]  # beta * sigmoid(-beta h)
    expected = [-wrong[0], -wrong[0], wrong[0], -wrong[1], wrong[1], wrong[1]]
    torch.testing.assert_close(tokens.grad, torch.tensor(expected))


def test_dpop_pulls_a_chosen_completion_back_up_to_its_reference():
    tokens = POLICY.token_logps.clone().requires_grad_()
    PreferenceLoss("dpop", beta=0.1, options={"dpop_lambda": 2.0})(
        POLICY._replace(token_logps=tokens), REFERENCE
    ).sum().backward()
    wrong = [0.1 / (1 + math.exp(0.5)), 0.1 / (1 + math.exp(-0.25))]
    # Pair 2's chosen token, below its reference, is pushed 1 + lambda = 3 times as hard as the rejected ones.
    expected = [-wrong[0], -wrong[0], wrong[0], -3 * wrong[1], wrong[1], wrong[1]]
    torch.testing.assert_close(tokens.grad, torch.tensor(expected))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [-2000.0, 2000.0, 0.0])
def test_values_and_gradients_stay_finite_far_from_the_reference(name, far):
    """A pair whose log-ratios are as far as float32 training gets them, and a completion of probability 1."""
    chosen, rejected = (-2000.0, 0.0) if far < 0 else (0.0, -2000.0) if far > 0 else (0.0, 0.0)
    policy = logps(([chosen], [rejected]), ([-1.0], [-1.0]))
    tokens = policy.token_logps.clone().requires_grad_()
    kinds = F_DIVERGENCES if LOSSES[name].f_divergence else ["reverse_kl"]
    for kind in kinds:
        smoothing = 0.1 if "label_smoothing" in LOSSES[name].parameters else 0.0
        term = PreferenceLoss(name, label_smoothing=smoothing, options={"f_divergence_type": kind})
        value = term(policy._replace(token_logps=tokens), logps(([-1000.0], [-1000.0]), ([-1.0], [-1.0])))
        (gradient,) = torch.autograd.grad(value.sum(), tokens)
        if not (name == "ipo" and kind in ("forward_kl", "alpha_divergence")):  # squares e^80, too much by its equation
            assert value.isfinite().all() and gradient.isfinite().all(), kind


@pytest.mark.parametrize(
    ("loss_type", "settings", "message"),
    [
        ("sigmoyd", {}, "model.loss_type 'sigmoyd' is unknown: it is one of sigmoid, hinge, ipo"),
        (["sigmoid", "sft"], {"loss_weights": [1.0]}, "1 weights for 2 losses"),
        (["sigmoid", "sft"], {"loss_weights": [1.0, -1.0]}, "a weight of model.loss_weights is -1.0: it must be 0 or"),
        ([], {}, "0 weights for 0 losses"),
        ("sigmoid", {"beta": 0.0}, "model.beta is 0.0: it must be above 0"),
        ("sigmoid", {"beta": math.nan}, "model.beta is nan"),
        ("sigmoid", {"beta": "0.1"}, "model.beta is '0.1': it must be a number, above 0"),
        ("sigmoid", {"label_smoothing": 0.5}, "model.label_smoothing is 0.5: it must be in [0, 0.5)"),
        ("exo_pair", {}, "model.label_smoothing is 0.0: it must be in (0, 0.5) for exo_pair, usually 1e-3"),
        ("hinge", {"label_smoothing": 0.1}, "model.label_smoothing is 0.1, but the loss hinge does not use it"),
        ("discopop", {"discopop_tau": 0.0}, "model.loss_options.discopop_tau is 0.0: it must be above 0"),
        ("dpop", {"dpop_lambda": -1}, "model.loss_options.dpop_lambda is -1: it must be 0 or more"),
        ("simpo", {"simpo_gamma": math.inf}, "model.loss_options.simpo_gamma is inf"),
        ("cpo", {"cpo_alpha": True}, "model.loss_options.cpo_alpha is True"),
        ("sigmoid", {"dpop_lambda": 1.0}, "'dpop_lambda', which is a parameter of dpop: with loss_type sigmoid it may"),
        ("dpop", {"lambda": 1.0}, "'lambda', which is unknown: with loss_type dpop it may have dpop_lambda, f_div"),
        ("sigmoid", {"f_divergence_type": "kl"}, "f_divergence_type 'kl' is unknown: it is one of reverse_kl,"),
        (["sigmoid", "nca_pair"], {"f_divergence_type": "forward_kl"},
         "f_divergence_type forward_kl has no meaning for the loss nca_pair; it has for sigmoid, hinge"),
        ("sigmoid", {"f_alpha_divergence_coef": 0.3}, "f_divergence_type is reverse_kl: only alpha_divergence uses it"),
        ("sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": math.nan}, "coef is nan"),
        ("sigmoid", {"ld_alpha": 1.1}, "model.loss_options.ld_alpha is 1.1: it must be in [0, 1]"),
        ("simpo", {"ld_alpha": 0.5}, "ld_alpha has no meaning for the loss simpo"),
        ("sft", {"ld_alpha": 0.5}, "ld_alpha has no meaning for the loss sft"),
        ("aot", {"use_weighting": True}, "use_weighting has no meaning for the loss aot"),
        ("kto", {"use_weighting": True}, "use_weighting has no meaning for the loss kto"),
        ("kto", {"ld_alpha": 0.5}, "ld_alpha has no meaning for the loss kto"),
        ("kto", {"desirable_weight": -1}, "model.loss_options.desirable_weight is -1: it must be 0 or more"),
        ("sigmoid", {"use_weighting": "yes"}, "use_weighting is 'yes': it must be true or false"),
    ],
)  # fmt: skip
def test_settings_without_meaning_are_refused(loss_type, settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        preference_loss(loss_type, settings)


def test_settings_that_stand_beside_the_options_are_not_taken_among_them():
    with pytest.raises(UserError, match="loss_options has 'beta': set model.beta instead"):
        PreferenceLoss(options={"beta": 0.2})


def test_columns_that_a_loss_cannot_use_are_refused():
    none, one, some = torch.zeros(2), torch.ones(2), torch.tensor([0.0, 0.5])
    for name in LOSSES:
        term = PreferenceLoss(name, label_smoothing=0.1 if name == "exo_pair" else 0.0)
        term.check_columns(weight=one, margin=none)
        if not LOSSES[name].margin:
            with pytest.raises(UserError, match=f"a margin other than 0 .*no meaning for the loss {name}; it has for"):
                term.check_columns(weight=one, margin=some)
        if LOSSES[name].sorts:
            with pytest.raises(UserError, match=f"a weight other than 1 .*no meaning for the loss {name}; it has for"):
                term.check_columns(weight=some, margin=none)
    PreferenceLoss(["sigmoid", "sft"]).check_columns(weight=some, margin=some)


@pytest.mark.parametrize("names", ["sigmoid", "sft", ["kto", "sigmoid"]])
def test_rows_with_one_completion_need_kto(names):
    PreferenceLoss(["kto", "sft"]).check_unpaired("train")
    with pytest.raises(UserError, match="the val data have rows with one completion .* set model.loss_type: kto"):
        PreferenceLoss(names).check_unpaired("val")


def test_a_reference_is_needed_where_any_loss_compares_with_one():
    assert {name for name, term in LOSSES.items() if term.reference_free} == {"sft", "simpo", "orpo", "cpo"}
    assert not PreferenceLoss(["simpo", "sft"]).needs_reference
    assert PreferenceLoss(["simpo", "sigmoid"]).needs_reference


def test_a_new_loss_is_one_function(monkeypatch):
    monkeypatch.setitem(LOSSES, "squared", None)  # taken out again after the test

    @loss(margin=True)
    def squared(pairs: Pairs, *, beta: Positive, power: Positive = 2.0) -> torch.Tensor:
        return (1 - pairs.logits(beta)) ** power

    found = PreferenceLoss(["squared", "sft"], beta=0.1)(POLICY, REFERENCE)
    torch.testing.assert_close(found, torch.tensor([0.25 + 4 / 3, 1.3225 + 2 / 3]))
    with pytest.raises(UserError, match="model.loss_options.power is 0: it must be above 0"):
        PreferenceLoss("squared", options={"power": 0})


DOCS = (REPO / "docs" / "losses.md").read_text()


def test_the_page_has_every_loss_with_its_equation_parameters_and_paper():
    equations, parameters = DOCS.split("## Parameters and papers")
    rows = [dict(re.findall(r"^\| `(\w+)` \|(.*)\|$", part, re.M)) for part in (equations, parameters)]
    assert set(rows[0]) == set(rows[1]) == set(LOSSES)
    for row in rows[0].values():
        equation, when = (cell.strip() for cell in row.split(" | "))
        assert equation.startswith("$`") and when
    for name, row in rows[1].items():
        settings, paper, checked = (cell.strip() for cell in row.split(" | "))
        assert set(re.findall(r"(?<!\$)`(\w+)`(?!\$)", settings)) == set(LOSSES[name].parameters)
        assert re.findall(r"\d{4}\.\d{5}", paper)[0] in inspect.getdoc(LOSSES[name].function)
        assert checked.startswith("hand") and ("TRL" in checked) == (name != "dpop")
