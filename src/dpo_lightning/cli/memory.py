"""`--memory 8GiB`: a run's settings -> the settings with which its peak stays below that, and what was changed.

What keeps the result comes first, and of that what costs least time. Each step includes those before it:

1. micro-batches, with as many accumulated for a step: the same pairs per step, and almost the same time unless they
   are very small;
2. the reference's log-probs cached before training: the reference is not in memory beside the optimizer's state;
3. gradient checkpointing: the activations are computed again, which takes about a third more time.

A light optimizer or LoRA trains something else, so neither is chosen here: if nothing fits, the error says what each
would take. The peaks are measured in a process of its own (`probe`), for micro-batches from small to large. Sizes that
are expected to take more than is allowed are not tried.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch.utilities import rank_zero_info

from dpo_lightning.cli.peaks import Config, Point, Probe, expected, measured
from dpo_lightning.errors import UserError

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MARGIN = 1.1  # between the peak of a probe and that of the run: 4 % more were seen, from batches in more shapes
ENOUGH_PAIRS = 4  # smaller micro-batches are slow: the next saving is tried before they are taken
TRIM = {"class_path": "dpo_lightning.callbacks.trimming.TrimMemory"}
# Keys of `fit` and `inspect` that `probe` does not have.
OF_A_COMMAND = ("config", "ckpt_path", "weights_only", "memory", "rows", "time")


class Saving(NamedTuple):
    """A setting that takes less memory."""

    words: str
    changes: Config
    fact: str  # of the model, that must be true


CACHED = Saving(
    "reference log-probs are computed before training and kept (model.reference: cached)",
    {"model": {"reference": "cached"}},
    "spare_copy",
)
RECOMPUTED = Saving(
    "activations are computed again in the backward pass, for about a third more time (gradient checkpointing)",
    {"model": {"gradient_checkpointing": True}},
    "can_recompute",
)
SAVINGS = (CACHED, RECOMPUTED)  # that keep the result


class Choice(NamedTuple):
    """Settings that fit."""

    changes: Config
    probe: Probe
    point: Point  # the size of micro-batches
    lines: list[str]  # for the user


class Trial(NamedTuple):
    """Savings that were tried together."""

    savings: list[Saving]
    config: Config
    probe: Probe


def bytes_of(text: str, name: str = "memory") -> int:
    """8GiB -> 8,589,934,592.

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", str(text), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"{name} is '{text}': it must be a size such as 8GiB or 900MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def size(number: float) -> str:
    """3334790113 -> "3.11 GiB", 9085440 -> "9 MiB"."""
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"


def merged(config: Config, changes: Config) -> Config:
    """A configuration with changes to its sections."""
    return config | {section: config.get(section, {}) | values for section, values in changes.items()}


def cut(config: Config, parts: int) -> Config:
    """The changes that cut each batch into so many micro-batches."""
    if parts == 1:
        return {}
    data, accumulated = config["data"], config["trainer"].get("accumulate_grad_batches") or 1
    name = "batch_tokens" if data.get("batch_tokens") else "batch_size"
    return {"data": {name: data[name] // parts}, "trainer": {"accumulate_grad_batches": accumulated * parts}}


def keep_within_memory(settings: Namespace, config: Config, resumed: Mapping[str, Any] | None) -> None:
    """Changes the settings of a `fit` so that it takes no more than its `memory`.

    Args:
        config: the same settings as plain YAML.
        resumed: settings of the data of the run that is resumed, which keeps its micro-batches.

    Raises:
        UserError: the size is none, or nothing fits.
    """
    limit, config = bytes_of(settings.memory), of_a_run(config)
    if resumed is None:
        rank_zero_info("memory: a few steps are tried first, in a process of their own")
        choice = chosen(config, limit)
        for line in choice.lines:
            rank_zero_info(line)
    changes = choice.changes if resumed is None else merged(trimming(config), as_resumed(config, resumed))
    for section, values in changes.items():
        for name, value in values.items():
            parsed = (
                [Namespace(one) if isinstance(one, dict) else one for one in value] if name == "callbacks" else value
            )
            settings[f"{section}.{name}"] = parsed
    settings.memory = None  # the run's own configuration has what was chosen


def trimming(config: Config) -> Config:
    """The change that makes the peak of a run that of its largest batch."""
    own = config["trainer"].get("callbacks") or []
    own = own if isinstance(own, list) else [own]
    return {} if TRIM in own else {"trainer": {"callbacks": [*own, TRIM]}}


def of_a_run(config: Config) -> Config:
    """The sections of a command's configuration that `probe` has as well."""
    return {name: value for name, value in config.items() if name not in OF_A_COMMAND}


def as_resumed(config: Config, data: Mapping[str, Any]) -> Config:
    """The changes that give a resumed run the micro-batches that it began with.

    Args:
        data: the settings of its data, from its checkpoint. Another effective batch is left for `fit` to refuse.
    """
    name = "batch_tokens" if config["data"].get("batch_tokens") else "batch_size"
    given, begun = config["data"][name], data.get(name)
    parts = given // begun if isinstance(begun, int) and 0 < begun <= given else 1
    return cut(config, parts)


# ---------------------------------------------------------------------- choosing


def chosen(config: Config, limit: int, savings: Sequence[Saving] = SAVINGS, timed: int = 0) -> Choice:
    """The settings of a run that fit, closest to those that are given.

    Args:
        config: the sections of a `fit`, as plain YAML.
        limit: bytes.
        savings: that may be taken, in this order.
        timed: batches to time.

    Raises:
        UserError: none fits; or the run cannot be started.
    """
    target, trials = limit / MARGIN, list[Trial]()
    trimmed = merged(config, trimming(config))
    for trial in _trials(trimmed, target, savings, timed):
        trials.append(trial)
        best = trial.probe.best(int(target))
        if best and best.pairs >= min(ENOUGH_PAIRS, trial.probe.facts["pairs"]):
            break
    fitting = [(trial, best) for trial in trials if (best := trial.probe.best(int(target)))]
    for trial, best in sorted(fitting, key=lambda found: -found[1].pairs):
        if proven := _proven(trial, best, target, timed):
            point, probe = proven
            changes = merged(trimming(config), cut(config, point.parts))
            for saving in trial.savings:
                changes = merged(changes, saving.changes)
            return Choice(changes, probe, point, list(_told(config, limit, trials[0].probe, trial.savings, proven)))
    raise UserError(refusal(limit, trials))


def _trials(config: Config, target: float, savings: Sequence[Saving], timed: int) -> Iterator[Trial]:
    """The run as it is, then with one saving after the other. What the user has set is left as it is."""
    trial = Trial([], config, measured(config, target, timed=timed))
    yield trial
    for saving in savings:
        given = config["model"].get(next(iter(saving.changes["model"])))
        if trial.probe.facts.get(saving.fact, True) and not given:
            changed = merged(trial.config, saving.changes)
            trial = Trial([*trial.savings, saving], changed, measured(changed, target, timed=timed))
            yield trial


def _proven(trial: Trial, best: Point, target: float, timed: int) -> tuple[Point, Probe] | None:
    """The largest size with which a run stays below the target to its end, and its probe."""
    probe, points = trial.probe, [point for point in reversed(trial.probe.points) if point.pairs <= best.pairs]
    if probe.peak is not None and probe.peak <= target and best == probe.points[-1]:
        return best, probe
    for point in points:
        probe = measured(trial.config, target, point.parts, timed)
        if probe.peak is not None and probe.peak <= target:
            return point, probe
    return None


def _told(
    config: Config, limit: int, first: Probe, savings: Sequence[Saving], proven: tuple[Point, Probe]
) -> Iterator[str]:
    """What was chosen and why, in a few lines."""
    point, probe = proven
    assert probe.peak is not None
    peak = f"about {size(probe.peak)} at the peak"
    if point.parts == 1 and not savings:
        yield f"memory: {peak} of the {size(limit)} that are allowed, so nothing is changed"
        return
    whole = first.facts.get("tokens", 0)
    most = size(expected(first.points, whole)) if first.points else f"more than {size(limit)}"
    yield f"memory: {first.facts.get('pairs', 'the')} pairs at once would take about {most} of {size(limit)}"
    if point.parts > 1:
        accumulated = (config["trainer"].get("accumulate_grad_batches") or 1) * point.parts
        yield (
            f"memory: instead, {point.pairs} pairs at once and {accumulated} such micro-batches per step: "
            "as many pairs per step as before"
        )
    for saving in savings:
        yield f"memory: {saving.words}"
    yield f"memory: {peak}"


def refusal(limit: int, trials: Sequence[Trial]) -> str:
    """Why no settings fit, and the closest that would."""
    probes = [trial.probe for trial in trials if trial.probe.points]
    least = min((probe.peak or probe.points[0].bytes for probe in probes), default=None)
    if least is None:
        return f"memory is {size(limit)}: a single pair takes more than that, and more than is free here"
    last = trials[-1]
    kept = f"with the smallest micro-batches{' and all else that keeps the result' if last.savings else ''}"
    needed = MARGIN * least
    others = list(_others(last.config, needed, last.probe.facts))
    fitting = [words for words, needed in others if needed <= limit] or [words for words, _ in others[-1:]]
    either = f"; or, to train something else, {' or '.join(fitting)}" if fitting else ""
    return f"memory is {size(limit)}, but {kept} the run takes {size(needed)}: allow that much{either}"


def _others(config: Config, needed: float, facts: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Settings that change what is trained, in words, with the memory that they would take."""
    trained = facts.get("trained", 0)
    if config["model"].get("lora") is None and trained:
        for words, per_weight in (
            ("--optimizer transformers.optimization.Adafactor", 8),  # without AdamW's two moments
            ("--config lora", 12),  # without gradients either
        ):
            if per_weight == 12 or not config.get("optimizer"):
                yield f"{words} (about {size(needed - per_weight * trained)})", needed - per_weight * trained
