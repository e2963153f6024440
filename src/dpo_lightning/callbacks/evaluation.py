"""What `validate` and `test` measure over a whole split: reward metrics and judged replies, kept in `metrics.json`."""

import json
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import find_callback, preference_data, run_folder
from dpo_lightning.callbacks.replies import RepliesCallback, answer
from dpo_lightning.data.batching import PairBatch, collate_prompts, to_pairs
from dpo_lightning.judging.judge import JudgeSetting, VerdictMeans, check_round, find_judges, verdicts
from dpo_lightning.parsing import check_settings
from dpo_lightning.storage.atomic import atomic_file

PREFIX = {"validate": "val", "test": "test"}  # of metrics; also the split's name in the datamodule


class EvaluationCallback(Callback):
    """Answers every prompt of the split in `validate` and `test`, and judges the replies.

    Validations during `fit` stay cheap: they get no replies. All logged metrics are also written to `metrics.json` in
    the run's folder, with null for nan.

    Args:
        judge: as in `RepliesCallback`; by default the judges of the run's `RepliesCallback`, or `sql` without one.
    """

    def __init__(self, judge: JudgeSetting | None = None) -> None:
        check_settings(EvaluationCallback.__init__, locals(), "evaluation.")
        self.judges = find_judges(judge, "evaluation.judge") if judge is not None else {}

    # ------------------------------------------------------------------ Lightning's hooks, the same for both commands

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the judges."""
        if trainer.state.fn in PREFIX:
            preference_data(trainer, self)
            replies = find_callback(trainer, RepliesCallback)
            self.judges = self.judges or (replies.judges if replies else find_judges("sql"))
            self._means = VerdictMeans()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Answers the prompts of a batch and judges the replies."""
        if trainer.state.fn in PREFIX:
            positions = batch.pair_ids.tolist()
            prompts = collate_prompts([pair.prompt_ids for pair in to_pairs(batch)], positions)
            pairs = trainer.datamodule.pairs(PREFIX[trainer.state.fn], positions)
            answered = zip(answer(trainer, pl_module, prompts), pairs, strict=True)
            self._means.update(verdicts(self.judges, reply, pair) for reply, pair in answered)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the means over the split."""
        if trainer.state.fn in PREFIX:
            self._means = self._means.gathered()
            check_round(self.judges, self._means)
            means = {f"{PREFIX[trainer.state.fn]}/{name}": mean for name, mean in self._means.compute().items()}
            pl_module.log_dict(means, sync_dist=True)  # they are the same on all processes

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes all that was logged."""
        if trainer.state.fn not in PREFIX:
            return
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        _, pairs = self._means.totals.get("reply/length", (0.0, 0))  # every reply has a length
        result = {
            "command": str(trainer.state.fn.value),
            "model": pl_module.hparams.name_or_path,
            "ckpt_path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "pairs": pairs,
            "metrics": {name: None if math.isnan(value) else value for name, value in sorted(values.items())},
        }
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "metrics.json") as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(f"metrics written to {folder / 'metrics.json'}")

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end
