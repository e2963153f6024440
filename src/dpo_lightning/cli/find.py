"""The command `find`: short fits over learning rate, beta and loss, ranked by what the model answers afterwards.

Every arm is a fit of the same configuration with a few settings changed, with the same seed, pairs and encoding, and in
a run folder of its own. All arms are trained for a few steps, then the best third and the configuration itself for
four times as many (successive halving with two rungs), because what is best after 50 steps may have gone too far after
200. The results are kept in a file, so that the command can be ended and started again.
"""

import gc
import json
import logging
import math
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich import get_console
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

from dpo_lightning.callbacks.context import find_callback, run_folder
from dpo_lightning.callbacks.replies import RepliesCallback
from dpo_lightning.callbacks.report.callback import duration
from dpo_lightning.cli.arms import (
    DISPLACEMENT,
    LOSS,
    WRITTEN_BY,
    Arm,
    Find,
    Result,
    arms,
    chance,
    number,
    overlay,
    ranked,
    reasons,
    score,
    score_names,
    table,
)
from dpo_lightning.cli.entry import program
from dpo_lightning.cli.inspect import length_of_run
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.data.encoding import EncodedPair
from dpo_lightning.data.generated import stored_weights
from dpo_lightning.dpo.preference_loss import PreferenceLoss
from dpo_lightning.errors import Stopped, UserError
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.digests import content_digest, key_digest
from dpo_lightning.storage.jsonl import append_lines, could_be_half, keep_lines, read_lines
from dpo_lightning.storage.locks import hold, in_use, let_go
from dpo_lightning.visible import one_line, visible

LONGER = 4  # times the steps, in the second round
BEST = 3  # one arm in so many gets there
FIRST_ROUND = 0.4  # share of `find.minutes` for the first round
# Sections that change no result.
NOT_TRAINING = ("find", "config", "memory", "predictions", "export", "checkpoint", "last")
QUIET = {
    **{"trainer.num_sanity_val_steps": 0, "trainer.enable_checkpointing": False, "trainer.enable_model_summary": False},
    **{"export.enabled": False, "replies.every_n_steps": 0, "replies.num_shown": 0},
}


class FindCLI(DPOCLI):
    """The settings of `find`, which are those of `fit` with a section of its own."""

    command = "find"


def run_find(args: Sequence[str]) -> None:
    """Runs `find` with its arguments, the command's name first."""
    try:
        search = Search(args)
        if not hold(search.folder / "find.lock"):
            raise in_use(f"'{search.folder}'", "choose another trainer.default_root_dir")
        try:
            search.run()
        except (KeyboardInterrupt, SystemExit, Stopped) as end:
            print(f"\nfinished arms are kept; to go on:\n    {program()} {shlex.join(args)}", file=sys.stderr)
            if isinstance(end, Stopped):  # whose own message is that of a run with a checkpoint
                raise SystemExit(128 + end.signal) from end
            raise
        finally:
            let_go(search.folder / "find.lock")
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


class Search:
    """The arms of a configuration, trained or taken from an earlier search.

    Args:
        args: the command line, the command's name first.

    Raises:
        UserError: the configuration cannot be searched.
    """

    def __init__(self, args: Sequence[str]) -> None:
        self.args = list(args[1:])
        self.cli = cli = configured(FindCLI, self.args, run=False)
        self.find: Find = cli.config_init.find
        self.folder = Path(cli.config.trainer.default_root_dir or ".") / "find"
        self.results: dict[str, Result] = {}  # by the digest of all that they depend on
        self.began, self.left_out = time.monotonic(), 0
        self._check()
        self._read_data()
        h = cli.model.hparams
        uses_beta = any("beta" in term.parameters for term in cli.model.loss.losses) or self.find.losses is not None
        self.arms = arms(self.find, h.learning_rate, h.beta, h.loss_type, uses_beta)
        self.losses = {str(arm): self._loss(arm) for arm in self.arms}

    def _check(self) -> None:
        config, path = self.cli.config, Path(self.find.output)
        if (world := self.cli.trainer.world_size) > 1:
            raise UserError(
                f"find trains its arms in one process, not in {world}: give --trainer.devices 1, and for as many pairs "
                f"per step --trainer.accumulate_grad_batches {world * self.cli.trainer.accumulate_grad_batches}"
            )
        if config.optimizer and "lr" in (config.optimizer.get("init_args") or {}):
            raise UserError("optimizer.init_args.lr is given, so model.learning_rate has no effect: leave it out")
        if path.exists() and not (path.is_file() and path.read_bytes().startswith(WRITTEN_BY.encode())):
            raise UserError(f"find.output '{path}' is there and was not written by find: choose another name")

    def _read_data(self) -> None:
        """Sets the data up as `fit` does, for the lengths and the digests of what the arms train on."""
        data, trainer = self.cli.datamodule, self.cli.trainer
        data.trainer = trainer
        trainer.strategy.connect(self.cli.model)  # for the number of positions, which limits the pairs
        data.setup("fit")
        if "val" not in data.datasets or trainer.limit_val_batches == 0:
            raise UserError(
                "find ranks by replies to held-out prompts, but there are none: give data.val_dataset, or a "
                "data.val_size above 0"
            )
        self.asked = min(self.find.prompts, len(data.datasets["val"]))
        self.batches, run_steps = length_of_run(data, trainer)
        self.steps = int(min(self.find.steps, run_steps))
        self.longer = int(min(LONGER * self.steps, run_steps))
        model = self.cli.config.model
        settings = {name: part for name, part in self.cli.config.as_dict().items() if name not in NOT_TRAINING}
        pairs = [content_digest(data.datasets[name], EncodedPair._fields) for name in ("train", "val")]
        self.key = [str(settings), *pairs, stored_weights(model.name_or_path, model.trust_remote_code)]

    def _loss(self, arm: Arm) -> PreferenceLoss:
        """The loss of an arm, checked before anything is trained."""
        h = self.cli.model.hparams | arm.model
        try:
            return PreferenceLoss(h["loss_type"], h["loss_weights"], h["beta"], h["label_smoothing"], h["loss_options"])
        except UserError as error:
            raise UserError(f"find.losses, {arm}: {error}") from error

    # ------------------------------------------------------------------ the rounds

    def run(self) -> None:
        """Trains what is not finished, prints the ranking and writes the overlay."""
        self._read_results()
        best = math.ceil(len(self.arms) / BEST)
        second = self.longer > self.steps and len(self.arms) > 1
        then = f", then the best {best} and the configuration's own for {self.longer}" if second else ""
        where = one_line(str(self.folder))
        print(f"find: {len(self.arms)} arms of {self.steps} steps{then}; everything is kept in {where}")
        limit = 60 * (self.find.minutes or math.inf)
        found = self._round(self.arms, self.steps, FIRST_ROUND * limit if second else limit)
        names = score_names(found, self.find.rank_by)
        if second:
            good = [result.arm for result in ranked(found, names) if not result.failed]
            finalists = [arm for place, arm in enumerate(good) if place < best or arm == self.arms[0]]
            found += self._round(finalists, self.longer, limit)
        self._show(ranked(found, names), names)

    def _round(self, chosen: Sequence[Arm], steps: int, limit: float) -> list[Result]:
        """The results of some arms, as many as `limit` seconds from the start allow; the first is always trained."""
        found: list[Result] = []
        for position, arm in enumerate(chosen, 1):
            overrides = self._overrides(arm, steps)
            key = key_digest([*self.key, overrides])
            known, optional = key in self.results, (arm, steps) != (self.arms[0], self.steps)
            if not known and optional and time.monotonic() - self.began + self._estimate(steps) > limit:
                self.left_out += 1
                continue
            if not known:
                self.results[key] = result = self._train(arm, steps, overrides)
                append_lines(self.folder / "arms.jsonl", [{"key": key} | result.line()])
            found.append(self.results[key])
            names = score_names(found, self.find.rank_by)
            took = "finished before" if known else f"in {duration(found[-1].seconds)}"
            if not known and (rest := len(chosen) - position):
                took += f", about {duration(rest * self._estimate(steps))} left in this round"
            print(visible(f"{position}/{len(chosen)} {arm}: {outcome(found[-1], names)}; {took}"), flush=True)
        return found

    def _estimate(self, steps: int) -> float:
        """Seconds that an arm takes, by the last one: the first also makes what the others take from disk."""
        last = list(self.results.values())[-1]
        return last.seconds * steps / last.steps

    def _overrides(self, arm: Arm, steps: int) -> dict[str, Any]:
        """The settings in which an arm's fit differs from the configuration."""
        data, trainer, given = self.cli.datamodule, self.cli.trainer, self.cli.config
        accumulated = trainer.accumulate_grad_batches
        epochs, rest = divmod(steps, math.ceil(self.batches / accumulated))
        overrides = {
            **QUIET,
            **{f"model.{name}": value for name, value in arm.model.items()},
            "replies.num_prompts": self.asked,
            "trainer.max_steps": steps,
            "trainer.val_check_interval": epochs * self.batches + rest * accumulated,  # one validation, at the end
            "trainer.check_val_every_n_epoch": None,
            "trainer.default_root_dir": str(self.folder),
        }
        if given.trainer.limit_val_batches is None:
            overrides["trainer.limit_val_batches"] = math.ceil(self.asked / data.eval_batch_size)
        needed = self.losses[str(arm)].needs_reference and not given.model.sync_ref_model
        if given.model.reference is None or not needed:
            overrides["model.reference"] = "cached" if needed and self._caching_pays() else None
        return overrides

    def _caching_pays(self) -> bool:
        """Whether all arms together train on more pairs than there are."""
        steps = len(self.arms) * self.steps + math.ceil(len(self.arms) / BEST) * (self.longer - self.steps)
        pairs = self.cli.datamodule.hparams.batch_size * self.cli.trainer.accumulate_grad_batches
        return steps * pairs > len(self.cli.datamodule.datasets["train"])

    def _train(self, arm: Arm, steps: int, overrides: dict[str, Any]) -> Result:
        """Fits an arm. One that a guard stops has failed; an error before the first step would stop every arm."""
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in overrides.items()}
        flags = [part for name, value in values.items() for part in (f"--{name}", value)]
        began, failed, metrics = time.monotonic(), None, {}
        with quiet():
            cli = configured(FindCLI, [*self.args, *flags], run=False)
            try:
                cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            except UserError as error:
                if not cli.trainer.global_step:
                    raise
                failed = str(error)
            folder, replies = run_folder(cli.trainer), find_callback(cli.trainer, RepliesCallback)
            if not failed and replies:
                measured = cli.trainer.callback_metrics
                metrics = {name: float(measured[name]) for name in (LOSS, DISPLACEMENT) if name in measured}
                metrics |= replies.showings[-1].shares
                wrong = next((name for name, value in metrics.items() if not math.isfinite(value)), None)
                failed = wrong and f"{wrong} is {metrics[wrong]}"
        result = Result(arm, steps, folder.name if folder else "", time.monotonic() - began, metrics, failed)
        del cli, replies
        gc.collect()  # trainer and module refer to each other: the next arm needs their memory
        return result._replace(metrics={}) if failed else result

    # ------------------------------------------------------------------ results

    def _read_results(self) -> None:
        """Reads the arms that an earlier search has finished.

        Raises:
            UserError: the file is something else.
        """
        path = self.folder / "arms.jsonl"
        try:
            lines = read_lines(path)
            self.results = {str(line["key"]): Result.read(line) for line in lines.objects}
            if not could_be_half(lines.rest, {"key": ""}):
                raise ValueError("it ends in something else")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{path}' does not hold the arms of a search: move it away") from error
        keep_lines(path, lines, len(lines.objects))

    def _show(self, ranking: Sequence[Result], names: Sequence[str]) -> None:
        """Prints the ranking and the overlay, and writes the overlay."""
        best = ranking[0]
        if best.failed:
            raise UserError(f"no arm came to its end; the first one: {best.failed}")
        get_console().print(table(ranking, names, self.arms[0], self.cli.model.hparams.loss_type))
        for line in (chance(best, names, self.asked), *reasons(ranking)):
            if line:
                print(visible(line))
        if self.left_out:
            print(f"{self.left_out} arms were not trained, because find.minutes were over")
        text = overlay(best, names, self.asked)
        with atomic_file(Path(self.find.output)) as partial:
            partial.write_text(text, encoding="utf-8")
        command = shlex.join(["fit", *without_find(self.args), "--config", self.find.output])
        print(visible(f"\n{text}\nwritten to {self.find.output}; to train with it:\n    {program()} {command}"))


def outcome(result: Result, names: Sequence[str]) -> str:
    """A result in a few words."""
    if result.failed:
        return "failed"
    displaced = result.metrics.get(DISPLACEMENT)
    beside = "" if displaced is None else f", displaced {number(displaced, [])}"
    return f"score {number(score(result, names), names)}{beside}"


def without_find(args: Sequence[str]) -> list[str]:
    """A command line without the settings of `find`."""
    after = ["", *args]
    return [
        arg
        for arg, before in zip(args, after, strict=False)
        if not arg.startswith("--find.") and not (before.startswith("--find.") and "=" not in before)
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Hides what a fit logs and warns of: it is in the report that each arm leaves."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels, show = [logger.level for logger in loggers], warnings.showwarning
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    warnings.showwarning = lambda *args, **kwargs: None
    disable_progress_bar()  # of transformers, for the loading of weights
    try:
        yield
    finally:
        warnings.showwarning = show
        enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
