"""Prompts -> greedy replies, and the callbacks that show them during a run, judge them, and write them to a file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from dpo_lightning.batching import PairBatch, PromptBatch, collate_prompts, to_pairs
from dpo_lightning.errors import UserError
from dpo_lightning.logps import evaluating
from dpo_lightning.reply_metrics import ReplyMetrics
from dpo_lightning.rows import PreferencePair
from dpo_lightning.sql import SQLMetrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Reply(NamedTuple):
    """What a model answered to one prompt."""

    text: str
    token_ids: list[int]  # EOS not counted
    stopped: bool  # ended by EOS, not by the length limit


@torch.no_grad()
def generate(
    model: "PreTrainedModel", prompts: PromptBatch, tokenizer: "PreTrainedTokenizerBase", max_new_tokens: int
) -> list[Reply]:
    """Greedy replies to a batch of prompts on the model's device, with a KV cache.

    The model's own generation settings (sampling, penalties) are not used: replies are to show the model.
    """
    from transformers import GenerationConfig

    eos = tokenizer.eos_token_id
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    room = max(1, limit - max_new_tokens)
    config = GenerationConfig(
        max_new_tokens=min(max_new_tokens, limit - 1), do_sample=False, eos_token_id=eos, pad_token_id=eos
    )
    with evaluating(model):  # in train mode gradient checkpointing would switch the KV cache off
        output = model.generate(
            input_ids=prompts.input_ids[:, -room:],
            attention_mask=prompts.attention_mask[:, -room:],
            generation_config=config,
        )
    replies = []
    for ids in output[:, prompts.input_ids[:, -room:].shape[1] :].tolist():
        stopped = eos in ids
        ids = ids[: ids.index(eos)] if stopped else ids
        replies.append(Reply(tokenizer.decode(ids, skip_special_tokens=False), ids, stopped))
    return replies


class RepliesCallback(Callback):
    """Answers held-out prompts before, during and after training, and judges the replies of a whole test split.

    In `fit` the same prompts are answered every time and shown in the console beside the first and the wanted
    reply; the shares of `SQLMetrics` (for data with a SQL context) and of `ReplyMetrics` over them are logged.

    Args:
        every_n_steps: optimizer steps between two showings; 0 shows only before and after.
        num_prompts: held-out prompts that are answered each time.
        num_shown: how many of them are shown in the console.
    """

    def __init__(self, every_n_steps: int = 50, num_prompts: int = 16, num_shown: int = 4) -> None:
        if every_n_steps < 0 or num_prompts < 1 or num_shown < 0:
            raise UserError("replies: every_n_steps and num_shown must be 0 or more, num_prompts at least 1")
        self.every_n_steps, self.num_prompts, self.num_shown = every_n_steps, num_prompts, num_shown
        self._before: list[Reply] | None = None
        self._last_step = -1

    # ------------------------------------------------------------------ fit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the replies before the first step (or at the step that a run is resumed from)."""
        self._answer(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Shows the replies every `every_n_steps` steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._answer(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the replies after the last step."""
        self._answer(trainer, pl_module)

    def _answer(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step == self._last_step or not trainer.is_global_zero:
            return  # with accumulation a step has several batches
        self._last_step = trainer.global_step
        data = trainer.datamodule
        name = "val" if "val" in data.datasets else "train"
        positions = range(min(self.num_prompts, len(data.datasets[name])))
        prompts = collate_prompts(data.datasets[name][list(positions)]["prompt_ids"], list(positions))
        replies = self._generate(trainer, module, prompts)
        if self._before is None:
            self._before = replies
        pairs = data.pairs(name, positions)
        shares = judge(replies, pairs)
        if trainer.logger:
            trainer.logger.log_metrics({f"replies/{k}": v for k, v in shares.items()}, step=trainer.global_step)
        show_replies(
            f"step {trainer.global_step}" if trainer.global_step else "before training",
            [pair.prompt for pair in pairs[: self.num_shown]],
            {
                "before": [reply.text for reply in self._before],
                **({"now": [reply.text for reply in replies]} if replies is not self._before else {}),
                "wanted": [pair.chosen for pair in pairs],
            },
            shares,
        )

    # ------------------------------------------------------------------ test

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts counting."""
        self._judges = [judge.to(pl_module.device) for judge in (ReplyMetrics(), SQLMetrics())]

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PairBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Answers the prompts of a batch and judges the replies."""
        prompts = collate_prompts([pair.prompt_ids for pair in to_pairs(batch)], batch.pair_ids.tolist())
        replies = self._generate(trainer, pl_module, prompts)
        judge(replies, trainer.datamodule.pairs("test", batch.pair_ids.tolist()), *self._judges)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the shares over the whole split."""
        shares = {name: value for metric in self._judges for name, value in metric.compute().items()}
        pl_module.log_dict({f"test/{name}": value for name, value in shares.items()}, sync_dist=True)

    @staticmethod
    def _generate(trainer: Trainer, module: LightningModule, prompts: PromptBatch) -> list[Reply]:
        prompts = PromptBatch(*(tensor.to(module.device) for tensor in prompts))
        with trainer.precision_plugin.forward_context():
            return generate(module.causal_lm, prompts, trainer.datamodule.tokenizer, module.hparams.max_new_tokens)


def judge(
    replies: Sequence[Reply],
    pairs: Sequence[PreferencePair],
    reply_metrics: ReplyMetrics | None = None,
    sql_metrics: SQLMetrics | None = None,
) -> dict[str, float]:
    """Adds replies to metrics (new ones if none are given) and returns the shares so far.

    Replies are judged as SQL where their pair has a context; the wanted reply is the chosen completion.
    """
    reply_metrics, sql_metrics = reply_metrics or ReplyMetrics(), sql_metrics or SQLMetrics()
    reply_metrics.update([reply.token_ids for reply in replies], [reply.stopped for reply in replies])
    with_context = [
        (reply.text, pair.chosen.strip(), pair.context)
        for reply, pair in zip(replies, pairs, strict=True)
        if pair.context
    ]
    if with_context:
        sql_metrics.update(*map(list, zip(*with_context, strict=True)))
    shares = reply_metrics.compute() | (sql_metrics.compute() if with_context else {})
    return {name: float(value) for name, value in shares.items()}


def show_replies(
    title: str, prompts: Sequence[str], columns: dict[str, Sequence[str]], shares: dict[str, float]
) -> None:
    """Prints a table with a row per prompt: its last lines, and what stands in each of `columns`."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Replies, {title}", show_lines=True, caption=", ".join(f"{k} {v:.3g}" for k, v in shares.items())
    )
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold", ratio=1)
    for i, prompt in enumerate(prompts):
        cells = [prompt, *(column[i] for column in columns.values())]
        # Text, not markup: a reply must not be able to style or link itself.
        table.add_row(*(Text(fold(cell)) for cell in cells))
    Console().print(table)


def fold(text: str, length: int = 240) -> str:
    """Text for a table cell: control characters shown as escapes, the middle of a long one left out."""
    text = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text.strip())
    return text if len(text) <= length else f"{text[: length * 2 // 3]} … {text[-length // 3 :]}"


class ReplyWriter(BasePredictionWriter):
    """Writes the replies of `predict` to a .jsonl file, a line per prompt in the order of the data.

    Args:
        output: the file; an existing one is replaced.
    """

    def __init__(self, output: str = "replies.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.output = output

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Opens the file, so that a place that cannot be written to is found before the work."""
        try:
            Path(self.output).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.output, "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"replies cannot be written to '{self.output}': {error.strerror}") from error

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
        """Writes a batch of replies."""
        positions = batch.pair_ids.tolist()
        for position, reply, pair in zip(
            positions, prediction, trainer.datamodule.pairs("predict", positions), strict=True
        ):
            line = {"row": position + 1, "prompt": pair.prompt, "reply": reply.text, "stopped": reply.stopped}
            if pair.chosen:
                line["wanted"] = pair.chosen
            if pair.context:
                line["context"] = pair.context
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the file."""
        self._file.close()
        print(f"replies written to {self.output}")
