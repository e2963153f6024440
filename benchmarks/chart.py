"""Draws what `vs_trl.py --json FILE` wrote: pairs per second and peak memory, ours and TRL's, as an SVG.

    python benchmarks/chart.py speed.jsonl -o docs/speed.svg

The chart is of one machine and its libraries, those of the file's last line, and of the last line of each comparison.
It has a background of its own, so that it can be read on light and dark pages.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jinja2
from vs_trl import as_words

NEEDED = {
    "date", "machine", "versions", "workload", "reference", "batch_size", "precision",
    "ours_pairs_per_s", "trl_pairs_per_s", "ratio", "ours_gib", "trl_gib",
}  # fmt: skip
MEANING = {"founding": "rejected empty", "shuffled": "another answer rejected", "long": "prompts of 400 tokens"}
TOP, ROW, BAR = 112, 66, 20  # pixels: above the first comparison, from one to the next, height of a bar
SPEED, MEMORY = (295, 215), (640, 130)  # where the bars of each panel begin, and the length of the longest
UNITS = {"pairs_per_s": "{:.3g}", "gib": "{:.1f} GiB"}

TEMPLATE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 {{ height }}" role="img" aria-labelledby="title about" \
font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13">
<title id="title">Speed and memory of dpo-lightning and TRL</title>
<desc id="about">{% for row in rows %}\
{{ row.name }}: {{ row.bars[0].label }} and {{ row.bars[2].label }} pairs per second, \
{{ row.bars[1].label }} and {{ row.bars[3].label }}. {% endfor %}</desc>
<style>
  .page { fill: #ffffff; stroke: #d0d7de } .text { fill: #1f2328 } .quiet { fill: #59636e }
  .ours { fill: #0969da } .trl { fill: #9aa4ae }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; stroke: #3d444d } .text { fill: #f0f6fc } .quiet { fill: #9198a1 }
    .ours { fill: #4493f8 } .trl { fill: #656c76 }
  }
</style>
<rect class="page" x="0.5" y="0.5" width="919" height="{{ height - 1 }}" rx="6"/>
<text class="text" x="20" y="32" font-size="15" font-weight="600">{{ title }}</text>
<text class="quiet" x="20" y="54">{{ subtitle }}</text>
<rect class="ours" x="20" y="75" width="12" height="12"/><text class="text" x="38" y="86">dpo-lightning</text>
<rect class="trl" x="150" y="75" width="12" height="12"/><text class="text" x="168" y="86">TRL</text>
<text class="text" x="{{ speed_x }}" y="86" font-weight="600">pairs per second</text>
<text class="text" x="{{ memory_x }}" y="86" font-weight="600">peak memory</text>
{% for row in rows %}
<text class="text" x="20" y="{{ row.y + 15 }}" font-weight="600">{{ row.name }}</text>
<text class="quiet" x="20" y="{{ row.y + 34 }}">{{ row.about }}</text>
<text class="text" x="{{ memory_x - 24 }}" y="{{ row.y + 27 }}" text-anchor="end" font-size="18" font-weight="700">\
{{ row.ratio }}</text>
{% for bar in row.bars %}
<rect class="{{ bar.whose }}" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}" height="{{ bar_height }}" rx="2"/>
<text class="text" x="{{ bar.x + bar.width + 6 }}" y="{{ bar.y + 15 }}">{{ bar.label }}</text>
{% endfor %}
{% endfor %}
</svg>
"""


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The comparisons to draw, in the order of their first lines, and the number of lines that are left out."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict) or not line.keys() >= NEEDED:
            sys.exit(f"{path}, line {number}: this was not written by vs_trl.py --json")
        lines.append(line)
    if not lines:
        sys.exit(f"{path} is empty: vs_trl.py --json {path} adds a line for each comparison")
    keys, here = ("workload", "reference", "batch_size", "precision"), ("machine", "versions")
    same = [line for line in lines if all(line[key] == lines[-1][key] for key in here)]
    kept = {(*(line[key] for key in keys), line.get("optimizer", "AdamW")): line for line in same}
    return list(kept.values()), len(lines) - len(kept)


def draw(lines: list[dict[str, Any]]) -> str:
    """The chart of some comparisons, as SVG."""
    most = {name: max(line[f"{whose}_{name}"] for line in lines for whose in ("ours", "trl")) for name in UNITS}
    dates = sorted({line["date"] for line in lines})
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE).render(
        title=f"dpo-lightning and TRL on {lines[-1]['machine']}, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
        subtitle=as_words(lines[-1]["versions"]) + "; taking turns, with the same weights, pairs and losses",
        height=TOP + ROW * len(lines) + 4,
        rows=[as_row(line, TOP + ROW * number, most) for number, line in enumerate(lines)],
        speed_x=SPEED[0],
        memory_x=MEMORY[0],
        bar_height=BAR,
    )


def as_row(line: dict[str, Any], y: int, most: dict[str, float]) -> dict[str, Any]:
    """What the template needs of a comparison, drawn from `y` downwards."""
    bars = []
    for down, whose in enumerate(("ours", "trl")):
        for (name, unit), (x, length) in zip(UNITS.items(), (SPEED, MEMORY), strict=True):
            value = line[f"{whose}_{name}"]
            label = unit.format(value)
            if (whose, name) == ("ours", "gib"):
                label += f" ({value / line['trl_gib']:.2f} of TRL's)"
            width = round(length * value / most[name], 1)
            bars.append({"whose": whose, "x": x, "y": y + (BAR + 3) * down, "width": width, "label": label})
    return {
        "y": y,
        "name": f"{line['workload']}, reference {line['reference']}",
        "about": f"{MEANING.get(line['workload'], '')}; batch {line['batch_size']}, {line['precision']}"
        + ("" if line.get("optimizer", "AdamW") == "AdamW" else f", ours with {line['optimizer']}"),
        "ratio": f"{line['ratio']:.1f}×",
        "bars": bars,
    }


def main() -> None:
    """`chart.py FILE -o CHART.svg`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what vs_trl.py --json wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG file to write")
    options = parser.parse_args()
    try:
        lines, left_out = read(options.file)
        options.output.write_text(draw(lines), encoding="utf-8")
    except OSError as error:
        sys.exit(f"{error.filename}: {error.strerror}")
    print(f"{options.output}: {len(lines)} comparisons; {left_out} other lines (elsewhere, or measured again) left out")


if __name__ == "__main__":
    main()
