"""The chart of the benchmark, from made-up figures."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from conftest import REPO

LINE = {
    "date": "2026-01-02", "machine": "Machine <7>", "versions": {"torch": "2.14", "TRL": "1.16"},
    "workload": "founding", "reference": "online", "batch_size": 16, "precision": "bf16",
    "ours_pairs_per_s": 8.0, "trl_pairs_per_s": 2.0, "ratio": 4.04, "ratios": [4.0, 4.04, 4.1],
    "ours_gib": 3.0, "trl_gib": 6.0, "loss_difference": 1e-7, "losses": 12,
}  # fmt: skip


@pytest.fixture
def chart(tmp_path):
    """Draws a file's text with benchmarks/chart.py; gives the finished process and the chart's path."""

    def call(text):
        file, output = tmp_path / "speed.jsonl", tmp_path / "speed.svg"
        file.write_text(text)
        command = [sys.executable, str(REPO / "benchmarks" / "chart.py"), str(file), "-o", str(output)]
        return subprocess.run(command, capture_output=True, text=True, check=False), output

    return call


def test_the_chart_has_the_last_figures_of_one_machine(chart):
    other = {"machine": "elsewhere", "ratio": 99.0}
    light = {"optimizer": "Adafactor", "ours_gib": 2.0}
    changes = [other, {"ratio": 98.0}, {"reference": "cached", "ours_pairs_per_s": 16.0, "ratio": 7.96}, light, {}]
    done, output = chart("".join(json.dumps(LINE | change) + "\n" for change in changes))
    assert done.returncode == 0, done.stderr
    assert "3 comparisons; 2 other lines" in done.stdout
    svg = ElementTree.parse(output).getroot()
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert "dpo-lightning and TRL on Machine <7>, 2026-01-02" in texts
    assert [text for text in texts if text.endswith("×")] == ["4.0×", "8.0×", "4.0×"]
    assert any(text.endswith("bf16, ours with Adafactor") for text in texts)
    assert "3.0 GiB (0.50 of TRL's)" in texts and not any("99" in text or "98" in text for text in texts)
    widths = {"ours": [], "trl": []}
    for bar in svg.iter("{http://www.w3.org/2000/svg}rect"):
        if bar.get("class") in widths and bar.get("height") == "20":
            widths[bar.get("class")].append(float(bar.get("width")))
    speed = {whose: bars[::2] for whose, bars in widths.items()}
    assert speed["ours"][1] == pytest.approx(2 * speed["ours"][0], rel=0.01)
    assert speed["ours"][0] == pytest.approx(4 * speed["trl"][0], rel=0.01)
    assert "prefers-color-scheme: dark" in output.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("{}\n", "line 1: this was not written by"), (json.dumps(LINE) + "\nx\n", "line 2: this was")],
)
def test_what_is_no_result_is_named(chart, text, words):
    done, output = chart(text)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1
    assert not output.exists()


def test_a_comparison_becomes_a_line_that_can_be_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    import chart
    import vs_trl

    here = {key: LINE[key] for key in ("date", "machine", "versions")}
    figures = {key: value for key, value in LINE.items() if key.endswith(("_s", "gib")) or key in ("ratio", "ratios")}
    figures |= {"losses": 12, "loss_difference": 1e-7}
    monkeypatch.setattr(vs_trl, "run_here", lambda *args: "model")
    monkeypatch.setattr(vs_trl, "machine", lambda: here)
    monkeypatch.setattr(vs_trl, "write_pairs", lambda *args: None)
    monkeypatch.setattr(vs_trl, "compare", lambda *args: figures)
    file = tmp_path / "speed.jsonl"
    monkeypatch.setattr(sys, "argv", ["vs_trl.py", "--rows", "rows.jsonl", "--json", str(file)])
    vs_trl.main()
    vs_trl.main()
    assert len(file.read_text().splitlines()) == 12
    lines, left_out = chart.read(file)
    assert [(line["workload"], line["reference"]) for line in lines[:3]] == [
        ("founding", "online"), ("founding", "cached"), ("shuffled", "online"),
    ]  # fmt: skip
    assert left_out == 6 and lines[0].items() >= figures.items()
