"""What TensorBoard shows beyond single scalars: chosen charts, hyperparameters beside results, histograms."""

from inspect import signature
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from dpo_lightning.callbacks.context import find_callback, tensorboard_writer
from dpo_lightning.callbacks.curves import CHARTS, judged_charts
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.judging.judge import Judge
from dpo_lightning.judging.quantities import reply_tag, results

# Listed beside the hyperparameters, each with its last value in the run, and so are the verdicts of judges.
RESULTS = (
    "val/loss",
    "val/rewards/accuracies",
    "val/rewards/margins",
    "val/kl",
    "train/pairs_per_second",
)
# Listed for every run; other settings only where they are not the default.
ALWAYS = "name_or_path loss_type beta learning_rate train_dataset batch_size max_epochs max_steps precision".split()
# Never listed: how a run computes, not what it learns.
NEVER = (
    "tokenizer num_workers trust_remote_code generation max_new_tokens eval_batch_size attn_implementation "
    "val_dataset test_dataset predict_dataset on_bad_row prompt_template completion_template"
).split()


class StoryboardCallback(Callback):
    """Completes the TensorBoard log of a run, if it has one:

    - custom scalars: the report's charts, under the same titles;
    - hparams: the settings that matter or are not the default, with the metrics of `RESULTS` and the verdicts of the
      run's judges. Those of a function of the user's own are not among them, since TensorBoard needs their names before
      the first reply is judged: they are in the charts, and in `validate`'s log;
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

        replies = find_callback(trainer, RepliesCallback)
        judges: dict[str, Judge] = replies.judges if replies else {}
        names = [f"{name}/{verdict}" for name, judge in judges.items() for verdict in judge.verdicts]
        layout: dict[str, dict[str, Any]] = {}
        for chart in (*judged_charts(map(reply_tag, names)), *CHARTS):
            if "train/reference_point" in chart.curves and not pl_module.loss.needs_kl:
                continue
            layout.setdefault(chart.group, {})[chart.title] = ["Multiline", [f"{tag}$" for tag in chart.curves]]
        of_users = {name: ["Multiline", [f"replies/{name}/"]] for name, judge in judges.items() if not judge.verdicts}
        length = {"Replies: length": ["Multiline", [f"{reply_tag('reply/length')}$"]]}
        layout["Replies"] = layout.get("Replies", {}) | of_users | length
        writer.add_custom_scalars(layout)
        assert writer.file_writer is not None  # until it is closed
        metrics = [*RESULTS, *map(reply_tag, results(names))]
        for summary in hparams(telling_settings(trainer, pl_module), dict.fromkeys(metrics, 0.0)):
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


def telling_settings(trainer: Trainer, module: LightningModule) -> dict[str, bool | int | float | str]:
    """The settings to compare runs by: those in `ALWAYS`, and all others that are not the default."""
    defaults: dict[str, Any] = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "devices": 1}
    for part in (module, trainer.datamodule):
        if part is not None:
            defaults |= {name: one.default for name, one in signature(type(part).__init__).parameters.items()}
    return {
        name: value
        for name, value in settings(trainer, module).items()
        if name in ALWAYS
        or name in defaults
        and name not in NEVER
        and value not in (defaults[name], str(defaults[name]))
    }
