"""The command `demo` beyond its training: what is said and opened at the end."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_lightning.cli import demo


@pytest.mark.parametrize(
    ("args", "terminal", "desktop", "opens"),
    [
        ([], True, {"DISPLAY": ":0"}, True),
        ([], True, {"WAYLAND_DISPLAY": "wayland-0"}, True),
        ([], True, {}, False),
        ([], False, {"DISPLAY": ":0"}, False),
        (["--no-open"], True, {"DISPLAY": ":0"}, False),
        (["--open"], False, {}, True),
    ],
)
def test_the_report_is_opened_on_a_desktop_or_when_asked(tmp_path, monkeypatch, capsys, args, terminal, desktop, opens):
    opened, fits = [], []
    run = tmp_path / "version_0"
    run.mkdir()
    (run / "report.html").touch()
    trainer = SimpleNamespace(is_global_zero=True)
    monkeypatch.setattr(demo, "run_trainer", lambda args: fits.append(args) or SimpleNamespace(trainer=trainer))
    monkeypatch.setattr(demo, "run_folder", lambda trainer: run)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in desktop.items():
        monkeypatch.setenv(name, value)
    demo.run_demo(["demo", *args, "--trainer.max_steps", "1"])
    assert opened == [(run / "report.html").as_uri()] * opens
    assert fits[0][-2:] == ["--trainer.max_steps", "1"] and Path(fits[0][2]).name == "demo.yaml"
    assert str(run / "report.html") in capsys.readouterr().out
