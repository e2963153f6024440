import copy
import math
import re

import pytest
import torch
from lightning.pytorch import Callback
from transformers import AutoModelForCausalLM, get_scheduler

from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.dpo.packing import PACKED
from dpo_lightning.dpo.reference import AdapterOff, FrozenCopy
from dpo_lightning.dpo.schedules import rate_at
from dpo_lightning.errors import UserError
from dpo_lightning.internals.transformers import attention_in_use
from dpo_lightning.models.hardware import fastest_attention

LORA = {"r": 4, "lora_alpha": 8}


@pytest.fixture
def data(tokenizer, rows_file):
    return lambda **options: PreferenceDataModule(
        tokenizer, rows_file, **{"val_size": 4, "test_size": 4, "batch_size": 4, "shuffle": False} | options
    )


@pytest.fixture
def module(model_folder):
    return lambda **options: DPOModule(str(model_folder), **{"learning_rate": 1e-3, "warmup_steps": 0} | options)


class Record:
    """Collects what a module logs per step: `losses` of each training step."""

    def __init__(self, module):
        self.losses, step = [], module.training_step

        def training_step(batch, batch_idx):
            loss = step(batch, batch_idx)
            self.losses.append(loss.item())
            return loss

        module.training_step = training_step


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.policy.named_parameters()}


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_first_loss_is_that_of_a_zero_margin_and_training_widens_it(data, module, quiet_trainer, lora, loss_type):
    trainer, dpo = quiet_trainer(log_every_n_steps=1, max_epochs=2), module(lora=lora, loss_type=loss_type)
    record = Record(dpo)
    trainer.fit(dpo, data())
    at_zero = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}[loss_type]
    assert record.losses[0] == pytest.approx(at_zero, abs=1e-5)
    assert trainer.callback_metrics["train/rewards/margins"] > 0.01
    assert trainer.callback_metrics["val/loss"] < at_zero


@torch.no_grad()
def test_margins_are_zero_before_training(data, module, quiet_trainer):
    trainer = quiet_trainer()
    (result,) = trainer.test(module(), data(rejected="shuffled"), verbose=False)
    assert result["test/loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl", "rewards/displaced"):
        assert result[f"test/{name}"] == pytest.approx(0, abs=1e-6)


def test_reference_is_bitwise_unchanged_by_training_and_policy_is_not(data, module, quiet_trainer):
    dpo = module()
    dpo.configure_model()
    before = copy.deepcopy(dpo.reference.model.state_dict())
    trained = weights(dpo)
    quiet_trainer().fit(dpo, data())
    assert isinstance(dpo.reference, FrozenCopy)
    assert all(torch.equal(value, before[name]) for name, value in dpo.reference.model.state_dict().items())
    assert any(not torch.equal(value, trained[name]) for name, value in weights(dpo).items())


def test_one_pair_accumulated_eight_times_is_a_batch_of_eight(data, module, quiet_trainer):
    results = []
    for batch_size, accumulate in ((1, 8), (8, 1)):
        dpo = module()
        # Plain SGD: Adam would blow the rounding of gradients that are 0 up to a full step.
        dpo.configure_optimizers = lambda dpo=dpo: torch.optim.SGD(dpo.policy.parameters(), lr=1e-2)
        dpo.lr_schedulers = lambda: torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([torch.zeros(1)], lr=1e-2))
        trainer = quiet_trainer(max_steps=3, max_epochs=-1, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        trainer.fit(dpo, data(batch_size=batch_size))
        assert trainer.global_step == 3
        results.append(weights(dpo))
    start = module()
    start.configure_model()
    moved = max((results[0][name] - value).abs().max().item() for name, value in weights(start).items())
    apart = max((results[0][name] - results[1][name]).abs().max().item() for name in results[0])
    assert moved > 1e-3
    assert apart < 1e-4 * moved


def test_gradients_are_gone_before_the_next_forward_pass(data, module, quiet_trainer):
    held = []

    class Watching(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            held.append(sum(p.grad is not None for p in pl_module.parameters()))

    model = module()
    quiet_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[Watching()]).fit(model, data(batch_size=4))
    everything = sum(1 for _ in model.parameters())
    assert held == [0, everything, 0, everything, 0, everything]


@pytest.mark.parametrize(("precision", "attention"), [("32-true", "sdpa"), ("bf16-mixed", "eager")])
def test_precision_decides_attention_and_how_the_reference_is_kept(data, module, quiet_trainer, precision, attention):
    model = module()
    quiet_trainer(max_steps=1, precision=precision).fit(model, data(batch_size=4))
    assert model.loaded_attention == attention
    assert model.reference.autocast_dtype == (torch.bfloat16 if precision == "bf16-mixed" else None)
    assert fastest_attention("cpu", bf16=True, row_length=400) is fastest_attention("cuda", True, 70) is None


@pytest.mark.parametrize(
    ("attention", "precision", "packed"),
    [
        (None, "32-true", False),
        (None, "bf16-mixed", True),
        ("eager", "bf16-mixed", False),
        ("sdpa", "bf16-mixed", False),
        ("packed", "32-true", True),
    ],
)
def test_batches_are_packed_on_request_and_where_it_is_faster(
    data, module, quiet_trainer, attention, precision, packed
):
    model = module(attn_implementation=attention)
    quiet_trainer(max_steps=1, precision=precision).fit(model, data(batch_size=4))
    assert model.scoring.shared and model.scoring.packed == packed
    assert (attention_in_use(model.causal_lm) == PACKED) == packed


def test_dropout_is_off_in_both_models_while_training(module):
    dpo = module()
    dpo.configure_model()
    dpo.on_fit_start()
    assert dpo.policy.training
    for model in (dpo.policy, dpo.reference.model):
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    ids = torch.arange(5, 15)[None]
    assert torch.equal(dpo.policy(ids).logits, dpo.policy(ids).logits)


def test_gradient_checkpointing_recomputes_and_changes_nothing(data, module, quiet_trainer):
    losses, calls = [], []
    for on in (False, True):
        dpo, count = module(gradient_checkpointing=on), []
        dpo.configure_model()
        dpo.policy.transformer.h[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        record = Record(dpo)
        quiet_trainer(max_steps=3, limit_val_batches=0).fit(dpo, data())
        losses.append(record.losses)
        calls.append(len(count))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert calls[1] == calls[0] + 3, "each step's backward must run the block's forward again"


def test_lora_trains_the_adapter_alone_and_its_reference_is_the_base_model(data, module, quiet_trainer, model_folder):
    dpo = module(lora=LORA)
    dpo.configure_model()
    assert isinstance(dpo.reference, AdapterOff)
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    quiet_trainer().fit(dpo, data())
    changed = {name for name, p in dpo.policy.named_parameters() if p.requires_grad}
    assert changed and all("lora_" in name for name in changed)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        with dpo.policy.disable_adapter():
            torch.testing.assert_close(dpo.causal_lm(ids).logits, base(ids).logits, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(dpo.causal_lm(ids).logits, base(ids).logits, atol=1e-3)
    # No second copy: the module's memory is the base model and the adapter.
    total = sum(p.numel() for p in dpo.parameters())
    assert total == base.num_parameters() + sum(p.numel() for p in dpo.parameters() if p.requires_grad)


@pytest.mark.parametrize("lora", [None, LORA])
def test_checkpoint_holds_the_policy_alone_and_resumes(data, module, quiet_trainer, tmp_path, lora):
    def run(epochs, ckpt_path=None):
        dpo, trainer = module(lora=lora), quiet_trainer(max_epochs=epochs)
        trainer.fit(dpo, data(), ckpt_path=ckpt_path)
        return dpo, trainer

    dpo, trainer = run(1)
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    trainable = {f"policy.{name}" for name, p in dpo.policy.named_parameters() if p.requires_grad}
    assert {name for name in checkpoint["state_dict"] if "lm_head" not in name} == trainable
    assert not any(isinstance(value, torch.nn.Module) for value in checkpoint["hyper_parameters"].values())
    loaded = DPOModule.load_from_checkpoint(path, weights_only=True)
    assert all(torch.equal(value, weights(dpo)[name]) for name, value in weights(loaded).items())
    resumed, trainer = run(2, path)
    assert trainer.global_step == 2 * 10


def test_checkpoint_of_another_model_is_refused(data, module, quiet_trainer, tmp_path):
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module(lora=LORA), data())
    trainer.save_checkpoint(tmp_path / "lora.ckpt")
    with pytest.raises(UserError, match="the checkpoint lacks weight policy.*other model.lora settings"):
        quiet_trainer().test(module(), data(), ckpt_path=tmp_path / "lora.ckpt")


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 2 / 3, 1 / 3]), ("cosine", [0.5, 1, 0.75, 0.25])],
)
def test_schedule_warms_up_and_then_decays_over_the_run(data, module, quiet_trainer, schedule, rates):
    dpo = module(learning_rate=1.0, warmup_steps=2, lr_scheduler_type=schedule)
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(pl_module.lr_schedulers().get_last_lr()[0])

    quiet_trainer(max_steps=5, callbacks=[Watch()]).fit(dpo, data())
    assert seen[0] == 0
    assert seen[1:] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("schedule", "theirs"), [("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(schedule, theirs, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=10)
    for step in range(11):
        assert rate_at(step, schedule, warmup, 10) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert rate_at(12, schedule, warmup, 10) == rate_at(10, schedule, warmup, 10), "nothing changes after the end"


def test_metrics_are_logged_under_trls_names_with_their_stage(data, module, quiet_trainer):
    trainer = quiet_trainer(log_every_n_steps=2, gradient_clip_val=1.0)
    trainer.fit(module(), data())
    names = {
        "loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "kl",
    }
    assert {f"{stage}/{name}" for stage in ("train", "val") for name in names} <= set(trainer.callback_metrics)
    assert {"train/learning_rate", "train/grad_norm"} <= set(trainer.callback_metrics)


def test_a_model_that_reads_pairs_apart_says_so(data, module, quiet_trainer, monkeypatch):
    monkeypatch.setattr("dpo_lightning.dpo.shared_prompt.SHARED_PREFIX_MODEL_TYPES", frozenset())
    dpo = module()
    record = Record(dpo)
    with pytest.warns(UserWarning, match="prompts are read twice per pair, which is slower: models of type 'gpt2'"):
        quiet_trainer(max_steps=2).fit(dpo, data())
    assert record.losses[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr_scheduler_type": "cosin"},
            "model.lr_scheduler_type is 'cosin': it must be one of linear, cosine, constant",
        ),
        ({"learning_rate": -1.0}, "model.learning_rate is -1.0"),
        ({"dtype": "fp32"}, "model.dtype is 'fp32': it must be one of float32, bfloat16, float16"),
        (
            {"attn_implementation": "flash_attention_2"},
            "model.attn_implementation is 'flash_attention_2': it must be one of eager, sdpa",
        ),
        ({"beta": -0.1}, "model.beta is -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(module, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        module(**options)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, "there is no setting model.lora.rank: did you mean model.lora.r"),
        ({"r": 4, "lora_dropout": 0.1}, "model.lora.lora_dropout must be 0"),
        ({"r": 4, "target_modules": ["no_such_layer"]}, "model.lora: .*no_such_layer"),
    ],
)
def test_lora_settings_are_checked(module, lora, message):
    with pytest.raises(UserError, match=message):
        module(lora=lora).configure_model()


def test_positions_beyond_the_models_are_refused(data, module, quiet_trainer):
    with pytest.raises(UserError, match="data.max_length is 512.*this model has 128 positions"):
        long = data(max_length=512)
        long.tokenizer.model_max_length, before = 10**9, long.tokenizer.model_max_length
        try:
            quiet_trainer().fit(module(), long)
        finally:
            long.tokenizer.model_max_length = before
