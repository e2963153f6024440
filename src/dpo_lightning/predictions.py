"""Replies of `predict` -> a .jsonl file, a line per prompt in the order of the data, continued where it stopped."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.batching import PromptBatch
from dpo_lightning.errors import UserError
from dpo_lightning.jsonl import append_lines, replace_lines, whole_lines
from dpo_lightning.replies import Reply
from dpo_lightning.run_context import preference_data

SAMPLED = 1000  # values of each weight that go into the model's digest


class ReplyWriter(BasePredictionWriter):
    """Writes the replies of `predict` to a .jsonl file, a line per prompt in the order of the data.

    A file that an interrupted run of the same model on the same prompts left is continued.

    Args:
        output: the file.
    """

    def __init__(self, output: str = "replies.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.output = output
        self._kept: list[dict[str, Any]] = []
        self._all_prompts: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves to the loader, which is made after this, only the prompts that have no reply yet.

        Raises:
            UserError: the file cannot be written, or holds something else than replies to these prompts.
        """
        if stage != "predict":
            return
        data = preference_data(trainer, self)
        self._check_writable(trainer)
        prompts = data.datasets["predict"]
        self._kept = self._read_kept(list(zip(prompts["row"][:], prompts["prompt"][:], strict=True)))
        # At least one prompt for each process stays, so that there is always something to run and check.
        del self._kept[max(0, len(prompts) - trainer.world_size) :]
        self._all_prompts = prompts
        data.datasets["predict"] = prompts.select(range(len(self._kept), len(prompts)))

    def _check_writable(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        try:
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
            open(self.output, "a").close()
        except OSError as error:
            raise UserError(f"replies cannot be written to '{self.output}': {error.strerror}") from error

    def _read_kept(self, prompts: list[tuple[int, str]]) -> list[dict[str, Any]]:
        try:
            kept = whole_lines(Path(self.output))
        except ValueError as error:
            raise UserError(self._refusal("is not a file of replies")) from error
        for number, line in enumerate(kept, 1):
            if number > len(prompts) or (line.get("row"), line.get("prompt")) != prompts[number - 1]:
                raise UserError(
                    self._refusal(f"holds, in line {number}, a reply to another prompt than these data have")
                )
        return kept

    def _refusal(self, what: str) -> str:
        return f"'{self.output}' {what}: choose another file with --predictions.output, or delete it to start anew"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks, now that the weights are there, that the kept replies are this model's.

        Raises:
            UserError: they are another model's.
        """
        self._model = model_digest(pl_module)
        if any(line.get("model") != self._model for line in self._kept):
            raise UserError(
                self._refusal("holds replies of another model (other weights, or another model.max_new_tokens)")
            )
        if trainer.is_global_zero:
            replace_lines(Path(self.output), self._kept)
        if self._kept:
            rank_zero_info(f"{len(self._kept)} of {len(self._all_prompts)} replies are in {self.output} already")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: list[Reply],
        batch_indices: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Writes a batch of replies, those of all processes in the order of the data."""
        answered = list(zip(batch.pair_ids.tolist(), prediction, strict=True))
        if trainer.world_size > 1:
            shards: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shards, answered)
            answered = sorted(item for shard in shards for item in shard)
        if not trainer.is_global_zero:
            return
        positions = [position for position, _ in answered]
        pairs = trainer.datamodule.pairs("predict", positions)
        rows = trainer.datamodule.row_numbers("predict", positions)
        lines = []
        for (_, reply), pair, row in zip(answered, pairs, rows, strict=True):
            line = {"row": row, "prompt": pair.prompt, "reply": reply.text, "stopped": reply.stopped}
            wanted = {"wanted": pair.chosen, "context": pair.context}
            lines.append(line | {key: text for key, text in wanted.items() if text} | {"model": self._model})
        append_lines(Path(self.output), lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the replies are."""
        trainer.datamodule.datasets["predict"] = self._all_prompts
        rank_zero_info(f"replies written to {self.output}")


def model_digest(module: LightningModule) -> str:
    """What a model's replies hang on, in 12 hex digits: a sample of every weight, and the limit on new tokens."""
    digest = hashlib.sha256(str(module.hparams.max_new_tokens).encode())
    for name, weight in module.causal_lm.named_parameters():
        values = weight.detach().flatten()
        sample = values[:: max(1, len(values) // SAMPLED)].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()[:12]
