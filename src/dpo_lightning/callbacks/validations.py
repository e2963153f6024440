"""Validation settings that Lightning would refuse, adapted to the data."""

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import batches_per_epoch


def fit_validation_to_epochs(trainer: Trainer) -> None:
    """Adapts the validation settings to the data.

    If `val_check_interval` is more batches than an epoch has, validates at the end of each epoch; if `overfit_batches`
    is a share, validates on at least one batch.
    """
    interval, data = trainer.val_check_interval, trainer.datamodule
    if 0 < trainer.overfit_batches < 1 and "val" in data.datasets:
        trainer.limit_val_batches = max(1, int(len(data.val_dataloader()) * trainer.overfit_batches))
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or trainer.fast_dev_run:
        return
    batches = batches_per_epoch(trainer, data)
    if 0 < batches < interval:
        trainer.val_check_interval = 1.0
        rank_zero_info(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches: validating at the end of "
            "each epoch instead (trainer.check_val_every_n_epoch: null counts batches across epochs)"
        )
