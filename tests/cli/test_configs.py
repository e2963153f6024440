"""Shipped configurations: found by name, listed, and copied without replacing anything."""

from pathlib import Path

import pytest
import yaml

from attacked import error_line
from conftest import REPO
from dpo_lightning.cli.configs import with_shipped
from dpo_lightning.cli.entry import main
from dpo_lightning.errors import UserError
from dpo_lightning.models.hub import local_path
from dpo_lightning.parsing import composed

GPT2, CSV = (REPO / "configs" / name for name in ("gpt2.yaml", "loggers/csv.yaml"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_is_a_shipped_configuration_unless_a_file_has_it():
    args = ["fit", "--config", "gpt2", "--config=loggers/csv", "--model.name_or_path", "gpt2", "--config", "my.yaml"]
    expected = ["fit", "--config", str(GPT2), f"--config={CSV}", *args[4:]]
    assert with_shipped(args) == expected
    Path("loggers").mkdir()
    Path("gpt2").mkdir()  # a model's folder, which no configuration can be
    assert with_shipped(args) == expected
    Path("loggers/csv").write_text("model: {}\n")
    assert with_shipped(args) == [*expected[:3], args[3], *args[4:]]


@pytest.mark.parametrize("name", ["gpt2.yaml", "configs/gpt2.yaml", "gtp2"])
def test_a_missing_file_is_not_taken_for_a_shipped_configuration_but_it_is_suggested(name):
    assert with_shipped(["fit", "--config", name])[2] == name
    with pytest.raises(UserError, match=rf"^--config {name}: no such file; did you mean 'gpt2'\?$"):
        composed(name)


def test_configs_are_listed_with_what_they_are_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gpt2            The main run: GPT-2 learns to answer in SQL from b-mc2/sql-create-context." in lines
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("loggers/csv     Overlay: metrics into ") for line in lines)


def test_a_configuration_is_printed_as_it_is(capsys):
    assert main(["configs", "gpt2"]) == 0
    assert capsys.readouterr().out == GPT2.read_text()


def test_a_copy_replaces_nothing(here, capsys):
    assert main(["configs", "--copy", "loggers/csv"]) == 0
    assert (here / "csv.yaml").read_text() == CSV.read_text()
    (here / "csv.yaml").write_text("mine")
    assert main(["configs", "loggers/csv", "--copy"]) == 2
    assert "'csv.yaml' already exists" in error_line(capsys)
    assert (here / "csv.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "words"),
    [(["gtp2"], "'gtp2'; did you mean 'gpt2'?"), (["zzz"], "one of ddp, demo"), (["--copy"], "a name")],
)
def test_what_is_not_there_is_one_line(args, words, capsys):
    assert main(["configs", *args]) == 2
    assert words in error_line(capsys)


def test_the_demos_files_are_found_from_anywhere(here):
    name = "dpo_lightning/demo/data/test.jsonl"
    assert local_path(name).read_text() == (REPO / "src" / name).read_text()
    (here / name).parent.mkdir(parents=True)
    (here / name).write_text("mine")
    assert local_path(name).read_text() == "mine"
    for other in ("dpo_lightning/demo/nothing", "dpo_lightning/errors.py"):
        assert local_path(other) == Path(other)


@pytest.mark.parametrize("path", sorted((REPO / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_demo_that_a_shipped_configuration_names_is_found_from_any_folder(path):
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in ("model", "data", "rounds"):
        for name, value in (settings.get(section) or {}).items():
            if isinstance(value, str) and "dpo_lightning/" in value:
                assert local_path(value).exists(), f"{section}.{name}: {value}"
