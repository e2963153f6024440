"""`--help` and `help`: what someone sees who looks for a setting."""

import re
import subprocess
import sys

import pytest

import dpo_lightning
from conftest import REPO
from dpo_lightning.cli.entry import COMMANDS, main
from dpo_lightning.cli.trainer import HELP


def helped(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main([*args])
    assert not end.value.code
    return capsys.readouterr().out


def test_help_begins_with_our_settings_and_each_is_there_once(capsys):
    shown = helped(capsys, "help", "fit")
    assert shown == helped(capsys, "fit", "--help")
    sections = re.findall(r"^(\S.*):$", shown, re.M)
    assert sections == ["options", *HELP.values()]
    lines = shown.splitlines()
    assert lines[0].endswith(" fit --config NAME_OR_FILE [--config OVERLAY ...] [--KEY VALUE ...]")
    assert lines[2] == f"{COMMANDS['fit'].help}."
    settings = re.findall(r"^  (--[\w.]+)(?= |$)", shown, re.M)
    assert len(settings) == len(set(settings)) and {"--model.beta", "--optimizer"} <= set(settings)
    assert "Annotated" not in shown and "-->" not in shown
    assert "(type: float, above 0 and at most 1, default: 0.6)" in " ".join(shown.split())


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"fit"}))
def test_every_command_says_what_it_does(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = helped(capsys, "help", command)
    assert shown.startswith("usage: ") and f" {command}" in f" {shown.splitlines()[0]}"


def test_help_alone_lists_the_commands(capsys):
    assert main(["help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert main(["help", "fti"]) == 2
    assert "did you mean fit?" in capsys.readouterr().err


def test_the_package_is_a_program_too():
    command = [sys.executable, "-m", "dpo_lightning", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO / "src")
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m dpo_lightning COMMAND ")


def test_public_names_are_listed_and_there():
    assert dir(dpo_lightning) == sorted([*dpo_lightning.__all__, "__version__"])
    assert set(dpo_lightning.__all__) == set(dpo_lightning.WHERE)
    for name in dpo_lightning.__all__:
        assert getattr(dpo_lightning, name).__name__ == name
