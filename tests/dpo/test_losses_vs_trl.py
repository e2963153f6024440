"""Value and gradient of every loss that TRL has, against TRL's own code, in float64 on the same pairs.

The model is a bigram table: the logits of the next token are the row of the last one. TRL's trainers run on it as on
any causal LM, with their own collator, made without their `__init__`, which wants a model of transformers.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.data.batching import EncodedPair, collate
from dpo_lightning.dpo.logps import PairLogps
from dpo_lightning.dpo.losses import LOSSES
from dpo_lightning.dpo.preference_loss import PreferenceLoss

VOCABULARY = 12
PAIRS = [
    EncodedPair([3, 4], [5, 6, 7, 1], [8, 1]),
    EncodedPair([9], [2, 1], [10, 11, 6, 5, 1]),
    EncodedPair([4, 4, 7], [1], [3, 1]),
    EncodedPair([6, 2], [7, 8, 1], [9, 2, 1]),
    EncodedPair([11], [10, 9, 1], [1]),
]


class Bigram(torch.nn.Module):
    """As TRL sees a causal LM: with logits, or with what its fused head gives."""

    is_gradient_checkpointing = False

    def __init__(self, seed, scale=1.0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        self.table = torch.nn.Parameter((scale * table).to(dtype))

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        logits = self.table[input_ids]
        output = SimpleNamespace(logits=logits)
        if labels is not None:
            logp, targets = logits[:, :-1].log_softmax(-1), labels[:, 1:]
            zeros = torch.zeros(targets.shape)
            picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            output.log_probs = picked.masked_fill(targets == -100, 0)
            output.log_sum_sq_probs = (2 * logp).logsumexp(-1).detach()
            output.entropy, output.mean_logits, output.is_top1 = zeros, zeros, zeros.bool()
        return output

    def logps(self, batch):
        """PairLogps of a PairBatch."""
        logp = self.table.log_softmax(-1)
        previous = batch.input_ids.flatten()[batch.predict_index]
        squares = (2 * logp.detach()).logsumexp(-1)[previous]
        token_logps = logp[previous, batch.targets]
        return PairLogps(token_logps, batch.sequence, batch.num_pairs, log_sum_squares=squares)


def trainer_of(kind, **attributes):
    trainer = object.__new__(kind)
    gather = SimpleNamespace(device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t)
    vars(trainer).update(
        {"accelerator": gather, "aux_loss_enabled": False, "is_encoder_decoder": False, "pad_token_id": 0} | attributes
    )
    return trainer


def trl_dpo(policy, reference, settings):
    """TRL's DPOTrainer._compute_loss, with its defaults where `settings` has nothing."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    own = {"discopop_tau": 0.05, "gradient_checkpointing_kwargs": None} | settings
    names = [own["loss_type"]] if isinstance(own["loss_type"], str) else own["loss_type"]
    trainer = trainer_of(
        DPOTrainer,
        model=policy,
        ref_model=reference,
        precompute_ref_logps=False,
        loss_types=names,
        loss_weights=own.get("loss_weights") or [1.0] * len(names),
        beta=own["beta"],
        label_smoothing=own.get("label_smoothing", 0.0),
        ld_alpha=own.get("ld_alpha"),
        f_divergence_type=own.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=own.get("f_alpha_divergence_coef", 0.5),
        use_weighting=own.get("use_weighting", False),
        args=SimpleNamespace(**own),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    rows = [pair._asdict() for pair in PAIRS]
    inputs = DataCollatorForPreference(pad_token_id=0).torch_call(rows)
    torch.set_default_dtype(policy.table.dtype)  # TRL's exo_pair makes its label_smoothing a tensor
    try:
        return trainer._compute_loss(policy, inputs, return_outputs=False)
    finally:
        torch.set_default_dtype(torch.float32)


def value_and_gradient(policy, loss):
    (gradient,) = torch.autograd.grad(loss, policy.table)
    return loss.item(), gradient


def ours(policy, reference, settings, pairs=PAIRS):
    beside = {"loss_type", "loss_weights", "beta", "label_smoothing"}
    given = {name: value for name, value in settings.items() if name in beside}
    loss = PreferenceLoss(**given, options={name: settings[name] for name in settings if name not in beside})
    batch = collate(pairs, range(len(pairs)))
    with torch.no_grad():
        other = reference.logps(batch) if loss.needs_reference else None
    return value_and_gradient(policy, loss(policy.logps(batch), other, batch.weight, batch.margin).mean())


def assert_equal(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    assert expected[1].abs().max() > 1e-3, "there must be a gradient to compare"
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)


OF_TRLS_DPO = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # TRL 1.16's sigmoid ignores label_smoothing
DIVERGING = [name for name in OF_TRLS_DPO if LOSSES[name].f_divergence]


def case(names, beta=0.3, **settings):
    smoothing = {"label_smoothing": 0.1} if SMOOTHED & {names, *names} else {}
    return {"loss_type": names, "beta": beta} | smoothing | settings


CASES = [
    *(case(name) for name in OF_TRLS_DPO),
    *(case(name, beta=1.5, label_smoothing=0.4) for name in sorted(SMOOTHED)),
    case("discopop", beta=0.1, discopop_tau=0.5),
    case(("sigmoid", "bco_pair", "sft"), beta=0.1, loss_weights=[0.8, 0.2, 1.0]),
    case(("aot", "hinge", "sigmoid_norm"), beta=0.7, loss_weights=[2.0, 0.5, 1.0]),
    *(case(name, f_divergence_type=kind) for name in DIVERGING for kind in ("forward_kl", "js_divergence")),
    case(("sigmoid", "sft"), f_divergence_type="js_divergence"),
    *(case(name, ld_alpha=share) for name in ("sigmoid", "ipo", "nca_pair") for share in (0.0, 0.4)),
    case(("aot", "sft"), ld_alpha=0.5),
    case("apo_down", ld_alpha=1.0),
    # (Not hinge: TRL 1.16 fails in its backward pass there, having weighted a ReLU's output in place.)
    *(case(name, use_weighting=True) for name in ("sigmoid", "ipo", "sppo_hard", "exo_pair")),
    case(("sigmoid", "apo_zero"), use_weighting=True, ld_alpha=0.2),
]


def test_every_loss_of_trls_dpo_trainer_is_compared():
    from trl import DPOConfig

    described = DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert {name for name in LOSSES if f"`'{name}'`" in described} == set(OF_TRLS_DPO)
    assert set(LOSSES) - set(OF_TRLS_DPO) == {"dpop", "simpo", "orpo", "cpo", "kto"}
    assert set(DIVERGING) == {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(str(value) for value in s.values()))
def test_value_and_gradient_are_those_of_trls_dpo_trainer(settings):
    policy, reference = Bigram(0), Bigram(1)
    expected = value_and_gradient(policy, trl_dpo(policy, reference, settings))
    assert_equal(ours(policy, reference, settings), expected, 1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["sigmoid", "ipo"])
def test_alpha_divergence_is_trls_in_float32_the_only_dtype_it_has_there(name, alpha):
    policy, reference = Bigram(0, dtype=torch.float32), Bigram(1, dtype=torch.float32)
    settings = {
        "loss_type": name,
        "beta": 0.3,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": alpha,
    }
    expected = value_and_gradient(policy, trl_dpo(policy, reference, settings))
    assert_equal(ours(policy, reference, settings), expected, 2e-5)


def reference_free_rows(pairs):
    """Pairs as the collators of TRL's CPOTrainer and ORPOTrainer give them: labels are -100 at prompt and padding."""
    rows = {}
    for side in ("chosen", "rejected"):
        sequences = [pair.prompt_ids + getattr(pair, f"{side}_ids") for pair in pairs]
        width = max(map(len, sequences))
        padded = torch.tensor([ids + [0] * (width - len(ids)) for ids in sequences])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in sequences])
        prompts = torch.tensor([[len(pair.prompt_ids)] for pair in pairs])
        labels = padded.masked_fill((mask == 0) | (torch.arange(width) < prompts), -100)
        rows |= {f"{side}_input_ids": padded, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "cpo", "beta": 0.3},
        {"loss_type": "cpo", "beta": 0.3, "cpo_alpha": 0.0},
        {"loss_type": "cpo", "beta": 0.3, "cpo_alpha": 0.25},
        {"loss_type": "simpo", "beta": 2.0},
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.4},
        {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5], "beta": 2.0},  # TRL's cpo_alpha 0.5
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_value_and_gradient_are_those_of_trls_cpo_trainer(settings, smoothing):
    from trl.experimental.cpo import CPOTrainer

    policy = Bigram(0)
    cpo = settings["loss_type"] == "cpo"
    trainer = trainer_of(
        CPOTrainer,
        loss_type="sigmoid" if cpo else "simpo",
        beta=settings["beta"],
        label_smoothing=smoothing,
        alpha=0.0,
        cpo_alpha=settings.get("cpo_alpha", 1.0) if cpo else settings.get("loss_weights", [1.0, 0.0])[1],
        simpo_gamma=settings.get("simpo_gamma", 0.5),
    )
    loss, _ = trainer.get_batch_loss_metrics(policy, reference_free_rows(PAIRS))
    expected = value_and_gradient(policy, loss)
    assert_equal(ours(policy, None, settings | {"label_smoothing": smoothing}), expected, 1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_orpo_is_trls_where_both_take_the_likelihood_of_the_same_tokens():
    """With one-token prompts TRL's sums no prompt token, with equal lengths its mean over tokens is one over pairs."""
    from trl.experimental.orpo import ORPOTrainer

    pairs = [EncodedPair(p.prompt_ids[-1:], [4 + i, 5, 1], p.rejected_ids) for i, p in enumerate(PAIRS)]
    policy = Bigram(0)
    loss, _ = trainer_of(ORPOTrainer, beta=0.4, padding_value=0).get_batch_loss_metrics(
        policy, reference_free_rows(pairs)
    )
    expected = value_and_gradient(policy, loss)
    # TRL computes the odds in float32 whatever the model's dtype is.
    assert_equal(ours(policy, None, {"loss_type": "orpo", "beta": 0.4}, pairs), expected, 1e-6)


def trl_kto(policy, reference, rows, **settings):
    """TRL's KTOTrainer._compute_loss on a batch of (prompt, completion, label)."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

    trainer = trainer_of(
        KTOTrainer,
        model=policy,
        ref_model=reference,
        precompute_ref_logps=False,
        loss_type="kto",
        calculate_KL=True,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    completions = [completion for _, completion, _ in rows]
    examples = [  # KL_completion_ids as its _prepare_dataset gives them
        {"prompt_ids": prompt, "completion_ids": completion, "label": label, "KL_completion_ids": other}
        for (prompt, completion, label), other in zip(rows, completions[-1:] + completions[:-1], strict=True)
    ]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=0).torch_call(examples)
    loss = trainer._compute_loss(policy, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]["kl"][0]


THUMBS = [
    pair._replace(rejected_ids=[]) if number % 2 else pair._replace(chosen_ids=[]) for number, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)], ids=["kl above 0", "kl below 0"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
@pytest.mark.parametrize("pairs", [THUMBS, PAIRS, THUMBS[:1], THUMBS[::2]], ids=["thumbs", "pairs", "one", "bad"])
def test_kto_is_trls(pairs, weights, seeds):
    policy, reference = (Bigram(seed) for seed in seeds)
    settings = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    rows = [(pair.prompt_ids, pair.chosen_ids, True) for pair in pairs if pair.chosen_ids]
    rows += [(pair.prompt_ids, pair.rejected_ids, False) for pair in pairs if pair.rejected_ids]
    if pairs is THUMBS:  # TRL's pairs are all chosen, then all rejected completions
        rows = [(pair.prompt_ids, pair.chosen_ids or pair.rejected_ids, bool(pair.chosen_ids)) for pair in pairs]
    loss, kl = trl_kto(policy, reference, rows, **settings)
    assert len(pairs) == 1 or (kl > 0) == (seeds == (0, 1))
    expected = value_and_gradient(policy, loss)

    batch = collate(pairs, range(len(pairs)), mismatch_length=100)
    with torch.no_grad():
        mismatched = [model.logps(batch.mismatched) for model in (policy, reference)]
        found_kl = (mismatched[0].sums - mismatched[1].sums).sum() / (mismatched[0].lengths > 0).sum()
        other = reference.logps(batch)
    beta = settings.pop("beta")
    losses = PreferenceLoss("kto", beta=beta, options=settings)(policy.logps(batch), other, kl=found_kl.clamp(min=0))
    assert_equal(value_and_gradient(policy, losses.mean()), expected, 1e-9)
