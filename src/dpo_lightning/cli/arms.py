"""What `find` tries and how it ranks: settings -> arms -> results -> a table and an overlay. Nothing here trains."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml
from rich.table import Table
from rich.text import Text

from dpo_lightning.callbacks.guards import DISPLACED
from dpo_lightning.errors import UserError
from dpo_lightning.judging.quantities import percent, quantity, results
from dpo_lightning.parsing import AtLeast1, Positive, check_settings
from dpo_lightning.storage.states import check_state
from dpo_lightning.visible import visible

FACTORS = (1 / 3, 1, 3)  # of the configuration's own value, where no list is given
WRITTEN_BY = "# Written by `find`, which replaces this file."  # the first line of an overlay
MAX_COLUMNS = 3  # of verdicts in the table: more would not fit into 80 characters
DISPLACEMENT, LOSS = "val/rewards/displaced", "val/loss"


class Find:
    """The section `find`: what the command tries. Other commands ignore it.

    Args:
        learning_rates: for `model.learning_rate`; by default a third of it, itself, and three times it.
        betas: the same for `model.beta`.
        losses: for `model.loss_type`, each a name or a list of names, which get a weight of 1 each; by default the
            configuration's own.
        steps: optimizer steps of each arm; the best third then trains for four times as many, but no longer than the
            run that is configured.
        prompts: held-out pairs that are answered and scored at the end of each arm.
        rank_by: verdicts whose mean ranks the arms, such as `[sql/execution]`; by default all results of the judges.
        minutes: after this time no further arm is started; by default all arms are trained.
        output: the overlay to write, with the best settings.
    """

    def __init__(
        self,
        learning_rates: list[Positive] | None = None,
        betas: list[Positive] | None = None,
        losses: list[str | list[str]] | None = None,
        steps: AtLeast1 = 50,
        prompts: AtLeast1 = 96,
        rank_by: list[str] | None = None,
        minutes: Positive | None = None,
        output: str = "found.yaml",
    ) -> None:
        check_settings(Find.__init__, locals(), "find.")
        for name in ("learning_rates", "betas", "losses", "rank_by"):
            if locals()[name] == []:
                raise UserError(f"find.{name} is empty: give at least one value, or null for the default")
        self.learning_rates, self.betas, self.losses = learning_rates, betas, losses
        self.steps, self.prompts, self.rank_by = steps, prompts, rank_by
        self.minutes, self.output = minutes, output


class Arm(NamedTuple):
    """Settings to try."""

    learning_rate: float
    beta: float
    loss: str | list[str] | None = None  # None: as configured

    @property
    def model(self) -> dict[str, Any]:
        """The settings of `model` in which the arm differs from the configuration."""
        loss = {"loss_type": self.loss, "loss_weights": None, "loss_options": None} if self.loss else {}
        return {"learning_rate": self.learning_rate, "beta": self.beta, **loss}

    def __str__(self) -> str:
        loss = f"{loss_name(self.loss)}, " if self.loss else ""
        return f"{loss}learning rate {self.learning_rate:g}, beta {self.beta:g}"


class Result(NamedTuple):
    """What became of an arm."""

    arm: Arm
    steps: int
    run: str  # the name of its folder
    seconds: float
    metrics: dict[str, float]  # means of the verdicts by their names, and `val/...`
    failed: str | None = None  # why it ended before its last step

    @classmethod
    def read(cls, line: Mapping[str, Any]) -> "Result":
        """A result from its line of a file.

        Raises:
            ValueError: the line holds something else.
        """
        arm = {"learning_rate": int | float, "beta": int | float, "loss": str | list | None}
        check_state(
            line,
            {
                **{"arm": arm, "steps": int, "run": str, "seconds": int | float},
                **{"metrics": {str: int | float}, "failed": str | None},
            },
            "an arm",
        )
        fields: dict[str, Any] = {name: line[name] for name in cls._fields}
        return cls(**fields | {"arm": Arm(**line["arm"])})

    def line(self) -> dict[str, Any]:
        """The result for a file of JSON lines."""
        return self._asdict() | {"arm": self.arm._asdict()}


def loss_name(loss: str | Sequence[str]) -> str:
    """ "sigmoid", or "sigmoid+sft" for a mixture."""
    return loss if isinstance(loss, str) else "+".join(loss)


def arms(find: Find, learning_rate: float, beta: float, loss: str | list[str], uses_beta: bool = True) -> list[Arm]:
    """All combinations, each once. The first arm is the configuration itself, whose settings the arguments are."""
    rates = find.learning_rates or around(learning_rate)
    betas = find.betas or (around(beta) if uses_beta else [beta])
    wanted: Sequence[str | list[str] | None] = find.losses or [None]
    losses = [None if own in (None, loss, [loss]) else own for own in wanted]
    tried = [Arm(learning_rate, beta), *(Arm(rate, b, own) for own in losses for rate in rates for b in betas)]
    return [arm for position, arm in enumerate(tried) if arm not in tried[:position]]


def around(value: float) -> list[float]:
    """0.1 -> [0.033, 0.1, 0.3]."""
    return [value if factor == 1 else float(f"{factor * value:.2g}") for factor in FACTORS]


# ---------------------------------------------------------------------- the ranking


def score_names(found: Iterable[Result], rank_by: Sequence[str] | None) -> list[str]:
    """The verdicts that the score is the mean of.

    Raises:
        UserError: `find.rank_by` names a verdict that no reply has got.
    """
    names = results(dict.fromkeys(name for result in found for name in result.metrics if not name.startswith("val/")))
    if names and (unknown := next((name for name in rank_by or () if name not in names), None)):
        raise UserError(f"find.rank_by has '{unknown}', but the replies have the verdicts {', '.join(names)}")
    return list(rank_by or [name for name in names if not name.startswith("reply/")] or names[:1])


def score(result: Result, names: Sequence[str]) -> float:
    """The mean of an arm's verdicts, higher is better. One that no reply has got counts as 0."""
    signs = (-1 if quantity(name).better == "lower" else 1 for name in names)
    return sum(sign * result.metrics.get(name, 0.0) for sign, name in zip(signs, names, strict=True)) / len(names)


def ranked(found: Iterable[Result], names: Sequence[str]) -> list[Result]:
    """Best first.

    The score decides, but arms that failed come last, arms that trained for fewer steps come after those that trained
    for more (of each arm the longest counts), and arms that displace the chosen completion of more than half of the
    pairs after those that do not. Between equal scores it is displacement, then the order in which they were tried, so
    that the configuration is kept if nothing is better. Losses are not compared: they have another scale for each beta.
    """
    longest: dict[str, Result] = {}
    for result in sorted(found, key=lambda result: result.steps):
        longest[str(result.arm)] = result

    def order(result: Result) -> tuple:
        displaced = result.metrics.get(DISPLACEMENT, 0.0)
        by_metrics = (displaced > DISPLACED, -score(result, names), displaced) if not result.failed else ()
        return (bool(result.failed), -result.steps, *by_metrics)

    return sorted(longest.values(), key=order)


# ---------------------------------------------------------------------- what is printed and written


def table(ranking: Sequence[Result], names: Sequence[str], own: Arm, loss: str | Sequence[str]) -> Table:
    """The ranking, at most 80 columns wide.

    Args:
        names: of the verdicts in the score.
        own: the configuration's arm, which gets a star.
        loss: the configuration's.
    """
    with_loss = any(result.arm.loss for result in ranking)
    verdicts = names[: MAX_COLUMNS - with_loss] if len(names) > 1 else []
    shown = Table(title="find, best first (* as configured)", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("", *["loss"] * with_loss):
        shown.add_column(title, overflow="fold")
    words = [visible(quantity(name).word or name) for name in verdicts]
    for title in ("learning rate", "beta", "steps", "score", *words, "dis- placed", "val loss"):
        shown.add_column(Text(title.replace(" ", "\n")), justify="right", overflow="fold")
    shown.add_column("run", overflow="fold")
    for place, result in enumerate(ranking, 1):
        cells = [f"{place}{'*' * (result.arm == own)}", *[loss_name(result.arm.loss or loss)] * with_loss]
        cells += [f"{result.arm.learning_rate:g}", f"{result.arm.beta:g}", str(result.steps)]
        if result.failed:
            cells += ["failed", *[""] * (len(verdicts) + 2)]
        else:
            cells += [number(score(result, names), names), *(number(result.metrics.get(n), [n]) for n in verdicts)]
            cells += [number(result.metrics.get(DISPLACEMENT), []), f"{result.metrics[LOSS]:.3g}"]
        shown.add_row(*(Text(visible(cell)) for cell in (*cells, result.run)))
    return shown


def number(value: float | None, names: Sequence[str]) -> str:
    """A mean of verdicts for people: a percentage where all are shares (or none is named), otherwise a number."""
    if value is None:
        return "–"
    return percent(value) if all(quantity(name).share for name in names) else f"{value:.3g}"


def reasons(ranking: Iterable[Result]) -> list[str]:
    """A line for each arm that failed."""
    return [f"{result.run} ({result.arm}) failed: {result.failed}" for result in ranking if result.failed]


def chance(best: Result, names: Sequence[str], asked: int) -> str | None:
    """What difference of scores chance explains: the standard error of a difference of two shares of `asked` replies.

    The arms answer the same questions, so this is an upper bound. None where the score is no share.
    """
    if not all(quantity(name).share for name in names):
        return None
    share = min(max(abs(score(best, names)), 0.0), 1.0)
    points = 100 * math.sqrt(2 * share * (1 - share) / asked)
    return f"scores are of {asked} questions: differences of less than {points:.0f} points can be chance"


def overlay(best: Result, names: Sequence[str], asked: int) -> str:
    """The YAML overlay with the best arm's settings."""
    found = ", ".join(f"{quantity(name).label} {number(best.metrics.get(name, 0.0), [name])}" for name in names)
    about = f"# After {best.steps} steps: {found}, on {asked} held-out questions."
    return f"{WRITTEN_BY}\n{about}\n{yaml.safe_dump({'model': best.arm.model}, sort_keys=False)}"
