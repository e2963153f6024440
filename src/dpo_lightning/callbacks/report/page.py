"""What a run was and did -> `report.html`: one file that needs no network, no scripts and nothing beside it.

Everything that came from outside (replies, prompts, names, warnings) is escaped, and a content security policy in the
page forbids loading or running anything, should some of it still slip through.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from dpo_lightning.callbacks.replies import Showing
from dpo_lightning.callbacks.report.charts import histogram, line_chart, number_text
from dpo_lightning.callbacks.report.history import Curve
from dpo_lightning.callbacks.report.outcome import change, percent, told
from dpo_lightning.data.pair import PreferencePair
from dpo_lightning.judging.judge import Verdict
from dpo_lightning.judging.quantities import marks, quantity, reply_charts
from dpo_lightning.visible import visible

SHOWN_REPLIES = 5  # of a prompt: before, after, and some between

STYLE = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f7f9; --line: #d9dce3; --dim: #5c6470; --text: #1b1f26;
  --good: #0a7d4f; --bad: #b3261e; --series-0: #2563eb; --series-1: #d97706; --series-2: #059669; --series-3: #9333ea; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --line: #353b45; --dim: #9aa3b0;
  --text: #e6e9ee; --good: #4ecb93; --bad: #ff8a80; --series-0: #6ea0ff; --series-1: #f0a94b; --series-2: #3fcf9b;
  --series-3: #c58bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 16px 64px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 36px 0 12px; }
p { margin: 4px 0; } .dim { color: var(--dim); }
.tiles, .charts { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); margin-top: 20px; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.tile, figure, .prompt { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.tile b { display: block; font-size: 1.35rem; font-weight: 650; white-space: nowrap; }
.tile .dim { display: block; font-size: .85rem; }
figure { margin: 0; } figcaption { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: .85rem; }
figcaption i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
svg { display: block; width: 100%; height: auto; margin-top: 6px; } svg text { fill: var(--dim); font-size: 14px; }
.grid { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; } th { font-weight: 500; color: var(--dim); width: 30%; }
th, td { text-align: left; vertical-align: top; padding: 5px 10px 5px 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.45 ui-monospace, monospace; }
.prompt { margin-bottom: 12px; } .prompt th { width: 7.5rem; } .prompt > pre { max-height: 9em; overflow: auto; }
.judged { font-size: .8rem; } .yes { color: var(--good); } .no { color: var(--bad); }
li { overflow-wrap: anywhere; } summary { cursor: pointer; color: var(--dim); }
"""


class Run(NamedTuple):
    """All that the report tells."""

    title: str
    outcome: str  # one sentence: finished, or stopped where and why
    facts: Mapping[str, str]  # what was trained on what
    settings: Mapping[str, object]
    curves: Mapping[str, Curve]
    margins: Mapping[str, Sequence[float]]  # name of a validation -> margin of every pair
    pairs: Sequence[PreferencePair]
    showings: Sequence[Showing]
    costs: Mapping[str, str]
    warnings: Sequence[str]
    val_pairs: int = 0  # pairs that each validation is about


def render(run: Run) -> str:
    """The page."""
    sections = {
        "What was trained": _table(run.facts),
        "Curves": _charts(run.curves),
        "Margins": _margins(run),
        "Replies": "".join(_prompt(run, number) for number in range(len(run.pairs))),
        "Costs": _table(run.costs),
        "Warnings": _list(run.warnings) or '<p class="dim">None.</p>',
        "Settings": f"<details><summary>all settings</summary>{_table(run.settings)}</details>",
    }
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections.items() if content)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(run.title)}</title><style>{STYLE}</style></head><body>"
        f'<h1>{_safe(run.title)}</h1><p class="dim">{_safe(run.outcome)}</p>{_tiles(run)}{body}</body></html>\n'
    )


def _safe(text: object) -> str:
    return escape(visible(str(text)))


def _table(rows: Mapping[str, object]) -> str:
    lines = (f"<tr><th>{_safe(name)}</th><td>{_safe(value)}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def _list(items: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_safe(item)}</li>' for item in items)}</ul>" if items else ""


def _tiles(run: Run) -> str:
    """What matters most: of replies before and after, of how many; of validations only what was measured, and when."""
    changes = [(quantity(name).label, change(run.showings, name)) for name in told(run.showings)]
    tiles = [_tile(found.values, words, found.where) for words, found in changes if found]
    for name, words, as_text in (
        ("val/rewards/accuracies", "pairs with a positive margin", percent),
        ("val/loss", "validation loss", number_text),
    ):
        # A point's step counts from 0.
        points = [(step + 1, value) for step, value in run.curves.get(name, []) if math.isfinite(value)]
        if points:
            ends = points[:1] + points[1:][-1:]
            when = " and ".join(str(step) for step, _ in ends)
            of = f"of {run.val_pairs} validation pairs, " if run.val_pairs else ""
            plural = "s" * (when != "1")
            tiles.append(
                _tile(" → ".join(as_text(value) for _, value in ends), words, f"{of}after {when} step{plural}")
            )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _tile(value: str, words: str, where: str) -> str:
    return f'<div class="tile"><b>{_safe(value)}</b>{_safe(words)}<span class="dim">{_safe(where)}</span></div>'


def _charts(curves: Mapping[str, Curve]) -> str:
    def chart(title: str, names: Mapping[str, str], limits: tuple[float, float] | None = None) -> str:
        return line_chart(title, {label: curves.get(name, []) for name, label in names.items()}, limits)

    def both(metric: str) -> dict[str, str]:
        return {f"train/{metric}": "training", f"val/{metric}": "validation"}

    share = (0.0, 1.0)
    judged = reply_charts(name.removeprefix("replies/") for name in curves if name.startswith("replies/"))
    replies = [
        chart(
            title,
            {f"replies/{name}": words[name] for name in words},
            share if all(quantity(name).share for name in words) else None,
        )
        for title, words in judged.items()
    ]
    rewards = {"train/rewards/chosen": "chosen", "train/rewards/rejected": "rejected"}
    charts = (
        *replies,
        chart("Loss", both("loss")),
        chart("Accuracy: pairs with a positive margin", both("rewards/accuracies"), share),
        chart("Margin, chosen − rejected reward", both("rewards/margins")),
        chart("Rewards in training", rewards),
        chart("KL from the reference", both("kl")),
        chart("Displaced: chosen less likely than before", both("rewards/displaced"), share),
        chart("Learning rate", {"train/learning_rate": "learning rate"}),
        chart("Gradient norm", {"train/grad_norm": "before clipping"}),
        chart("Pairs per second", {"train/pairs_per_second": "training"}),
    )
    return f'<div class="charts">{"".join(charts)}</div>'


def _margins(run: Run) -> str:
    if not run.margins:
        return ""
    return (
        '<p class="dim">Before training every margin is 0: the policy is the reference. '
        f'Then, for each validation pair:</p><div class="charts">{histogram("Margins of pairs", run.margins)}</div>'
    )


def _prompt(run: Run, number: int) -> str:
    """One prompt with its replies before, during and after, and the wanted one."""
    shown = [showing for showing in run.showings if number < len(showing.texts)]
    if not shown:
        return ""
    last = len(shown) - 1
    picked = sorted({round(i * last / (SHOWN_REPLIES - 1)) for i in range(SHOWN_REPLIES)})
    rows = [
        f"<tr><th>{'before' if shown[i].step == 0 else f'step {shown[i].step}'}</th>"
        f"<td><pre>{_safe(shown[i].texts[number].strip())}</pre>{_judged(shown[i].judged[number])}</td></tr>"
        for i in picked
    ]
    rows.append(f"<tr><th>wanted</th><td><pre>{_safe(run.pairs[number].chosen.strip())}</pre></td></tr>")
    return f'<div class="prompt"><pre>{_safe(run.pairs[number].prompt)}</pre><table>{"".join(rows)}</table></div>'


def _judged(verdicts: Mapping[str, Verdict]) -> str:
    marked = (
        f'<span class="{"yes" if is_so else "no"}">{"✓" if is_so else "✗"} {_safe(word)}</span>'
        for word, is_so in marks(verdicts)
    )
    return f'<div class="judged">{" ".join(marked)}</div>'
