"""What TensorBoard shows beyond single scalars: chosen charts, hyperparameters beside results, histograms."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lightning.callbacks.context import find_callback, tensorboard_writer
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.judging.judge import Judge
from dpo_lightning.judging.quantities import reply_charts, results

# Group -> title of a chart -> regular expressions of its tags, for TensorBoard's "custom scalars" tab.
CHARTS = {
    "learning": {
        "loss": ["(train|val)/loss$"],
        "margins": ["(train|val)/rewards/margins$"],
        "accuracy": ["(train|val)/rewards/accuracies$"],
        "rewards": ["(train|val)/rewards/(chosen|rejected)$"],
    },
    "replies": {"Replies: length": ["replies/reply/length$"]},
    "diagnostics": {
        "KL": ["(train|val)/kl$"],
        "displaced": ["(train|val)/rewards/(first_)?displaced$"],
        "gradient left in the loss": ["train/gradient_weight$"],
        "gradient norm": ["train/grad_norm$"],
        "learning rate": ["train/learning_rate$"],
        "pairs per second": ["train/pairs_per_second$"],
    },
}
# Listed beside the hyperparameters, each with its last value in the run, and so are the verdicts of judges.
RESULTS = (
    "val/loss",
    "val/rewards/accuracies",
    "val/rewards/margins",
    "val/kl",
    "train/pairs_per_second",
)


class StoryboardCallback(Callback):
    """Completes the TensorBoard log of a run, if it has one:

    - custom scalars: `CHARTS`, and a chart for each judge of the run;
    - hparams: all settings, with the metrics of `RESULTS` and the verdicts of the run's judges. Those of a function of
      the user's own are not among them, since TensorBoard needs their names before the first reply is judged: they are
      in the charts, and in `validate`'s log;
    - histograms: the margins of all pairs at each validation, from all ranks.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the layout and the settings.

        The settings are written here and before Lightning does so: TensorBoard uses only the first such record of a
        run, and Lightning's has no metrics (or, with metrics, adds a point to their curves). The metrics named here
        are the curves themselves, so that TensorBoard has the results of a killed run as well.
        """
        writer = tensorboard_writer(trainer)
        if writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        layout = {
            group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in CHARTS.items()
        }
        replies = find_callback(trainer, RepliesCallback)
        judges: dict[str, Judge] = replies.judges if replies else {}
        names = [f"{name}/{verdict}" for name, judge in judges.items() for verdict in judge.verdicts]
        charts = {title: [f"replies/{name}$" for name in words] for title, words in reply_charts(names).items()}
        charts |= {name: [f"replies/{name}/"] for name, judge in judges.items() if not judge.verdicts}
        layout["replies"] |= {title: ["Multiline", tags] for title, tags in charts.items()}
        writer.add_custom_scalars(layout)
        assert writer.file_writer is not None  # until it is closed
        metrics = [*RESULTS, *(f"replies/{name}" for name in results(names))]
        for summary in hparams(settings(trainer, pl_module), dict.fromkeys(metrics, 0.0)):
            writer.file_writer.add_summary(summary)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the histogram of margins."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        margins = pl_module.val_metrics.all_margins()  # a collective call
        writer = tensorboard_writer(trainer)
        if writer and len(margins) and margins.isfinite().all():  # otherwise GuardsCallback stops the run
            # A separate tag: TensorBoard drops the points of a tag that is both a scalar and a histogram.
            writer.add_histogram("margins/val", margins.float().cpu(), trainer.global_step)


def settings(trainer: Trainer, module: LightningModule) -> dict[str, bool | int | float | str]:
    """All settings of module, data and trainer that can differ between runs, by name."""
    values: dict[str, Any] = {
        name: value
        for part in (module, trainer.datamodule)
        for name, value in getattr(part, "hparams", {}).items()
        if not name.startswith("_")
    }
    values |= {
        "max_epochs": trainer.max_epochs,
        "max_steps": trainer.max_steps,
        "precision": trainer.precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        "accelerator": type(trainer.accelerator).__name__.removesuffix("Accelerator").lower(),
        "devices": trainer.world_size,
    }
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
