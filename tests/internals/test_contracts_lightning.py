"""What `internals/lightning.py` uses is as it was in the version of Lightning that is installed."""

import copy
import functools
import inspect
from pathlib import Path

import pytest
import torch
from contracts import contract
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from dpo_lightning.internals import lightning as internals

holds = functools.partial(contract, "lightning")


def trainer_in(folder: Path, **settings) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **quiet | settings)


def test_attached_trainer(tmp_path):
    with holds("LightningModule._trainer", "modules without a trainer (export, chat)"):
        module, trainer = LightningModule(), trainer_in(tmp_path)
        assert internals.attached_trainer(module) is None
        module.trainer = trainer
        assert internals.attached_trainer(module) is trainer


def test_run_seed(monkeypatch):
    with holds("the variable PL_GLOBAL_SEED", "the random state of each batch, and with it resuming bit by bit"):
        monkeypatch.setenv(internals.SEED_VARIABLE, "1")  # so that it is put back
        seed_everything(7, verbose=False)
        assert internals.run_seed() == "7"


def test_cluster_environment(tmp_path):
    with holds("Trainer._accelerator_connector.cluster_environment", "SLURM's requeue signal between two steps"):
        environment = LightningEnvironment()
        assert internals.cluster_environment(trainer_in(tmp_path, plugins=[environment])) is environment
        assert SLURMEnvironment(auto_requeue=True).requeue_signal


class Saves(Callback):
    """Keeps what the trainer would save, and its counters, at the end of each batch."""

    def __init__(self) -> None:
        self.saved, self.counters = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.saved.append(copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint()))
        self.counters.append(
            (internals.batch_index(trainer), internals.total_batch_index(trainer), internals.batches_processed(trainer))
        )


@pytest.fixture
def run(tmp_path) -> Saves:
    """Two epochs of four batches by two, so two optimizer steps in each."""
    saves = Saves()
    settings = {"limit_train_batches": 4, "limit_val_batches": 0, "accumulate_grad_batches": 2, "max_epochs": 2}
    trainer_in(tmp_path, callbacks=[saves], **settings).fit(BoringModel())
    return saves


def test_batch_counters(run):
    with holds("the fit loop's batch_idx, total_batch_idx and batch_progress", "resuming in the midst of an epoch"):
        assert run.counters == [(total % 4, total, total % 4 + 1) for total in range(8)]


def test_set_fit_counters(run):
    with holds("the state of the fit loop in a checkpoint", "resuming where the optimizer steps say"):
        theirs = run.saved[5]["loops"]["fit_loop"]  # after three steps: an epoch, and two batches of the next
        ours = copy.deepcopy(run.saved[0]["loops"]["fit_loop"])
        internals.set_fit_counters(ours, step=3, epoch=1, done=2, batches=4, by_steps=False)
        names = ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.state_dict")
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def test_failed_restoring(tmp_path):
    with holds("the names of the checkpoint connector's methods", "one line in place of a traceback on an edited file"):
        trainer = trainer_in(tmp_path, max_steps=1, limit_val_batches=0)
        trainer.fit(BoringModel())
        trainer.save_checkpoint(tmp_path / "good.ckpt")
        checkpoint = torch.load(tmp_path / "good.ckpt")
        checkpoint["optimizer_states"] = [{"state": 3}]
        torch.save(checkpoint, tmp_path / "bad.ckpt")
        with pytest.raises(Exception) as caught:
            trainer_in(tmp_path, max_steps=2, limit_val_batches=0).fit(BoringModel(), ckpt_path=tmp_path / "bad.ckpt")
        assert internals.failed_restoring(caught.value)
        assert not internals.failed_restoring(ValueError())


def test_last_save(tmp_path):
    with holds(
        "ModelCheckpoint's _last_global_step_saved and _last_checkpoint_saved", "last.ckpt without a second copy"
    ):
        best = ModelCheckpoint(tmp_path, every_n_train_steps=2)
        assert internals.last_save(best) == (0, "")
        trainer = trainer_in(tmp_path, callbacks=[best], enable_checkpointing=True, max_steps=3, limit_val_batches=0)
        trainer.fit(BoringModel())
        step, path = internals.last_save(best)
        assert step == 2 and Path(path).is_file()


def test_skip_sigterm_broadcast(tmp_path):
    with holds("the batch loop's _broadcast_sigterm_tensor", "steps of several processes that wait for no word"):
        trainer = trainer_in(tmp_path)
        loop = trainer.fit_loop.epoch_loop
        assert "self._broadcast_sigterm_tensor()" in inspect.getsource(type(loop).advance)
        theirs = loop._broadcast_sigterm_tensor
        internals.skip_sigterm_broadcast(trainer)
        assert loop._broadcast_sigterm_tensor != theirs and loop._broadcast_sigterm_tensor() is None


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_versions_of_loggers(kind, tmp_path):
    class Chooses(internals.ChoosesVersion, kind):
        def next_version(self, lightnings):
            return lightnings() + 5

    with holds(f"{kind.__name__}'s _experiment, _version or _get_next_version", "a folder of its own for each run"):
        logger = Chooses(tmp_path)
        assert internals.version_is_open(logger) and not internals.is_open(logger)
        assert logger.version == 5 and not internals.version_is_open(logger)
        internals.set_version(logger, 8)
        assert logger.version == 8 and Path(logger.log_dir).name == "version_8"
        assert logger.experiment and internals.is_open(logger)
        logger.finalize("success")


def test_the_command_line(monkeypatch, tmp_path):
    class CLI(LightningCLI):
        looked_for_checkpoint = False

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
            parser.add_lightning_class_args(Saves, "saves")

        def _parse_ckpt_path(self) -> None:
            self.looked_for_checkpoint = True

        def instantiate_trainer(self, **kwargs):
            self.section = internals.configured_section(self, "trainer")
            internals.leave_callbacks_out(self, {"checkpoint"})
            return super().instantiate_trainer(**kwargs)

    with holds("LightningCLI's _get, _parser, callback_keys or _parse_ckpt_path", "loggers, callbacks and --ckpt_path"):
        args = [f"--trainer.default_root_dir={tmp_path}", "--trainer.logger=false"]
        cli = CLI(BoringModel, BoringDataModule, run=False, args=args, seed_everything_default=False)
        assert cli.looked_for_checkpoint
        assert cli.section.default_root_dir == str(tmp_path)
        kinds = [type(callback) for callback in cli.trainer.callbacks]
        assert Saves in kinds
        # The Trainer adds a ModelCheckpoint of its own where there is none.
        assert (
            kinds.count(ModelCheckpoint) == 1 and cli._get(cli.config_init, "checkpoint") not in cli.trainer.callbacks
        )
