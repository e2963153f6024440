"""`validate` and `test` -> reward metrics and judged replies over the whole split, logged and in `metrics.json`."""

import json
import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import find_callback, preference_data, run_folder
from dpo_lightning.callbacks.replies import RepliesCallback, answer
from dpo_lightning.data.batching import PairBatch, collate_prompts, to_pairs
from dpo_lightning.judging.judge import Judged, find_judges, verdicts
from dpo_lightning.parsing import check_settings

PREFIX = {"validate": "val", "test": "test"}  # of names, and the split's name in the datamodule


class EvaluationCallback(Callback):
    """Answers every prompt of the split that `validate` or `test` is about and judges the replies.

    The validations inside `fit` are left alone: they stay cheap. What was logged is written to `metrics.json` in the
    run's folder too; nan becomes null there.

    Args:
        judge: as of `RepliesCallback`; left out, that of the run's, or `sql` where it has none.
    """

    def __init__(self, judge: str | list[str] | None = None) -> None:
        check_settings(EvaluationCallback.__init__, locals(), "evaluation.")
        self.judges = None if judge is None else find_judges(judge)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn in PREFIX:
            preference_data(trainer, self)
            replies = find_callback(trainer, RepliesCallback)
            self.judges = self.judges or (replies.judges if replies else find_judges("sql"))
            self._judged, self._pairs = Judged().to(module.device), torch.tensor(0, device=module.device)

    def _judge(self, trainer: Trainer, module: LightningModule, batch: PairBatch) -> None:
        if trainer.state.fn not in PREFIX:
            return
        positions = batch.pair_ids.tolist()
        replies = answer(trainer, module, collate_prompts([pair.prompt_ids for pair in to_pairs(batch)], positions))
        pairs = trainer.datamodule.pairs(PREFIX[trainer.state.fn], positions)
        self._judged.update([verdicts(self.judges, *answered) for answered in zip(replies, pairs, strict=True)])
        self._pairs += len(pairs)

    def _log(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn not in PREFIX:
            return
        means = self._judged.compute()  # the same on all processes
        module.log_dict({f"{PREFIX[trainer.state.fn]}/{name}": mean for name, mean in means.items()}, sync_dist=True)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn not in PREFIX:
            return
        folder, pairs = run_folder(trainer), trainer.strategy.reduce(self._pairs, reduce_op="sum")
        if folder is None or not trainer.is_global_zero:
            return
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        result = {
            "command": str(trainer.state.fn.value),
            "model": module.hparams.name_or_path,
            "ckpt_path": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "pairs": int(pairs),
            "metrics": {name: None if math.isnan(value) else value for name, value in sorted(values.items())},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        rank_zero_info(f"metrics written to {folder / 'metrics.json'}")

    # ------------------------------------------------------------------ Lightning's hooks, twice the same

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answers the prompts of a batch and judges the replies."""
        self._judge(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the means over the whole split."""
        self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes everything that was logged."""
        self._write(trainer, pl_module)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end
