"""Prompts -> greedy replies, their judgment, and the callback that shows and keeps them before, during and after."""

import time
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.context import preference_data, run_folder, tensorboard_writer
from dpo_lightning.data.batching import PairBatch, PromptBatch, collate_prompts
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.judge import Judged, Verdict, find_judges, verdicts
from dpo_lightning.judging.quantities import marks, quantity
from dpo_lightning.judging.views import markdown_table, show_replies
from dpo_lightning.models.generate import Reply
from dpo_lightning.parsing import AtLeast1, Count, check_settings
from dpo_lightning.storage.jsonl import append_lines, could_be_half, keep_lines, read_lines
from dpo_lightning.storage.states import check_state

REMEMBERED = 6  # prompts whose replies are kept in memory and in checkpoints, for the report


def answer(trainer: Trainer, module: LightningModule, prompts: PromptBatch) -> list[Reply]:
    """The policy's replies, on the run's device and in its precision."""
    prompts = PromptBatch(*(tensor.to(module.device) for tensor in prompts))
    with trainer.precision_plugin.forward_context():
        return module.predict_step(prompts, 0)


class Showing(NamedTuple):
    """What was answered at one step."""

    step: int
    texts: list[str]  # of the first `REMEMBERED` prompts
    judged: list[dict[str, Verdict]]  # of the same; bools are 0 and 1 in checkpoints from before they were
    shares: dict[str, float]  # means over all prompts whose replies could be judged
    counts: dict[str, int] | None = None  # how many replies each mean is of; None in checkpoints from before it was
    changed: int | None = None  # replies that are not those of the first showing


STATE = {"reference": [(str, [int], bool)], "showings": [list]}  # `Reply` and `Showing`
JUDGED, SHARED = {str: bool | int | float | None}, ("reply/eos_rate", "reply/length", "reply/repetition")
SHOWING = (int, [str], [JUDGED], dict.fromkeys(SHARED, int | float), {str: int}, int | None)


class RepliesCallback(Callback):
    """Answers held-out prompts before, during and after training.

    The same prompts are answered every time. The console shows them beside the first and the wanted reply, TensorBoard
    gets a text page with policy and reference side by side and the means of all verdicts, and `replies.jsonl` in the
    run's folder a line per reply with its verdicts. The reference's replies are the policy's before training: they are
    generated once.

    Args:
        every_n_steps: optimizer steps between two showings; 0 shows only before and after.
        num_prompts: held-out prompts that are answered each time.
        num_shown: how many of them are shown in the console.
        judge: a judge of `dpo_lightning.judging.judge`, one of your own (`my_module:my_judge`), or several.
    """

    def __init__(
        self,
        every_n_steps: Count = 50,
        num_prompts: AtLeast1 = 16,
        num_shown: Count = 4,
        judge: str | list[str] = "sql",
    ) -> None:
        check_settings(RepliesCallback.__init__, locals(), "replies.")
        self.judges = find_judges(judge)
        self.every_n_steps, self.num_prompts, self.num_shown = every_n_steps, num_prompts, num_shown
        self.pairs: list[PreferencePair] = []
        self.showings: list[Showing] = []
        self.seconds, self.run_seconds = 0.0, 0.0  # spent on replies, and on the whole training
        self._reference: list[Reply] = []

    # ------------------------------------------------------------------ when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the prompts: the first held-out pairs, or training pairs where none are held out."""
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
        """Shows the replies before the first step. A resumed run goes on where its checkpoint was written."""
        self._began = time.perf_counter()
        if self.showings and self.showings[-1].step > trainer.global_step:
            raise UserError(
                f"--ckpt_path '{trainer.ckpt_path}' is of step {trainer.global_step}, but has replies of step "
                f"{self.showings[-1].step}: it was edited; resume from another one"
            )
        if self._file is not None:
            self._open_file()
        if not self.showings:
            self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PairBatch, batch_idx: int
    ) -> None:
        """Shows the replies every `every_n_steps` steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the replies after the last step, and says what all of them cost."""
        self._show(trainer, pl_module)
        self.run_seconds = time.perf_counter() - self._began
        share = self.seconds / self.run_seconds
        advice = "; a larger replies.every_n_steps makes it less" if share > 0.1 and self.every_n_steps else ""
        rank_zero_info(f"replies took {self.seconds:.1f} s, {share:.0%} of the training time{advice}")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot make again: the replies before training, and what was shown since."""
        return {
            "reference": [list(reply) for reply in self._reference],
            "showings": [list(showing) for showing in self.showings],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave.

        Raises:
            ValueError: it is not as that gave it.
            UserError: it is of another number of prompts.
        """
        check_state(state_dict, STATE, "the replies")
        if self.pairs and state_dict["reference"] and len(state_dict["reference"]) != len(self.pairs):
            raise UserError(
                f"replies.num_prompts gives {len(self.pairs)}, but {len(state_dict['reference'])} were answered "
                "in the run that is resumed, and the same prompts are answered every time: set it back"
            )
        self._reference = [Reply(*fields) for fields in state_dict["reference"]]
        self.showings = [Showing(*fields) for fields in state_dict["showings"]]
        for showing in self.showings:
            check_state(showing._replace(counts=showing.counts or {}), SHOWING, "a showing of replies")
            check_state(showing.shares, {str: int | float}, "a showing's shares")

    # ------------------------------------------------------------------ what

    def _show(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if self.showings and self.showings[-1].step >= step:
            return  # with accumulation a step has several batches
        began = time.perf_counter()
        replies = answer(trainer, module, self._prompts)  # on all ranks: a sharded policy needs them all
        if not self._reference:
            self._reference = replies
        judged = [verdicts(self.judges, reply, pair) for reply, pair in zip(replies, self.pairs, strict=True)]
        means = Judged(sync_on_compute=False)  # all processes judge the same replies
        means.update(judged)
        counts = {name: int(count) for name, count in zip(means.names, means.counts, strict=True) if count}
        shares = {name: mean.item() for name, mean in means.compute().items() if name in counts}
        texts = [reply.text for reply in replies]
        changed = sum(text != before.text for text, before in zip(texts, self._reference, strict=True))
        self.showings.append(Showing(step, texts[:REMEMBERED], judged[:REMEMBERED], shares, counts, changed))
        if trainer.is_global_zero:
            self._to_console(replies)
            self._to_tensorboard(trainer, replies, judged)
            self._to_file(replies, judged)
        self.seconds += time.perf_counter() - began

    def _to_console(self, replies: list[Reply]) -> None:
        showing = self.showings[-1]
        now = {"now": [reply.text for reply in replies]} if replies is not self._reference else {}
        show_replies(
            f"step {showing.step}" if showing.step else "before training",
            [pair.prompt for pair in self.pairs[: self.num_shown]],
            {
                "before": [reply.text for reply in self._reference],
                **now,
                "wanted": [pair.chosen for pair in self.pairs],
            },
            showing.shares,
            sql=any(pair.context for pair in self.pairs),
        )

    def _to_tensorboard(self, trainer: Trainer, replies: list[Reply], judged: list[dict[str, Verdict]]) -> None:
        showing = self.showings[-1]
        for logger in trainer.loggers:
            logger.log_metrics({f"replies/{name}": share for name, share in showing.shares.items()}, showing.step)
        if writer := tensorboard_writer(trainer):
            rows = [
                (pair.prompt, reply.text, before.text, pair.chosen, _in_words(found))
                for pair, reply, before, found in zip(self.pairs, replies, self._reference, judged, strict=True)
            ]
            page = markdown_table(("prompt", "policy", "reference", "wanted", "the policy's reply is"), rows)
            writer.add_text("replies", page, showing.step)
            writer.flush()

    # ------------------------------------------------------------------ replies.jsonl

    def _open_file(self) -> None:
        """Keeps of a file from before a kill what the run resumed from; the rest is about to be made again."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        try:
            if self._file.exists() and not self._file.is_file():  # a pipe would be waited for
                raise ValueError("it is no file")
            lines = read_lines(self._file)
            steps = [int(line["step"]) for line in lines.objects]
            ours = all("reply" in line for line in lines.objects) and could_be_half(lines.rest, {"step": 0})
            if not ours:
                raise ValueError("it holds something else")
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"'{self._file}' is not a file of replies: move it away") from error
        last = self.showings[-1].step if self.showings else -1
        keep_lines(self._file, lines, next((i for i, step in enumerate(steps) if step > last), len(steps)))

    def _to_file(self, replies: list[Reply], judged: list[dict[str, Verdict]]) -> None:
        if self._file is None:
            return
        lines = (
            {
                "step": self.showings[-1].step,
                "prompt": pair.prompt,
                "reply": reply.text,
                "reference": before.text,
                "wanted": pair.chosen,
                "stopped": reply.stopped,
                **{
                    name: verdict for name, verdict in found.items() if quantity(name).word and name != "reply/eos_rate"
                },
            }
            for pair, reply, before, found in zip(self.pairs, replies, self._reference, judged, strict=True)
        )
        append_lines(self._file, lines)


def _in_words(found: dict[str, Verdict]) -> str:
    """{"sql/valid": True, "sql/exact": False, "reply/eos_rate": True, ...} -> "valid, ended"."""
    return ", ".join(word for word, is_so in marks(found) if is_so)
