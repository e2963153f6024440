"""Replies to held-out prompts before, during and after training: generated, judged, printed and kept."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import preference_data, run_folder, tensorboard_writer
from dpo_lightning.data.batching import PairBatch, PromptBatch, collate_prompts
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import JudgeSetting, Verdict, VerdictMeans, check_round, find_judges, verdicts
from dpo_lightning.judging.quantities import marks, quantity, reply_tag
from dpo_lightning.judging.views import markdown_table, show_replies
from dpo_lightning.models.reply import Reply
from dpo_lightning.parsing import AtLeast1, Count, check_settings
from dpo_lightning.storage.jsonl import append_lines, could_be_half, keep_lines, read_lines
from dpo_lightning.storage.states import check_state

COLUMNS = ("prompt", "policy", "reference", "wanted", "the policy's reply is")  # of the table that loggers get
REMEMBERED = 6  # prompts whose replies stay in memory and in checkpoints, for the report


def answer(trainer: Trainer, module: LightningModule, prompts: PromptBatch) -> list[Reply]:
    """The policy's greedy replies, on the run's device and in its precision."""
    prompts = PromptBatch(*(tensor.to(module.device) for tensor in prompts))
    with trainer.precision_plugin.forward_context():
        return module.predict_step(prompts, 0)


class Showing(NamedTuple):
    """The replies at one step."""

    step: int
    texts: list[str]  # replies to the first `REMEMBERED` prompts
    judged: list[dict[str, Verdict]]  # the verdicts on these; older checkpoints have 0 and 1 for booleans
    shares: dict[str, float]  # means of the verdicts on the replies to all prompts
    counts: dict[str, int] | None = None  # replies behind each mean; None in older checkpoints
    changed: int | None = None  # replies that differ from those before training; None in older checkpoints


STATE = {"reference": [(str, [int], bool)], "showings": [list]}  # `Reply` and `Showing`
JUDGED, SHARED = {str: bool | int | float | None}, ("reply/eos_rate", "reply/length", "reply/repetition")
SHOWING = (int, [str], [JUDGED], dict.fromkeys(SHARED, int | float), {str: int}, int | None)


class RepliesCallback(Callback):
    """Answers the same held-out prompts before, during and after training.

    The console prints a table with the reply before training, the current one and the wanted one. TensorBoard gets the
    means of all verdicts and a page of text with policy and reference side by side; `replies.jsonl` in the run's folder
    gets a line per reply with its verdicts. The reference's replies are the policy's before training, so they are
    generated once.

    Args:
        every_n_steps: optimizer steps between two rounds of replies; 0 is only before and after training.
        num_prompts: held-out prompts to answer each time.
        num_shown: how many of them the console prints; 0 is no table.
        judge: a judge of `dpo_lightning.judging.kinds`, a function of your own (`my_module:my_function`), or several,
            each with or without options (`dpo_lightning.judging.judge`).
    """

    def __init__(
        self,
        every_n_steps: Count = 50,
        num_prompts: AtLeast1 = 16,
        num_shown: Count = 4,
        judge: JudgeSetting = "sql",
    ) -> None:
        check_settings(RepliesCallback.__init__, locals(), "replies.")
        self.judges = find_judges(judge)
        self.every_n_steps, self.num_prompts, self.num_shown = every_n_steps, num_prompts, num_shown
        self.pairs: list[PreferencePair] = []
        self.showings: list[Showing] = []
        self.seconds, self.run_seconds = 0.0, 0.0  # spent on replies, and on all of the training
        self._reference: list[Reply] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Chooses the prompts: the first held-out pairs, or training pairs where none are held out."""
        if stage != "fit":
            return
        data = preference_data(trainer, self)
        name = "val" if "val" in data.datasets else "train"
        positions = list(range(min(self.num_prompts, len(data.datasets[name]))))
        self.pairs = data.pairs(name, positions)
        self._prompts = collate_prompts(data.datasets[name][positions]["prompt_ids"], positions)
        folder = run_folder(trainer)
        self._file = folder / "replies.jsonl" if folder and trainer.is_global_zero else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers before the first step; a resumed run has those replies in its checkpoint."""
        self._began = time.perf_counter()
        if self.showings and self.showings[-1].step > trainer.global_step:
            raise UserError(
                f"--ckpt_path '{trainer.ckpt_path}' is of step {trainer.global_step}, but has replies of step "
                f"{self.showings[-1].step}: it was edited; resume from another one"
            )
        if self._file:
            self._open_file(self._file)
        if not self.showings:
            self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Answers every `every_n_steps` steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answers after the last step, and says so if replies took much of the time."""
        self._show(trainer, pl_module)
        self.run_seconds = time.perf_counter() - self._began
        share = self.seconds / self.run_seconds
        if share > 0.1 and self.every_n_steps:
            rank_zero_info(f"replies took {share:.0%} of the training time; a larger replies.every_n_steps saves some")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot generate again: the replies before training, and all rounds since."""
        return {
            "reference": [list(reply) for reply in self._reference],
            "showings": [list(showing) for showing in self.showings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned.

        Raises:
            ValueError: the state has another structure.
            UserError: the state has another number of prompts.
        """
        check_state(state_dict, STATE, "the replies")
        if self.pairs and state_dict["reference"] and len(state_dict["reference"]) != len(self.pairs):
            raise UserError(
                f"replies.num_prompts gives {len(self.pairs)}, but {len(state_dict['reference'])} were answered "
                "in the run that is resumed, and a run answers the same prompts every time: set it back"
            )
        self._reference = [Reply(*fields) for fields in state_dict["reference"]]
        self.showings = [Showing(*fields) for fields in state_dict["showings"]]
        for showing in self.showings:
            check_state(showing._replace(counts=showing.counts or {}), SHOWING, "a showing of replies")
            check_state(showing.shares, {str: int | float}, "a showing's shares")

    # ------------------------------------------------------------------ one round of replies

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if self.showings and self.showings[-1].step >= step:
            return  # with accumulation a step has several batches
        began = time.perf_counter()
        replies = answer(trainer, module, self._prompts)  # on all ranks, which a sharded policy needs
        self._reference = self._reference or replies
        judged = [verdicts(self.judges, reply, pair) for reply, pair in zip(replies, self.pairs, strict=True)]
        means = VerdictMeans()  # all processes judge the same replies
        means.update(judged)
        check_round(self.judges, means)
        counts = {name: count for name, (_, count) in means.totals.items() if count}
        shares = {name: mean for name, mean in means.compute().items() if name in counts}
        texts, before = ([reply.text for reply in answered] for answered in (replies, self._reference))
        changed = sum(map(str.__ne__, texts, before))
        self.showings.append(Showing(step, texts[:REMEMBERED], judged[:REMEMBERED], shares, counts, changed))
        if trainer.is_global_zero:
            if self.num_shown:
                self._to_console(texts, before)
            self._to_loggers(trainer, texts, before, judged)
            if self._file:
                append_lines(self._file, self._lines(replies, before, judged))
        self.seconds += time.perf_counter() - began

    def _to_console(self, texts: list[str], before: list[str]) -> None:
        showing = self.showings[-1]
        now = {"now": texts} if len(self.showings) > 1 else {}
        judged = {name.partition("/")[0] for name in showing.shares}
        show_replies(
            f"step {showing.step}" if showing.step else "before training",
            [pair.prompt for pair in self.pairs[: self.num_shown]],
            {"before": before, **now, "wanted": [pair.chosen for pair in self.pairs]},
            showing.shares,
            next((j.kind.syntax for name, j in self.judges.items() if name in judged and j.kind.syntax), None),
        )

    def _to_loggers(
        self, trainer: Trainer, texts: list[str], before: list[str], judged: list[dict[str, Verdict]]
    ) -> None:
        showing = self.showings[-1]
        for logger in trainer.loggers:
            logger.log_metrics({reply_tag(name): share for name, share in showing.shares.items()}, showing.step)
        passed = [", ".join(word for word, is_so in marks(found) if is_so) for found in judged]
        prompts, wanted = zip(*((pair.prompt, pair.chosen) for pair in self.pairs), strict=True)
        rows = list(zip(prompts, texts, before, wanted, passed, strict=True))
        page = markdown_table(COLUMNS, rows)
        if writer := tensorboard_writer(trainer):
            writer.add_text("replies", page, showing.step)
            writer.flush()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("replies/table", list(COLUMNS), [list(row) for row in rows], step=showing.step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_text(logger.run_id, page, f"replies/step{showing.step}.md")

    # ------------------------------------------------------------------ replies.jsonl

    def _open_file(self, path: Path) -> None:
        """Cuts a file that a killed run left to the replies before the checkpoint: the others are generated again."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.exists() and not path.is_file():  # reading a pipe would wait forever
                raise ValueError("it is no file")
            lines = read_lines(path)
            steps = [int(line["step"]) for line in lines.objects]
            if not all("reply" in line for line in lines.objects) or not could_be_half(lines.rest, {"step": 0}):
                raise ValueError("it holds something else")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"'{path}' is not a file of replies: move it away") from error
        last = self.showings[-1].step if self.showings else -1
        keep_lines(path, lines, next((i for i, step in enumerate(steps) if step > last), len(steps)))

    def _lines(
        self, replies: list[Reply], before: list[str], judged: list[dict[str, Verdict]]
    ) -> Iterator[dict[str, Any]]:
        for pair, reply, reference, found in zip(self.pairs, replies, before, judged, strict=True):
            yield {
                "step": self.showings[-1].step,
                "prompt": pair.prompt,
                "reply": reply.text,
                "reference": reference,
                "wanted": pair.chosen,
                "stopped": reply.stopped,  # that is reply/eos_rate
                **{name: value for name, value in found.items() if quantity(name).word and name != "reply/eos_rate"},
            }
