"""The command `rounds`: sample the current model, judge its replies, train on its mistakes, and again.

Each stage is a process of this command line (`sample` or `fit`) with a configuration that lies beside its results:

    FOLDER/settings.json                    what all of it depends on
    FOLDER/sft/                             the supervised training before the first round, if there is one
    FOLDER/start/held-out.jsonl             greedy replies of the model that the first round starts from
    FOLDER/round-1/sample.yaml, samples.jsonl, pairs.json, pairs.jsonl
    FOLDER/round-1/fit.yaml, lightning_logs/, model/, held-out.jsonl
    FOLDER/rounds.json, report.html         all rounds side by side

A stage whose file is there is finished, since files are written completely or not at all. Within a stage, `fit` goes on
from its last checkpoint and `sample` from the replies it has, so the command may be killed at any time.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dpo_lightning.callbacks.checkpoint_files import checkpoint_folders
from dpo_lightning.callbacks.report.rounds import ACCOUNT, REPLIES, SETTINGS, read_models
from dpo_lightning.callbacks.run_folders import LOCK
from dpo_lightning.cli.rounds_settings import Rounds
from dpo_lightning.cli.sample import ROWS, START, write_lines
from dpo_lightning.cli.stages import run_stage
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.generated import stored_weights
from dpo_lightning.data.sources import open_source
from dpo_lightning.data.splits import dataset_weights
from dpo_lightning.errors import UserError
from dpo_lightning.judging.sampling import COMPLETE
from dpo_lightning.judging.verified import Judged, Pair, is_right, make_pair, mean_score
from dpo_lightning.models.policy import base_model_name
from dpo_lightning.parsing import with_location
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.digests import file_digest
from dpo_lightning.storage.jsonl import read_lines
from dpo_lightning.storage.locks import exclusive

Config = dict[str, Any]
FREE = {
    "rounds": {"count", "folder"},
    "trainer": {"enable_progress_bar", "enable_model_summary"},
}  # may change between calls
SFT_MODEL = {"loss_type": "sft", "loss_weights": None, "loss_options": None, "label_smoothing": 0.0}
SFT_CHECKPOINTS = {  # one at the end of each epoch
    "monitor": None, "filename": "epoch{epoch}", "save_top_k": -1, "every_n_epochs": 1, "every_n_train_steps": None,
    "train_time_interval": None, "save_on_train_epoch_end": True,
}  # fmt: skip


class RoundsCLI(DPOCLI):
    """The configuration of a run with that of the rounds. Only parsed: the stages use it."""

    command = "rounds"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `rounds`."""
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(Rounds, "rounds")

    def before_instantiate_classes(self) -> None:
        """Nothing is filled in: each stage does that for itself."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""


def run_rounds(args: Sequence[str]) -> None:
    """Runs `rounds` with its arguments, the command's name first."""
    cli = configured(RoundsCLI, args[1:], run=False)
    try:
        rounds = Rounds(**cli.config.rounds.as_dict())
    except UserError as error:
        raise with_location(error, args) from error
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
    config.pop("config", None)
    Loop(rounds, config).run()


class Loop:
    """The rounds of a folder.

    Args:
        config: of the whole run, as plain YAML.
    """

    def __init__(self, rounds: Rounds, config: Config) -> None:
        self.rounds, self.config, self.folder = rounds, config, Path(rounds.folder)

    def run(self) -> None:
        """Makes whatever is missing.

        Raises:
            UserError: the folder was begun with other settings, or something in it has changed.
        """
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                "start `rounds` once, without torchrun: its stages start a process for each device themselves"
            )
        if self.config["trainer"].get("fast_dev_run"):
            raise UserError("trainer.fast_dev_run leaves no model, which rounds need: leave it out")
        if self.rounds.vllm and (self.config["model"]["lora"] or self.config["model"]["quantization"]):
            raise UserError(COMPLETE)
        self._check_folder()
        model, held_out = self.config["model"]["name_or_path"], self.folder / "start"
        models = self._sft() if self.rounds.sft_epochs else [model]
        for number in range(1, self.rounds.count + 1):
            samples = self.folder / f"round-{number}" / "samples.jsonl"
            self._sample(models, held_out, number, samples)
            model = self._model(held_out)
            if not self._make_pairs(samples):
                rank_zero_info(
                    f"round {number}: no prompt gives a pair to learn from (see {samples.with_name(ACCOUNT)}): nothing "
                    f"is left to learn with these settings; the model is {model}"
                )
                return
            models = [self._fit(model, number)]
            held_out = samples.parent
        self._sample(models, held_out, self.rounds.count, None)
        self._conclude(models[0])

    def _conclude(self, model: str) -> None:
        """Names the last model, and the one to use if that is another: a round can also make replies worse."""
        rank_zero_info(f"model: {model}; report: {self.folder / 'report.html'}")
        models = read_models(self.folder)[: self.rounds.count + 1]  # the folder may have more, of a higher count
        scores = [mean_score(each.held_out) for each in models]
        best = max(range(len(models)), key=lambda number: (scores[number] is not None, scores[number] or 0.0, number))
        if best < len(models) - 1:
            folder = self.folder / (f"round-{best}" if best else "start")
            rank_zero_warn(
                f"{models[-1].name} is worse than {models[best].name} ({models[-1].share} against "
                f"{models[best].share} on the held-out prompts): use {self._model(folder)}"
            )

    # ------------------------------------------------------------------ stages

    def _sft(self) -> list[str]:
        """The checkpoints of the supervised training's epochs."""
        folder, epochs = self.folder / "sft", self.rounds.sft_epochs
        checkpoints = self._epochs(folder)
        if len(checkpoints) < epochs:
            rank_zero_info(f"supervised training, {epochs} epochs:")
            rate = self.rounds.sft_learning_rate or self.config["model"]["learning_rate"]
            self._train(
                folder,
                model=SFT_MODEL | {"learning_rate": rate, "sync_ref_model": False},
                trainer={"max_epochs": epochs, "max_steps": -1},
                checkpoint=SFT_CHECKPOINTS,
                export={"enabled": False},
            )
            checkpoints = self._epochs(folder)
        if len(checkpoints) < epochs:
            raise UserError(f"the supervised training in '{folder}' ended before its {epochs} epochs: see its report")
        return checkpoints

    @staticmethod
    def _epochs(folder: Path) -> list[str]:
        for checkpoints in [folder / "checkpoints", *checkpoint_folders(folder)]:
            if found := sorted(checkpoints.glob("epoch*.ckpt"), key=lambda path: int(path.stem[5:])):
                return [str(path) for path in found]
        return []

    def _sample(self, models: list[str], held_out: Path, number: int, samples: Path | None) -> None:
        """Held-out replies of the best of some models, and its samples for a round."""
        if (held_out / START).exists() and (samples is None or samples.exists()):
            return
        folder = samples.parent if samples else held_out
        stage = {"models": models, "held_out": str(held_out), "samples": samples and str(samples), "number": number}
        file = self._write(folder / ("sample.yaml" if samples else "held-out.yaml"), self.config | {"stage": stage})
        rank_zero_info(f"\nround {number}: replies" if samples else "\nheld-out replies")
        run_stage("sample", file)
        self._record(held_out / REPLIES, held_out / ROWS, *([samples] if samples else []))

    def _model(self, held_out: Path) -> str:
        return json.loads((held_out / START).read_text(encoding="utf-8"))["model"]

    def _make_pairs(self, samples: Path) -> int:
        """Writes a round's pairs and what became of its prompts, and returns the number of pairs."""
        account, pairs = samples.with_name(ACCOUNT), samples.with_name("pairs.jsonl")
        if account.exists():
            return json.loads(account.read_text(encoding="utf-8"))["pairs"]
        rows, left_out, kinds = [], Counter[str](), Counter[str]()
        lines = read_lines(samples).objects
        for line in lines:
            replies = [Judged(r["text"], r["score"], r["logp"], r["stopped"]) for r in line.pop("replies")]
            kinds.update(
                "not judged" if r.score is None else "right" if is_right(r.score) else "wrong" for r in replies
            )
            pair = make_pair(Judged(line["chosen"], line.pop("score")), replies, self.rounds.rule)
            if isinstance(pair, Pair):
                rows.append(line | pair._asdict())
            else:
                left_out[pair] += 1
        write_lines(pairs, rows)
        counts = {"prompts": len(lines), "pairs": len(rows), "left out": left_out, "samples": kinds}
        self._write_json(account, counts)
        self._record(pairs)
        reasons = "".join(f", {count} with {reason}" for reason, count in left_out.items())
        rank_zero_info(f"{len(lines)} prompts: {len(rows)} pairs{reasons}; replies: {dict(kinds)}")
        return len(rows)

    def _fit(self, model: str, number: int) -> str:
        """Trains a model on a round's pairs; the folder of the result."""
        folder = self.folder / f"round-{number}"
        result = folder / "model"
        if not result.exists():
            rank_zero_info(f"\nround {number}: training")
            start = json.loads((self.folder / "start" / START).read_text(encoding="utf-8"))
            adapter = base_model_name(model) != model
            self._train(
                folder,
                model={"name_or_path": model} | ({"lora": None} if adapter else {}),
                data={
                    "train_dataset": str(folder / "pairs.jsonl"),
                    "val_dataset": str(self.folder / "start" / ROWS),
                    "test_dataset": None,
                    "test_size": 0,
                    "format": start["format"],
                    "rejected": "empty",  # where the pairs have none of their own, as the held-out ones
                    "generation": None,
                },
                export={"enabled": True, "folder": str(result)},
            )
        if not result.exists():
            raise UserError(f"the training in '{folder}' left no model: see its report")
        self._record(result)
        return str(result)

    def _train(self, folder: Path, **changes: Config) -> None:
        """Runs `fit`, from its last checkpoint if there is one, with changes to sections of the configuration."""
        config = {name: value for name, value in self.config.items() if name != "rounds"}
        changes["trainer"] = {"default_root_dir": str(folder)} | changes.get("trainer", {})
        if self.config["trainer"].get("logger") not in (None, True):  # only our own logger's folder is found again
            changes["checkpoint"] = {"dirpath": str(folder / "checkpoints")} | changes.get("checkpoint", {})
        for section, values in changes.items():
            config[section] = config[section] | values
        file = self._write(folder / "fit.yaml", config)
        for run in checkpoint_folders(folder)[:1]:
            with exclusive(run.parent / LOCK, f"the model of {folder}"):  # by a stage that outlives a killed command
                pass
        run_stage("fit", file, "--ckpt_path", "last")

    # ------------------------------------------------------------------ the folder

    def _check_folder(self) -> None:
        """Checks that the folder was begun with these settings, model and data, and that its results are unchanged."""
        settings = self.config
        model = settings["model"]
        inputs = {
            "the weights of model.name_or_path": stored_weights(model["name_or_path"], model["trust_remote_code"])
        }
        used = {stage: settings["data"][f"{stage}_dataset"] for stage in ("train", "val")}
        for stage, names in (used | {"predict": self.rounds.prompt_dataset}).items():
            for name in dataset_weights(names):
                inputs[f"the data set '{name}'"] = open_source(name, stage).fingerprint
        path = self.folder / SETTINGS
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.iterdir()):
                raise UserError(f"rounds.folder '{self.folder}' has other content: choose another folder, or empty it")
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_json(path, {"settings": settings, "inputs": inputs, "made": {}})
            return
        begun = json.loads(path.read_text(encoding="utf-8"))
        remedy = f"set it back, or give another --rounds.folder than '{self.folder}', which was begun with it"
        for name, value in inputs.items():
            if begun["inputs"].get(name, value) != value:
                raise UserError(f"{name} has changed since '{self.folder}' was begun: give another --rounds.folder")
        for name, old, new in _differences(begun["settings"], settings):
            raise UserError(f"{name} was {old!r} and is {new!r}: {remedy}")
        for name, digest in begun["made"].items():
            if (self.folder / name).exists() and _digest(self.folder / name) != digest:
                changed = self.folder / name
                raise UserError(
                    f"'{changed}' has changed since it was made: put it back, or give another --rounds.folder"
                )

    def _record(self, *paths: Path) -> None:
        """Notes the digests of results, so that a later change is noticed."""
        content = json.loads((self.folder / SETTINGS).read_text(encoding="utf-8"))
        content["made"] |= {str(path.relative_to(self.folder)): _digest(path) for path in paths}
        self._write_json(self.folder / SETTINGS, content)

    @staticmethod
    def _write(path: Path, config: Config) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            partial.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return str(path)

    @staticmethod
    def _write_json(path: Path, content: Any) -> None:
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    return stored_weights(str(path)) if path.is_dir() else file_digest(path)


def _differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Settings in both that differ, with both values, but for those that may change between calls."""
    found = []
    for section in old.keys() & new.keys():
        values = [part[section] if isinstance(part[section], dict) else {"": part[section]} for part in (old, new)]
        for name in sorted(values[0].keys() & values[1].keys() - FREE.get(section, set())):
            if values[0][name] != values[1][name]:
                found.append((f"{section}.{name}".rstrip("."), values[0][name], values[1][name]))
    return found
