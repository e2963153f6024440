"""Every precision trains as float32 does, counts in float32, and says so where it cannot."""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_losses import logps

from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.callbacks.guards import GuardsCallback
from dpo_lightning.callbacks.report.callback import ReportCallback
from dpo_lightning.cli.entry import main
from dpo_lightning.dpo.metrics import PairMetrics
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.errors import UserError
from ranks import run_ranks


class Log(Callback):
    """What is known after each batch: learning rate, loss, logged values, and whether the step moved weights."""

    def __init__(self):
        self.rates, self.losses, self.logged, self.moved = [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.before = [weight.detach().clone() for weight in trained(pl_module).values()]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.moved.append(not all(map(torch.equal, self.before, trained(pl_module).values())))

    def on_train_start(self, trainer, pl_module):
        self.start = {name: weight.detach().clone() for name, weight in trained(pl_module).items()}
        log = pl_module.log  # callback_metrics keep a value until its next one

        def logging(name, value, **options):
            self.logged.append((name, value))
            log(name, value, **options)

        pl_module.log = logging

    def of(self, name):
        return [float(value) for logged, value in self.logged if logged == name]


def trained(module):
    return {name: weight for name, weight in module.policy.named_parameters() if weight.requires_grad}


def float16(scale=2.0**12):
    """16-mixed as on a GPU. Lightning's own choice for `precision="16-mixed"` on a CPU is bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


@pytest.fixture
def fit(model_folder, tokenizer, rows_file, quiet_trainer):
    """Runs a few steps and gives the module, a Log, and how far each trained weight moved."""

    def run(plugin=None, *callbacks, prepare=lambda module: None, ckpt_path=None, model=(), data=(), **options):
        defaults = {"max_steps": 3, "log_every_n_steps": 1, "limit_val_batches": 0, "plugins": plugin and [plugin]}
        module = DPOModule(str(model_folder), **{"learning_rate": 1e-4, "warmup_steps": 0} | dict(model))
        pairs = PreferenceDataModule(
            tokenizer, rows_file, **{"val_size": 4, "test_size": 4, "batch_size": 4, "shuffle": False} | dict(data)
        )
        log = Log()
        trainer = quiet_trainer(callbacks=[*callbacks, GuardsCallback(), log], **defaults | options)
        torch.manual_seed(0)
        prepare(module)
        trainer.fit(module, pairs, ckpt_path=ckpt_path)
        moves = [(w.detach() - log.start[name]).flatten() for name, w in trained(module).items()]
        return module, log, torch.cat(moves)

    return run


def plain_steps(module):
    """Fused SGD, whose steps are as long as the gradients are (Adam's hardly depend on that)."""

    def configure_optimizers():
        optimizer = torch.optim.SGD(module.policy.parameters(), lr=1e-2, fused=True)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module.configure_optimizers = configure_optimizers


# ---------------------------------------------------------------------- 16-mixed

CLIPS = {
    "unclipped": {},
    "norm": {"gradient_clip_val": 0.5},
    "value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
}


@pytest.mark.parametrize("prepare", [plain_steps, lambda module: None], ids=["sgd", "adamw"])
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_16_mixed_moves_weights_as_float32_does(fit, clip, accumulate, prepare):
    options = {"prepare": prepare, "accumulate_grad_batches": accumulate} | clip
    _, exact, expected = fit(precision="32-true", **options)
    module, log, moved = fit(float16(), **options)
    assert expected.abs().mean() > 1e-7 and module.causal_lm.dtype == torch.float32
    assert log.losses == pytest.approx(exact.losses, rel=2e-2)
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.97
    assert moved.abs().mean() == pytest.approx(expected.abs().mean().item(), rel=0.03)
    assert log.of("train/grad_norm") == pytest.approx(exact.of("train/grad_norm"), rel=3e-2)
    assert bool(exact.of("train/grad_norm")) == (clip == CLIPS["norm"])
    assert set(log.of("train/skipped_steps")) == {0.0}
    assert exact.of("train/skipped_steps") == [], "only a scaler skips"


def test_hooks_before_the_step_see_gradients_as_they_are(fit):
    norms = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            gradients = torch.cat([weight.grad.flatten() for weight in pl_module.policy.parameters()])
            norms.setdefault(trainer.precision, []).append(gradients.norm().item())

    fit(None, Watch())
    fit(float16(), Watch())
    assert norms["16-mixed"] == pytest.approx(norms["32-true"], rel=3e-2)


def overflow_at(*steps):
    """Lets a gradient overflow at the given steps (counted from 1), whatever its scale."""

    class Overflow(Callback):
        def on_train_start(self, trainer, pl_module):
            def hook(gradient):
                return gradient * math.inf if trainer.global_step + 1 in steps else gradient

            next(iter(trained(pl_module).values())).register_hook(hook)

    return Overflow()


def test_an_overflow_that_the_scaler_skips_is_counted_and_harms_nothing(fit, caplog):
    model = {"warmup_steps": 4, "lr_scheduler_type": "constant", "learning_rate": 4e-4}
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")  # torch's, of a step that it has not seen
        _, log, _ = fit(float16(), overflow_at(1, 2, 4), model=model, max_steps=7, gradient_clip_val=1.0)
    assert log.moved == [False, False, False, False, True, True, True], "the first step of a warm-up is of length 0"
    assert log.rates == pytest.approx([0, 0, 0, 1e-4, 1e-4, 2e-4, 3e-4]), "skipped steps are not warmed up on"
    assert log.of("train/skipped_steps") == [1, 2, 2, 3, 3, 3, 3]
    assert len(log.of("train/grad_norm")) == 4, "where a step was skipped there is none"
    assert all(map(math.isfinite, log.of("train/grad_norm") + log.losses))
    assert "3 of 7 steps were skipped because their gradients overflowed float16" in caplog.text


def test_the_report_says_how_many_steps_were_skipped(fit, tmp_path):
    fit(float16(), ReportCallback(), overflow_at(2, 3))
    assert "<td>16-mixed, steps skipped for overflow: 2</td>" in (tmp_path / "report.html").read_text()


def test_the_first_scale_that_is_too_large_is_found_smaller(fit):
    plugin = float16(2.0**24)  # no gradient of this model fits
    _, log, moved = fit(plugin, max_steps=20, max_epochs=4, gradient_clip_val=1.0)
    skipped = int(log.of("train/skipped_steps")[-1])
    assert 3 <= skipped < 16 and plugin.scaler.get_scale() == 2.0 ** (24 - skipped)
    assert log.moved == [False] * skipped + [True] * (20 - skipped)
    assert moved.isfinite().all()


def test_a_skipped_step_of_an_accumulation_drops_all_its_gradients(fit):
    class Watch(Callback):
        held = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.held.append(sum(weight.grad is not None for weight in pl_module.policy.parameters()))

    module, log, moved = fit(float16(), Watch(), overflow_at(2), accumulate_grad_batches=2, gradient_clip_val=1.0)
    everything = len(trained(module))
    assert Watch.held == [0, everything] * 3
    assert log.moved == [False, True, False, False, False, True] and moved.isfinite().all()


def test_the_reference_moves_where_the_step_is_skipped(fit):
    model = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 1.0}
    module, log, _ = fit(float16(), overflow_at(3), model=model, gradient_clip_val=1.0)
    assert log.moved == [True, True, False]
    assert all(torch.equal(weight, module.reference.weights[name]) for name, weight in trained(module).items())


def test_nothing_but_overflows_ends_the_run_in_one_line(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"max_steps": 40, "max_epochs": 8, "enable_checkpointing": True, "gradient_clip_val": 1.0}
    with pytest.raises(UserError) as caught:
        fit(float16(2.0**16), saves, overflow_at(*range(5, 100)), **options)
    message = str(caught.value)
    assert "16 steps in a row, up to step 20, overflowed float16" in message and "\n" not in message
    assert "trainer.precision: 32-true" in message and str(tmp_path) in message


class NaNLoss(PreferenceLoss):
    def __call__(self, *args):
        return super().__call__(*args) * math.nan


def test_a_loss_that_is_not_a_number_ends_the_run_at_once_though_its_step_is_skipped(fit, rows_file):
    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                pl_module.loss.__class__ = NaNLoss

    with pytest.raises(UserError, match=f"the loss is nan at step 3, on these rows: .*{rows_file}"):
        fit(float16(), Break(), max_steps=6, gradient_clip_val=1.0)


def test_a_resumed_run_knows_scale_schedule_and_count(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    options = {"max_steps": 8, "gradient_clip_val": 1.0, "model": {"lr_scheduler_type": "linear"}}
    _, whole, _ = fit(float16(), overflow_at(2, 3, 6), saves, enable_checkpointing=True, **options)
    plugin = float16(2.0**30)
    _, rest, _ = fit(plugin, overflow_at(6), ckpt_path=tmp_path / "step=4.ckpt", **options)
    assert rest.losses == whole.losses[4:] and rest.rates == whole.rates[4:]
    assert rest.of("train/skipped_steps")[-1] == 3 and plugin.scaler.get_scale() == 2.0**9


# ---------------------------------------------------------------------- 16-true and bf16-true

LORA = {"r": 4, "lora_alpha": 8}
SIXTEEN_BITS = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


@pytest.mark.parametrize("convert", [
    lambda module: module.to(torch.bfloat16), lambda module: module.half(), lambda module: module.bfloat16(),
    lambda module: module.to(dtype=torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("seen_before", [0, 300])
def test_metrics_count_in_float32_in_whatever_the_module_is(convert, seen_before, model_folder):
    module = DPOModule(str(model_folder))
    metrics, exact = module.val_metrics, PairMetrics()
    policy = logps(*[([-1.37], [-2.71])] * 16)
    reference = logps(*[([-1.01], [-1.0])] * 16)
    losses, rewards = torch.linspace(0.1, 0.9, 16), PreferenceLoss(beta=0.1).rewards(policy, reference)
    for batch in range(600):
        if batch == seen_before:
            convert(module)
        for each in (metrics, exact):
            each.update(losses, rewards, policy, reference)
    assert metrics.counts.tolist() == [600 * 16] * len(metrics.counts)
    for name, value in metrics.compute().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.compute()[name], rtol=1e-6, atol=1e-6)
    metrics.reset()
    metrics.update(losses, rewards, policy, reference)
    assert metrics.sums.dtype == metrics.counts.dtype == torch.float32


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_an_adapter_stays_in_float32_and_trains_over_a_base_in_16_bits(fit, precision):
    model = {"lora": LORA, "learning_rate": 1e-5}  # steps that float32 shows and bfloat16 would mostly swallow
    model |= {"lr_scheduler_type": "constant"}
    module, log, moved = fit(model=model, precision=precision, data={"rejected": "shuffled"}, max_steps=6)
    dtypes = {name: weight.dtype for name, weight in module.policy.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {SIXTEEN_BITS[precision]}
    moments = [moment for state in module.optimizers().state.values() for moment in state.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}
    assert (moved != 0).float().mean() > 0.95
    assert log.losses[0] == pytest.approx(math.log(2), abs=0.02)
    logged = module.trainer.callback_metrics
    assert {value.dtype for value in logged.values()} == {torch.float32}
    assert logged["train/learning_rate"].item() == pytest.approx(1e-5, rel=1e-6)


def test_an_adapter_learns_in_bf16_true_as_in_float32(fit):
    options = {"model": {"lora": LORA, "learning_rate": 1e-3}, "data": {"rejected": "shuffled"}, "max_steps": 10}
    options["prepare"] = lambda module: module.configure_model()  # the same random start, drawn in float32
    (_, exact, expected), (_, log, moved) = (fit(precision=name, **options) for name in ("32-true", "bf16-true"))
    assert log.losses == pytest.approx(exact.losses, abs=0.05)
    assert torch.cosine_similarity(moved, expected, dim=0) > 0.8


def test_a_resumed_adapter_loses_no_bits_in_bf16_true(fit, tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    options = {"model": {"lora": LORA}, "precision": "bf16-true", "max_steps": 4, "data": {"rejected": "shuffled"}}
    whole, log, _ = fit(None, saves, enable_checkpointing=True, **options)
    resumed, rest, _ = fit(ckpt_path=tmp_path / "step=2.ckpt", **options)
    assert rest.losses == log.losses[2:]
    assert all(torch.equal(weight, trained(resumed)[name]) for name, weight in trained(whole).items())


def test_a_moving_adapter_reference_stays_in_float32(fit):
    model = {"lora": LORA, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 1.0}
    module, _, _ = fit(model=model, precision="bf16-true", max_steps=2)
    assert all(torch.equal(weight, module.reference.weights[name]) for name, weight in trained(module).items())
    assert {weight.dtype for weight in module.reference.weights.values()} == {torch.float32}


@pytest.mark.parametrize("precision", SIXTEEN_BITS)
def test_weights_and_cached_log_probs_of_a_batch_are_not_rounded(fit, precision, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    found = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.append((batch.weight.dtype, batch.margin.dtype, batch.reference_logps.dtype))

    fit(None, Look(), model={"lora": LORA, "reference": "cached"}, precision=precision)
    assert set(found) == {(torch.float32,) * 3}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "bf16-true"}, "bfloat16"),
        ({"precision": "16-true"}, "float16"),
        ({"model": {"dtype": "bfloat16"}}, "bfloat16"),
        ({"model": {"dtype": "float16"}, "precision": "bf16-mixed"}, "float16"),
        ({"prepare": lambda module: (module.configure_model(), module.half())}, "float16"),
        ({"model": {"lora": LORA | {"modules_to_save": ["lm_head"]}}, "precision": "bf16-true"}, "bfloat16"),
    ],
)
def test_weights_in_16_bits_are_not_trained(fit, options, named):
    with pytest.raises(UserError, match=f"weights in {named} cannot be trained: .*trainer.precision: bf16-mixed"):
        fit(**options)


def test_the_command_refuses_them_before_data_are_read(model_folder, capsys, tmp_path, monkeypatch, rows_file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreferenceDataModule, "setup", lambda *_: pytest.fail("data are read"))
    argv = ["fit", "--model.name_or_path", str(model_folder), "--data.train_dataset", rows_file]
    assert main([*argv, "--trainer.accelerator", "cpu", "--trainer.precision", "bf16-true"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "about 3 % of the weights move" in line and "configs/lora.yaml" in line


def test_a_model_in_16_bits_may_be_tested(model_folder, tokenizer, rows_file, quiet_trainer):
    data = PreferenceDataModule(tokenizer, rows_file, val_size=4, test_size=4, batch_size=4)
    (result,) = quiet_trainer(precision="bf16-true").test(DPOModule(str(model_folder)), data, verbose=False)
    assert result["test/loss"] == pytest.approx(math.log(2), abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_adapter_stays_in_float32_over_two_processes(strategy, model_folder, rows_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
    argv += ["--data.train_dataset", rows_file, "--data.val_size", "4", "--data.test_size", "0"]
    argv += ["--data.batch_size", "4", "--data.max_length", "128", "--model.lora.r", "2", "--model.max_new_tokens", "4"]
    argv += ["--trainer.accelerator", "cpu", "--trainer.precision", "bf16-true", "--trainer.max_steps", "3"]
    argv += ["--trainer.devices", "2", "--replies.num_prompts", "2", "--export.enabled", "false"]
    argv += {"ddp": ["--trainer.strategy", "ddp"], "fsdp2": ["--config", str(REPO / "configs" / "fsdp.yaml")]}[strategy]
    assert run_ranks(2, lambda rank: main([*argv, "--data.batch_size", "4", "--trainer.accelerator", "cpu"])) == [0, 0]
    (last,) = tmp_path.glob("lightning_logs/version_0/checkpoints/last.ckpt")
    adapter = torch.load(last, weights_only=True)["state_dict"]
    assert adapter and {weight.dtype for weight in adapter.values()} == {torch.float32}


@pytest.mark.slow
def test_an_overflow_of_one_process_is_skipped_by_all(fit):
    def on(rank):
        overflow = [overflow_at(2)] if rank == 0 else []
        module, log, _ = fit(float16(), *overflow, devices=2, strategy="ddp", gradient_clip_val=1.0)
        return log.moved, log.of("train/skipped_steps"), next(iter(trained(module).values())).double().sum().item()

    first, second = run_ranks(2, on)
    assert first == second
    assert first[:2] == ([True, False, True], [0, 1, 1])
