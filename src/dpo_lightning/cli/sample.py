"""The command `sample`, a stage of `rounds`: a model's judged replies, first to the held-out prompts, then to others.

It is a command of its own, so that it can start a process for each device as `fit` does, and frees all memory at its
end. Everything it makes is in files; what is there already is not made again.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.callbacks.report.rounds import publish
from dpo_lightning.cli.export import export
from dpo_lightning.cli.rounds_settings import Rounds
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.columns import text_keys
from dpo_lightning.data.generated import MODEL_SETTINGS, generation_from
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.errors import UserError
from dpo_lightning.judging.sampling import VLLM, JudgedReplies
from dpo_lightning.judging.verified import HeldOut, mean_score
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.jsonl import append_lines

if TYPE_CHECKING:
    from datasets import Dataset

START = "start.json"  # beside the held-out replies: which of several models they are of
ROWS = "held-out-rows.jsonl"  # the held-out pairs, as a data set


@dataclass(frozen=True)
class Stage:
    """What one call of `sample` makes.

    Args:
        models: folders of models, or checkpoints; the one with the best held-out replies is used.
        held_out: folder for its greedy replies to the held-out prompts.
        samples: file for its samples for the rounds' prompts; left out, none are made.
        number: of the round.
    """

    models: list[str]
    held_out: str
    samples: str | None = None
    number: int = 1


class SampleCLI(DPOCLI):
    """The configuration of a run, with those of the rounds and of the stage."""

    command = "sample"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds both."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Rounds, "rounds")
        parser.add_class_arguments(Stage, "stage")


def run_sample(args: Sequence[str]) -> None:
    """Runs `sample` with its arguments, the command's name first."""
    cli = configured(SampleCLI, args[1:], run=False)
    sys.argv[1:] = args  # with the command, as Lightning starts the processes of further devices with these
    launcher = cli.trainer.strategy.launcher
    if launcher is None:
        sample(cli)
    else:
        launcher.launch(sample, cli)


def sample(cli: SampleCLI) -> None:
    """Makes the files of a stage. Runs on all ranks."""
    trainer, data, stage = cli.trainer, cli.datamodule, Stage(**cli.config.stage.as_dict())
    trainer.strategy.connect(cli.model)
    trainer.strategy.setup_environment()
    data.trainer = trainer
    data.generates = False
    data.setup("fit")
    rounds = Rounds(**cli.config.rounds.as_dict())
    if rounds.prompt_dataset:
        data.hparams.predict_dataset = rounds.prompt_dataset
        data.setup("predict")
    answering = Answering(cli, rounds, stage)
    model = answering.best_model()
    if trainer.is_global_zero:
        publish(Path(answering.rounds.folder))
    if stage.samples and not Path(stage.samples).exists():
        answering.sample(model, Path(stage.samples))


class Answering:
    """The two parts of a stage."""

    def __init__(self, cli: SampleCLI, rounds: Rounds, stage: Stage) -> None:
        self.rounds, self.stage, self.data, self.trainer = rounds, stage, cli.datamodule, cli.trainer
        self.settings = {name: cli.config.model[name] for name in MODEL_SETTINGS}
        if self.settings["attn_implementation"] == "packed":  # which is for pairs, not for replies
            self.settings["attn_implementation"] = None
        self.max_new_tokens = cli.config.model.max_new_tokens

    def replies(self, model: str, pairs: "Dataset", name: str, samples: int) -> list[dict[str, Any]]:
        """Judged replies of a model to pairs; `samples` as in `JudgedReplies`."""
        rounds, data = self.rounds, self.data
        options = {"temperature": rounds.temperature, "top_p": rounds.top_p, "max_new_tokens": self.max_new_tokens}
        generation = generation_from(self.settings | options | {"name_or_path": model}, data.max_length)
        seed, answers = data.hparams.seed + self.stage.number, rounds.margin is not None
        # Greedy replies are always those of transformers, as `test` and `predict` give them.
        vllm = VLLM(rounds.vllm, Path(self.stage.samples or ".").parent) if rounds.vllm and samples else None
        maker = JudgedReplies(generation, data.tokenizer, data.max_length, seed, samples, rounds.judge, answers, vllm)
        return maker.make(pairs, name, data.eval_batch_size, self.trainer)

    def best_model(self) -> str:
        """The folder of the model with the best held-out replies, which are written to `stage.held_out`."""
        folder = Path(self.stage.held_out)
        if (folder / START).exists():
            return json.loads((folder / START).read_text(encoding="utf-8"))["model"]
        if "val" not in self.data.datasets:
            raise UserError("no prompts are held out to compare rounds by: set data.val_size, or give data.val_dataset")
        pairs = texts_of(self.data.datasets["val"])
        found: dict[str, list[HeldOut]] = {}
        for name in self.stage.models:
            model = self._folder_of(name)
            results = self.replies(model, pairs, f"Held-out replies of {model}", 0)
            found[model] = [held_out(pair, result) for pair, result in zip(self._texts(pairs), results, strict=True)]
        means = {model: mean_score(lines) for model, lines in found.items()}
        best = max(found, key=lambda model: (means[model] is not None, means[model] or 0.0))  # of equals, the first
        if len(means) > 1:
            rank_zero_info(f"best on the held-out prompts: {best} (of {', '.join(means)})")
        if self.trainer.is_global_zero:
            write_lines(folder / ROWS, (row_of(pair) for pair in self._texts(pairs)))
            write_lines(folder / "held-out.jsonl", (line._asdict() for line in found[best]))
            prompt_format = self.data.prompt_format()
            rendered = prompt_format and (prompt_format.chat or prompt_format.prompt_template is not None)
            found_out = {"model": best, "means": means, "format": "rendered" if rendered else "preference"}
            with atomic_file(folder / START) as partial:
                partial.write_text(json.dumps(found_out, indent=2) + "\n", encoding="utf-8")
        self.trainer.strategy.barrier("held-out replies")
        return best

    def _folder_of(self, name: str) -> str:
        """A model's folder; a checkpoint is first exported to one."""
        if not name.endswith(".ckpt"):
            return name
        folder = Path(self.stage.held_out) / Path(name).stem
        if self.trainer.is_global_zero and not folder.exists():
            export(name, str(folder), trust_remote_code=self.settings["trust_remote_code"])
        self.trainer.strategy.barrier("exported")
        return str(folder)

    def sample(self, model: str, path: Path) -> None:
        """Samples replies to the prompts of a round, and writes a line for each prompt."""
        pairs = self._prompts()
        rounds = self.rounds
        name = f"Round {self.stage.number}, {rounds.samples} replies to each of {len(pairs)} prompts"
        results = self.replies(model, pairs, name, rounds.samples)
        if self.trainer.is_global_zero:
            lines = zip(self._texts(pairs), results, strict=True)
            write_lines(path, (row_of(pair) | {"score": r["answer"], "replies": r["replies"]} for pair, r in lines))

    def _prompts(self) -> "Dataset":
        """The pairs to answer, each prompt with each answer once, or `rounds.prompts` of them drawn for this round."""
        source = self.data.datasets["predict" if self.rounds.prompt_dataset else "train"]
        keys = np.stack([text_keys(source, name) for name in ("prompt", "chosen")], axis=1)
        positions = np.sort(np.unique(keys, axis=0, return_index=True)[1])
        if self.rounds.prompts and self.rounds.prompts < len(positions):
            drawn = np.random.default_rng([self.data.hparams.seed, self.stage.number]).permutation(positions)
            positions = np.sort(drawn[: self.rounds.prompts])
        return texts_of(source.select(positions))

    @staticmethod
    def _texts(pairs: "Dataset") -> Iterable[PreferencePair]:
        return (PreferencePair(**row) for row in pairs)


def texts_of(pairs: "Dataset") -> "Dataset":
    """The texts alone, in a table that has just these rows."""
    from datasets import Dataset

    return Dataset.from_dict(pairs.select_columns(list(PreferencePair._fields))[:])


def held_out(pair: PreferencePair, result: dict[str, Any]) -> HeldOut:
    """A held-out pair and its judged reply."""
    (reply,) = result["replies"]
    return HeldOut(pair.prompt, pair.chosen, reply["text"], reply["stopped"], reply["score"], reply["verdicts"])


def row_of(pair: PreferencePair) -> dict[str, Any]:
    """A pair as a row of a data set in the format `rendered`, without what is as by default."""
    always, default = ("prompt", "chosen", "rejected", "chat"), PreferencePair("", "", "")._asdict()
    return {name: value for name, value in pair._asdict().items() if name in always or value != default[name]}


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        append_lines(partial, lines)
