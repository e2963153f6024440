"""The result of rounds, from their files: a table in the console, `rounds.json`, and `report.html` for all of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dpo_lightning.callbacks.report.templates import filled
from dpo_lightning.judging.judge import VerdictMeans
from dpo_lightning.judging.quantities import quantity, results
from dpo_lightning.judging.verified import HeldOut, is_right, mean_score, mistakes, turned
from dpo_lightning.storage.atomic import atomic_file
from dpo_lightning.storage.jsonl import read_lines

EXAMPLES = 6  # replies that turned right, and as many that turned wrong, of each round
REPLIES, ACCOUNT, SETTINGS = "held-out.jsonl", "pairs.json", "settings.json"


class Model(NamedTuple):
    """A model's held-out replies: those of the start, or of the model that a round made."""

    name: str
    held_out: list[HeldOut]
    account: dict[str, Any]  # of the round's samples and pairs (`verified`); empty for the start

    @property
    def share(self) -> str:
        """The share of right replies, or the mean of other scores."""
        mean = mean_score(self.held_out)
        if mean is None:
            return "not judged"
        plain = all(line.score in (0.0, 1.0, None) for line in self.held_out)
        return f"{mean:.1%}" if plain else f"{mean:.3g}"

    @property
    def means(self) -> dict[str, str]:
        """The means of the judge's verdicts, by their labels."""
        totals = VerdictMeans()
        totals.update(line.verdicts for line in self.held_out)
        means = {name: mean for name, mean in totals.compute().items() if mean == mean}  # without nan
        text = {name: f"{means[name]:.1%}" if quantity(name).share else f"{means[name]:.3g}" for name in means}
        return {quantity(name).label: text[name] for name in results(means)}

    @property
    def mistakes(self) -> dict[str, int]:
        """The kinds of wrong replies and their numbers."""
        return mistakes(self.held_out)

    @property
    def unjudged(self) -> int:
        """Replies that the judge cannot tell."""
        return sum(line.score is None for line in self.held_out)


def read_models(folder: Path) -> list[Model]:
    """The models of rounds so far, the start first."""
    models = []
    names = [("start", folder / "start")]
    names += [(f"round {n}", folder / f"round-{n}") for n in range(1, 1 + len(list(folder.glob("round-*"))))]
    for name, path in names:
        if (path / REPLIES).exists():
            lines = [HeldOut(**line) for line in read_lines(path / REPLIES).objects]
            account = path / ACCOUNT
            models.append(Model(name, lines, json.loads(account.read_text()) if account.exists() else {}))
    return models


def publish(folder: Path) -> None:
    """Prints the table, and writes `rounds.json` and `report.html`, of all models so far."""
    models = read_models(folder)
    summary = [
        {
            "model": model.name,
            "score": mean_score(model.held_out),
            "right": sum(is_right(line.score) for line in model.held_out),
            "judged": len(model.held_out) - model.unjudged,
            "unjudged": model.unjudged,
            "mistakes": model.mistakes,
            **model.account,
        }
        for model in models
    ]
    settings = folder / SETTINGS
    given = json.loads(settings.read_text(encoding="utf-8"))["settings"].get("rounds", {}) if settings.exists() else {}
    for name, text in (("rounds.json", json.dumps(summary, indent=2) + "\n"), ("report.html", page(models, given))):
        with atomic_file(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    show(models, folder)


def show(models: Sequence[Model], folder: Path) -> None:
    """Prints a line for each model."""
    from rich import get_console
    from rich.table import Table
    from rich.text import Text

    from dpo_lightning.visible import visible

    title = f"Rounds, replies to {len(models[0].held_out)} held-out prompts"
    table = Table(title=title, caption=Text(visible(f"{folder}/report.html")))
    for name in ("model", "right", "turned right", "turned wrong", "pairs trained", "kinds of mistakes"):
        table.add_column(name, justify="right" if name.startswith(("turned", "pairs", "right")) else "left")
    for number, model in enumerate(models):
        before = models[max(0, number - 1)].held_out
        changes = [str(len(part)) if number else "" for part in turned(before, model.held_out)]
        pairs = f"{model.account['pairs']} of {model.account['prompts']} prompts" if model.account else ""
        kinds = ", ".join(f"{kind} {count}" for kind, count in model.mistakes.items())
        table.add_row(*(Text(visible(cell)) for cell in (model.name, model.share, *changes, pairs, kinds)))
    get_console().print(table)


def page(models: Sequence[Model], settings: dict[str, Any]) -> str:
    """The page."""
    kinds = list(dict.fromkeys(kind for model in models for kind in model.mistakes))
    labels = list(dict.fromkeys(label for model in models for label in model.means))
    rows = {"right": [model.share for model in models]}
    rows |= {label: [model.means.get(label, "") for model in models] for label in labels}
    rows["replies that the judge cannot tell"] = [str(model.unjudged) for model in models]
    accounts = [model.account for model in models]
    training = {name: [str(account.get(name, "")) for account in accounts] for name in ("prompts", "pairs")}
    for part in ("samples", "left out"):
        names = dict.fromkeys(name for account in accounts for name in account.get(part, {}))
        training |= {f"{part}: {name}": [str(a.get(part, {}).get(name, "")) for a in accounts] for name in names}
    return str(
        filled(
            "rounds.html.jinja",
            title="Verified rounds",
            models=models,
            names=[model.name for model in models],
            rows=rows,
            training=training,
            kinds={kind: [str(model.mistakes.get(kind, 0)) for model in models] for kind in kinds},
            rounds=[_examples(old, new) for old, new in zip(models, models[1:], strict=False)],
            settings=settings,
        )
    )


def _examples(old: Model, new: Model) -> dict[str, Any]:
    """What turned right and what turned wrong from one model to the next."""
    right, wrong = turned(old.held_out, new.held_out)

    def listed(positions: Sequence[int]) -> list[dict[str, str]]:
        pairs = ((old.held_out[position], new.held_out[position]) for position in positions[:EXAMPLES])
        return [
            {"prompt": b.prompt, "before": b.reply.strip(), "after": a.reply.strip(), "wanted": b.wanted.strip()}
            for b, a in pairs
        ]

    parts = [("turned right", len(right), listed(right)), ("turned wrong", len(wrong), listed(wrong))]
    return {"name": new.name, "before": old.name, "parts": parts}
