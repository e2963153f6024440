"""Writes the replies of `predict` to a .jsonl file, which an interrupted run continues."""

from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import preference_data
from dpo_lightning.data.batching import PromptBatch
from dpo_lightning.data.encoding import tokenizer_fingerprint
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import JudgeSetting, VerdictMeans, check_round, find_judges, verdicts
from dpo_lightning.judging.quantities import means_text
from dpo_lightning.models.reply import Reply
from dpo_lightning.parsing import check_settings
from dpo_lightning.storage.digests import key_digest, weights_digest
from dpo_lightning.storage.jsonl import Lines, append_lines, could_be_half, keep_lines, read_lines
from dpo_lightning.storage.locks import hold, let_go


class ReplyWriter(BasePredictionWriter):
    """Writes the replies of `predict` to the file `output`, a JSON line per prompt in the order of the data.

    If an interrupted run of the same model on the same prompts left such a file, it is continued. Any other file that
    exists is refused and left unchanged, and so is one that another `predict` is writing.

    Args:
        judge: as in `RepliesCallback`: each line gets the verdicts on its reply. By default there are none.
    """

    def __init__(self, output: str = "replies.jsonl", judge: JudgeSetting | None = None) -> None:
        check_settings(ReplyWriter.__init__, locals(), "predictions.")
        super().__init__(write_interval="batch")
        self.output = output
        self.judges = find_judges(judge, "predictions.judge") if judge is not None else {}
        self._judged_by = {"judge": key_digest(judge)[:12]} if self.judges else {}
        self._existing = Lines([], [], b"")  # of the file
        self._kept = 0  # how many of these lines stay
        self._all_prompts: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reduces the data to the prompts without a reply, before the loader is created.

        Raises:
            UserError: the file cannot be written, is being written, or does not hold replies to these prompts.
        """
        if stage != "predict":
            return
        data = preference_data(trainer, self)
        self._lock_file(trainer)
        prompts = data.datasets["predict"]
        self._existing = self._read(list(zip(prompts["row"][:], prompts["prompt"][:], strict=True)))
        # Each process answers at least one prompt, so that the model is always loaded and checked.
        self._kept = min(len(self._existing.objects), max(0, len(prompts) - trainer.world_size))
        self._all_prompts = prompts
        data.datasets["predict"] = prompts.select(range(self._kept, len(prompts)))

    @property
    def _lock(self) -> Path:
        output = Path(self.output)
        return output.with_name(f".{output.name}.lock")

    def _lock_file(self, trainer: Trainer) -> None:
        problem = None
        if trainer.is_global_zero:
            try:
                Path(self.output).parent.mkdir(parents=True, exist_ok=True)
                open(self.output, "ab").close()
                if not hold(self._lock):
                    problem = self._refusal("is being written by another predict", "wait until it ends")
            except OSError as error:
                problem = f"replies cannot be written to '{self.output}': {error.strerror}"
        if problem := trainer.strategy.broadcast(problem):
            raise UserError(problem)

    def _read(self, prompts: list[tuple[int, str]]) -> Lines:
        try:
            lines = read_lines(Path(self.output))
        except ValueError as error:
            raise UserError(self._refusal("is not a file of replies")) from error
        for number, line in enumerate(lines.objects, 1):
            if number > len(prompts) or (line.get("row"), line.get("prompt")) != prompts[number - 1]:
                raise UserError(self._refusal(f"holds, in line {number}, a reply to another prompt than the data have"))
        following = prompts[len(lines.objects) :][:1]
        if lines.rest and not any(
            could_be_half(lines.rest, {"row": row, "prompt": prompt, "reply": ""}) for row, prompt in following
        ):
            last = len(lines.ends) + 1
            raise UserError(self._refusal(f"is not a file of replies: its last line, {last}, is not part of one"))
        return lines

    def _refusal(self, problem: str, remedy: str = "delete it to start again") -> str:
        return f"'{self.output}' {problem}: choose another file with --predictions.output, or {remedy}"

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks, now that the weights are loaded, that the existing replies are this model's.

        Raises:
            UserError: another model generated them, or the same one with other settings.
        """
        self._model = reply_digest(trainer, pl_module)
        if any(line.get("model") != self._model for line in self._existing.objects):
            raise UserError(
                self._refusal(
                    "holds replies of another model (other weights, or another tokenizer, trainer.precision, "
                    "data.max_length or model.max_new_tokens)"
                )
            )
        if any(line.get("judge") != self._judged_by.get("judge") for line in self._existing.objects):
            raise UserError(self._refusal("holds replies that were judged otherwise (by another predictions.judge)"))
        if trainer.is_global_zero:
            keep_lines(Path(self.output), self._existing, self._kept)
        if self._kept:
            rank_zero_info(f"{self._kept} of {len(self._all_prompts)} replies are in {self.output} already")

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
        """Writes a batch of replies from all processes, in the order of the data."""
        positions = batch.pair_ids.tolist()
        pairs = trainer.datamodule.pairs("predict", positions)
        rows = trainer.datamodule.row_numbers("predict", positions)
        lines = []
        for position, reply, pair, row in zip(positions, prediction, pairs, rows, strict=True):
            line = {"row": row, "prompt": pair.prompt, "reply": reply.text, "stopped": reply.stopped}
            line |= {key: text for key, text in (("wanted", pair.chosen), ("context", pair.context)) if text}
            line |= verdicts(self.judges, reply, pair)
            lines.append((position, line | {"model": self._model} | self._judged_by))
        if trainer.world_size > 1:
            shards: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(shards, lines)
            lines = sorted((line for shard in shards for line in shard), key=itemgetter(0))
        if trainer.is_global_zero:
            append_lines(Path(self.output), [line for _, line in lines])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports where the replies are."""
        trainer.datamodule.datasets["predict"] = self._all_prompts
        rank_zero_info(f"replies written to {self.output}")
        if self.judges and trainer.is_global_zero:
            means = VerdictMeans()
            means.update(
                {name: line[name] for name in line if "/" in name} for line in read_lines(Path(self.output)).objects
            )
            rank_zero_info(means_text(means.compute()))
            check_round(self.judges, means)

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Unlocks the file."""
        let_go(self._lock, remove=True)

    on_exception = teardown  # after which Lightning does not call teardown


def reply_digest(trainer: Trainer, module: LightningModule) -> str:
    """A digest of all that replies depend on beside the prompts, in 12 hex digits. Call it on all ranks."""
    data = trainer.datamodule
    encoding = [data.max_length, tokenizer_fingerprint(data.tokenizer), str(trainer.precision)]
    return key_digest([model_digest(module), *encoding])[:12]


def model_digest(module: LightningModule) -> str:
    """A digest of every weight and of the limit on new tokens, in 12 hex digits."""
    return key_digest([weights_digest(module.causal_lm), module.hparams.max_new_tokens])[:12]
