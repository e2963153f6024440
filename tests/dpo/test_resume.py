"""A run that is gone on with is the very same run: from every checkpoint, or it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from conftest import REPO, ROWS
from dpo_lightning.callbacks.checkpoint_files import AtomicCheckpointIO
from dpo_lightning.cli.entry import main
from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.loaders import LengthGroupedBatchSampler
from dpo_lightning.dpo import resume
from dpo_lightning.dpo.module import DPOModule
from dpo_lightning.errors import UserError

# 11 batches an epoch, accumulated by 2, so that the last step of an epoch has one; validations in the midst of steps.
SETTINGS = [
    "--data.val_size", "4", "--data.test_size", "0", "--data.batch_size", "4", "--data.max_length", "128",
    "--model.max_new_tokens", "4", "--model.learning_rate", "1e-3", "--model.lr_scheduler_type", "linear",
    "--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", "2",
    "--trainer.log_every_n_steps", "2", "--replies.num_prompts", "2", "--replies.every_n_steps", "4",
    "--trainer.val_check_interval", "3", "--trainer.max_epochs", "2", "--export.enabled", "false",
]  # fmt: skip
EVERY = ["--checkpoint.save_top_k", "-1", "--checkpoint.save_weights_only", "false"]  # kept, to resume from


@pytest.fixture(scope="module")
def fit(tmp_path_factory, model_folder):
    """Runs `fit` in a folder."""

    def call(folder, *args, rows=ROWS):
        patch = pytest.MonkeyPatch()
        patch.chdir(folder)
        path = Path("rows.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        argv = ["fit", "--config", str(REPO / "configs" / "gpt2.yaml"), "--model.name_or_path", str(model_folder)]
        try:
            return main([*argv, "--data.train_dataset", str(path), *SETTINGS, *args])
        finally:
            patch.undo()

    return call


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """An uninterrupted run, and a copy of every checkpoint that it wrote on its way."""
    folder, kept = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("kept")
    save = AtomicCheckpointIO.save_checkpoint

    def save_and_keep(self, checkpoint, path, storage_options=None):
        save(self, checkpoint, path)
        shutil.copy(path, kept / f"step{checkpoint['global_step']}-{Path(path).stem}-{len(list(kept.iterdir()))}.ckpt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_keep)
        assert fit(folder, "--last.every_n_steps", "1", *EVERY) == 0
    return folder / "lightning_logs" / "version_0", sorted(kept.iterdir())


def load(path):
    return torch.load(path, weights_only=True)


STAGES = ("step1-step", "step6", "step8-last", "step12")


def test_every_checkpoint_of_a_run_leads_to_the_same_end(whole, fit, tmp_path):
    run, kept = whole
    end = load(run / "checkpoints" / "last.ckpt")
    assert end["global_step"] == 12 and len({path.name.split("-")[0] for path in kept}) == 12
    # In the midst of a step (a validation), between two steps, at an epoch's end (steps 6 and 12).
    chosen = [next(path for path in kept if path.name.startswith(name)) for name in STAGES]
    for path in chosen:
        folder = tmp_path / path.stem
        folder.mkdir()
        assert fit(folder, "--ckpt_path", str(path), "--last.every_n_steps", "100") == 0
        ends = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
        if path.name.startswith("step12"):
            assert not ends.exists()  # nothing was left to do
            continue
        again = load(ends)
        for name, weight in end["state_dict"].items():
            assert torch.equal(weight, again["state_dict"][name]), (path.name, name)
        assert again["lr_schedulers"] == end["lr_schedulers"]
        curves = [checkpoint["callbacks"]["ReportCallback"]["curves"] for checkpoint in (again, end)]
        for name in ("train/loss", "val/loss", "replies/length"):
            assert curves[0][name] == curves[1][name], path.name
        assert [step for step, _ in curves[0]["train/loss"]] == [1, 3, 5, 7, 9, 11]


def test_a_run_with_a_number_of_tokens_per_batch_is_resumed_in_mid_epoch(fit, tmp_path):
    def run(name, *args):
        (tmp_path / name).mkdir()
        settings = (
            "--data.batch_tokens 200 --data.batch_size 1 --data.eval_batch_size 4 --model.lr_scheduler_type constant"
        )
        assert fit(tmp_path / name, *settings.split(), *args) == 0
        return tmp_path / name / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"

    whole = load(run("whole"))
    steps = -(-whole["dpo_lightning"]["batches"] // 2)  # of an epoch
    assert whole["global_step"] == 2 * steps
    stopped = run("stopped", "--trainer.max_steps", str(steps + 2))
    resumed = load(run("resumed", "--ckpt_path", str(stopped)))
    assert resumed["global_step"] == 2 * steps > load(stopped)["global_step"]
    for weight, again in zip(whole["state_dict"].values(), resumed["state_dict"].values(), strict=True):
        assert torch.equal(weight, again)


@pytest.mark.parametrize(
    ("args", "rows", "words"),
    [
        (["--data.batch_tokens", "400"], ROWS, "data.batch_tokens was None, now it is 400"),
        (["--data.batch_size", "2"], ROWS, "data.batch_size was 4, now it is 2"),
        (["--data.seed", "1"], ROWS, "data.seed was 42, now it is 1; the digest of the encoded training pairs was"),
        (["--trainer.accumulate_grad_batches", "1"], ROWS, "trainer.accumulate_grad_batches was 2, now it is 1"),
        ([], ROWS[:-1] + [ROWS[-1] | {"answer": "SELECT 1"}], "the digest of the encoded training pairs was"),
    ],
    ids=["batch tokens", "batch size", "seed", "accumulation", "data"],
)
def test_another_run_is_refused(whole, fit, tmp_path, capsys, args, rows, words):
    path = next(path for path in whole[1] if path.name.startswith("step3"))
    assert fit(tmp_path, "--ckpt_path", str(path), *args, rows=rows) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: cannot resume") and words in line


def test_a_longer_run_is_said_and_goes_on(whole, fit, tmp_path):
    path = next(path for path in whole[1] if path.name.startswith("step12"))
    with pytest.warns(UserWarning, match="max_epochs was 2, now it is 3; the learning rate's schedule is laid over"):
        assert fit(tmp_path, "--ckpt_path", str(path), "--trainer.max_epochs", "3") == 0
    assert load(tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt")["global_step"] == 18


def test_an_older_checkpoint_gets_a_folder_of_its_own_and_the_newest_does_not(whole, fit, tmp_path):
    shutil.copytree(whole[0], tmp_path / "lightning_logs" / "version_0")
    checkpoints = tmp_path / "lightning_logs" / "version_0" / "checkpoints"
    assert fit(tmp_path, "--ckpt_path", str(checkpoints / "step7.ckpt")) == 0
    assert (tmp_path / "lightning_logs" / "version_1" / "checkpoints" / "last.ckpt").is_file()
    assert fit(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", "3") == 0
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 2


def test_last_without_any_checkpoint_starts_a_run(fit, tmp_path, caplog):
    assert fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", "1") == 0
    assert "there is no checkpoint yet to resume from, so the run starts from the beginning" in caplog.text


# ---------------------------------------------------------------------- the parts


def test_the_place_follows_from_the_number_of_steps():
    assert [resume.position(step, 5, 2) for step in range(7)] == [
        (0, 0),
        (0, 2),
        (0, 4),
        (1, 0),
        (1, 2),
        (1, 4),
        (2, 0),
    ]
    assert resume.position(7, 3, 1) == (2, 1)
    assert resume.position(1, 3, 8) == (1, 0)


def test_the_sampler_leaves_out_what_was_trained_on():
    sampler = LengthGroupedBatchSampler(range(20), 3, shuffle=True, seed=1)
    all_batches = list(sampler)
    sampler.start = 4
    assert list(sampler) == all_batches[4:]
    assert len(sampler) == len(all_batches)


def test_only_the_trainer_is_handed_the_rest(quiet_trainer, model_folder, rows_file):
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 2:
                seen.append(len(list(trainer.datamodule.train_dataloader())))

    module = DPOModule(str(model_folder), warmup_steps=0)
    data = PreferenceDataModule(str(model_folder), rows_file, batch_size=4, max_length=128, val_size=0, test_size=0)
    trainer = quiet_trainer(max_steps=3, callbacks=[Look()])
    trainer.fit(module, data)
    assert seen == [12] and len(list(trainer.train_dataloader)) == 12


def test_a_batchs_random_state_hangs_on_its_number_and_rank_alone(monkeypatch):
    class Trainer:
        class fit_loop:
            total_batch_idx = 3

        global_rank = 0

    def draw(batch=3, rank=0, seed="1"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        Trainer.fit_loop.total_batch_idx, Trainer.global_rank = batch, rank
        resume.seed_batch(Trainer)
        return torch.rand(1).item()

    assert draw() == draw()
    assert len({draw(), draw(batch=4), draw(rank=1), draw(seed="2")}) == 4


def test_settings_that_may_change_are_said():
    saved = {"trainer.precision": "32-true", "trainer.max_epochs": 1}
    with pytest.warns(UserWarning, match="trainer.precision was 32-true, now it is bf16-mixed"):
        resume.check_same_run(saved, saved | {"trainer.precision": "bf16-mixed"}, scheduled=True)
    for name in ("number of processes", "seed_everything", "data.shuffle", "trainer.limit_train_batches"):
        with pytest.raises(UserError, match=f"{name} was 1, now it is 2"):
            resume.check_same_run({name: 1}, {name: 2}, scheduled=False)
