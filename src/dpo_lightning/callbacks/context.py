"""What callbacks need from the trainer: its data, its run folder, its TensorBoard writer, each other."""

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

C = TypeVar("C", bound=Callback)
NUMBERING = TensorBoardLogger | CSVLogger  # they give each run a folder of its own, version_N


def preference_data(trainer: Trainer, asker: object) -> PreferenceDataModule:
    """The run's datamodule, which `asker` needs.

    Raises:
        UserError: there is none, or it is no PreferenceDataModule.
    """
    data = trainer.datamodule
    if not isinstance(data, PreferenceDataModule):
        kind = "none" if data is None else type(data).__name__
        raise UserError(
            f"{type(asker).__name__} needs the texts of a PreferenceDataModule, but the run's datamodule is {kind}: "
            "call trainer.fit(module, datamodule=PreferenceDataModule(...)) or leave the callback out"
        )
    return data


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of the run's files, None in a trial run (`fast_dev_run`). Call it on all ranks.

    Loggers that do not number their runs (`NUMBERING`) have one folder for all of them, or none: their runs get the
    folder in which Lightning saves their checkpoints.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call
    logger = trainer.logger
    if logger is not None and not isinstance(logger, NUMBERING):
        # Only the first process of a run has its name in Weights & Biases.
        name, version = trainer.strategy.broadcast((logger.name, logger.version))
        if version is not None:
            folder = folder / str(name) / (version if isinstance(version, str) else f"version_{version}")
    return None if trainer.fast_dev_run else folder


def batches_per_epoch(trainer: Trainer, data: PreferenceDataModule) -> int:
    """Training batches of an epoch on each device; unlike Lightning's own number, known before the first epoch."""
    batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def batch_limit(data: PreferenceDataModule) -> str:
    """What a training batch holds on each device: "16 pairs", or "up to 4,096 tokens"."""
    tokens = data.hparams.batch_tokens
    return f"{data.hparams.batch_size} pairs" if tokens is None else f"up to {tokens:,} tokens"


def optimized_by(trainer: Trainer, module: LightningModule) -> str:
    """The optimizer with its learning rate, and the schedule of that."""
    h = module.hparams
    if not trainer.optimizers:
        return "none was made"
    optimizer, schedule = trainer.optimizers[0], f"{h.lr_scheduler_type}, warm-up {h.warmup_steps}"
    if module.make_scheduler is not None:
        schedule = type(trainer.lr_scheduler_configs[0].scheduler).__name__
    return f"{type(optimizer).__name__}, learning rate {optimizer.defaults.get('lr')}, {schedule}"


def tensorboard_writer(trainer: Trainer) -> "SummaryWriter | None":
    """The writer of the run's TensorBoard logger; None without one, and on all ranks but the first."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            return logger.experiment
    return None


def find_callback(trainer: Trainer, kind: type[C]) -> C | None:
    """The run's first callback of a class, None if it has none."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)
