"""What the READMEs and configs say is true: every command parses, every path and target is there."""

import inspect
import re
import shlex
import sys
import tomllib

import pytest
import torch
import yaml
from packaging.requirements import Requirement

import dpo_lightning
from conftest import REPO
from dpo_lightning import DPOModule, PreferenceDataModule
from dpo_lightning.cli.compare import compare
from dpo_lightning.cli.download import DownloadCLI
from dpo_lightning.cli.inspect import InspectCLI
from dpo_lightning.cli.label import label
from dpo_lightning.cli.rounds import RoundsCLI
from dpo_lightning.cli.start import arguments
from dpo_lightning.cli.trainer import DPOCLI, configured
from dpo_lightning.dpo import losses
from dpo_lightning.dpo.logps import FAST, pair_logps
from dpo_lightning.dpo.module import NOT_SAVED
from dpo_lightning.dpo.reference import REFERENCES, import_reference
from dpo_lightning.models.policy import load_policy

CONFIGS = sorted((REPO / "configs").rglob("*.yaml"))
READMES = sorted(REPO.glob("README*.md"))
SITE = sorted(REPO.glob("docs/**/*.md"))
PAGES = [*READMES, REPO / "CONTRIBUTING.md", *SITE]
COMMAND = re.compile(r"^(?:    )?((?:python|make|tensorboard|dpo-lightning|git|pip) [^\n#]*)", re.M)


def commands(readme):
    """Commands in indented or fenced blocks, comments stripped."""
    return [match.strip() for match in COMMAND.findall(readme.read_text())]


def parse_only(cli_class, args, run):
    """Parses as the command would, runs nothing."""

    class ParseOnly(cli_class):
        def _parse_ckpt_path(self):
            pass

        def instantiate_classes(self):
            pass

        def _run_subcommand(self, subcommand):
            pass

    return configured(ParseOnly, args, run)


# Files that a page tells its reader to write.
READERS = ("json.yaml", "overlap.yaml", "found.yaml", "json_rounds.yaml", "overlap_rounds.yaml")


def check_cli(command, args):
    own = [i for i, arg in enumerate(args) if arg in READERS]
    args = [arg for i, arg in enumerate(args) if i not in own and i + 1 not in own]
    if command == "demo":
        parse_only(DPOCLI, ["fit", "--config", "configs/demo.yaml", *args], run=True)
    elif command == "configs":
        assert args in ([], ["--copy", "gpt2"])
    elif command == "start":
        arguments(["start", *args])
    elif command == "download":
        parse_only(DownloadCLI, args, run=False)
    elif command == "export":
        assert (
            {"--ckpt_path", "--output_dir"} <= set(args[::2]) <= {"--ckpt_path", "--output_dir", "--format", "--ollama"}
        )
    elif command in ("inspect", "rounds"):
        parse_only({"inspect": InspectCLI, "rounds": RoundsCLI}[command], args, run=False)
    elif command == "find":
        parse_only(DPOCLI, args, run=False)
    elif command == "report":
        assert args[:1] == ["--runs"] and len(args) >= 3
    elif command == "chat":
        assert set(args[::2]) <= {"--model", "--reference"}
    elif command in ("label", "compare"):
        function = {"label": label, "compare": compare}[command]
        assert set(args[::2]) <= {f"--{name}" for name in inspect.signature(function).parameters}
    elif command == "runs":
        assert args == ["lightning_logs"]
    else:
        parse_only(DPOCLI, [command, *args], run=True)


@pytest.mark.parametrize("page", [*READMES, *SITE], ids=lambda path: path.relative_to(REPO).as_posix())
def test_every_command_of_a_page_parses(page, monkeypatch):
    monkeypatch.chdir(REPO)
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.M))
    found = commands(page)
    assert len(found) >= 8 or page not in READMES
    for line in found:
        program, *args = shlex.split(line)
        if program == "make":
            assert set(args) <= targets, line
        elif program == "tensorboard":
            assert args == ["--logdir", "lightning_logs"], line
        elif program == "pip" or args[:2] == ["-m", "pip"]:
            extras = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            known = {"dpo-lightning", "jsonschema", *(f"dpo-lightning[{extra}]" for extra in extras)}
            assert args[-2] == "install" and args[-1] in known, line
        elif program == "dpo-lightning" or args[0] == "cli.py":
            command, *rest = args if program == "dpo-lightning" else args[1:]
            if "my_losses:" not in line:  # a module that the page's reader writes
                check_cli(command, rest)
        else:
            assert args[:2] == ["-m", "dpo_lightning.demo.build"], line


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_every_path_of_a_page_is_there(page):
    text = page.read_text()
    linked = re.findall(r"\]\((?!http)([^)#]+)\)", text) + re.findall(r'src="(?!http)([^"]+)"', text)
    named = re.findall(r"(?:configs|tests|src|benchmarks|docs)/[\w./-]*\w", text)
    for path in linked + named:
        assert (REPO / path).exists() or (page.parent / path).exists(), path


def test_every_file_of_contributing_is_there():
    there = [path.relative_to(REPO).as_posix() for path in (*REPO.glob("src/**/*.py"), *REPO.glob("tests/**/*.py"))]
    for name in re.findall(r"[\w/]+\.py\b", (REPO / "CONTRIBUTING.md").read_text()):
        assert any(path.endswith(f"/{name}") or path == name for path in there) or (REPO / name).exists(), name


EXTENDING = (REPO / "docs" / "extending.md").read_text()


def example(heading):
    """The code under a heading of docs/extending.md."""
    return re.search(rf"## {heading}\n.*?```python\n(.*?)```", EXTENDING, re.DOTALL)[1]


@pytest.fixture
def contributed(tmp_path, monkeypatch):
    """Writes code into a module of the user's own, `contributed`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "contributed", None)  # forgotten after the test
    del sys.modules["contributed"]
    return (tmp_path / "contributed.py").write_text


def test_every_test_that_the_page_names_is_there():
    named = set(re.findall(r"`(test_\w+)`", EXTENDING))
    tests = "".join(path.read_text() for path in REPO.glob("tests/**/test_*.py"))
    assert len(named) == 4 and named <= set(re.findall(r"^def (test_\w+)", tests, re.M))


def test_the_loss_of_the_page_is_the_packages():
    assert example("A new loss") in inspect.getsource(losses)


def test_a_new_format_is_one_function(contributed, tokenizer, write_rows):
    contributed(example("A new data format"))
    answers = [{"text": " Green.", "votes": 1}, {"text": " Blue.", "votes": 9}]
    rows = write_rows([{"question": "Sky?", "answers": answers}])
    data = PreferenceDataModule(tokenizer, rows, format="contributed:from_votes", val_size=0, test_size=0)
    data.setup("fit")
    assert data.pairs("train", [0])[0][:3] == ("Sky?", " Blue.", " Green.")


def test_a_new_reference_is_one_function(contributed, model_folder, tokenizer, rows_file, quiet_trainer, monkeypatch):
    contributed(example("A new kind of reference").replace("gpt2-large", str(model_folder)))
    monkeypatch.setitem(REFERENCES, "contributed:larger_model", None)  # taken out again after the test
    import_reference("contributed:larger_model")
    module = DPOModule(str(model_folder), reference="contributed:larger_model")
    data = PreferenceDataModule(tokenizer, rows_file, batch_size=4, val_size=4, test_size=0)
    quiet_trainer(max_steps=1).fit(module, data)
    batch = data.batch("train", range(4))
    expected = pair_logps(load_policy(str(model_folder)), batch).sums
    assert torch.equal(module.reference.logps(batch, FAST).sums, expected)


def test_pre_commit_runs_what_make_lint_runs():
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (REPO / "Makefile").read_text(), re.M).group(1)
    tools = set(re.findall(r"\$\(BIN\)/(\w+)", lint))
    hooks = yaml.safe_load((REPO / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert tools == {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks if "venv" in hook["entry"]}


def test_the_version_and_the_constraints_are_those_of_pyproject():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert dpo_lightning.__version__ == project["version"]
    required = {r.name: r for r in map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"])}
    tested = dict(line.split("==") for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
    for name, version in tested.items():
        assert name not in required or version in required[name].specifier, name
    assert {Requirement(line).name for line in project["dependencies"]} <= set(tested)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_parses_alone_or_over_gpt2(config, monkeypatch):
    monkeypatch.chdir(REPO)
    base = [] if "Overlay" not in config.read_text() else ["--config", "configs/gpt2.yaml"]
    if re.search("^rounds:", config.read_text(), re.M):
        parse_only(RoundsCLI, ["--config", str(config)], run=False)
    else:
        parse_only(DPOCLI, ["fit", *base, "--config", str(config)], run=True)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_key_has_a_comment_and_whole_configs_have_the_three_that_matter(config):
    for number, line in enumerate(config.read_text().splitlines(), 1):
        if re.match(r"\s*[\w-]+: *\S", line):
            assert re.search(r" # \S", line), f"{config.name}:{number}: {line}"
    if "Overlay" not in config.read_text():
        settings = yaml.safe_load(config.read_text())
        assert {"beta", "learning_rate"} <= set(settings["model"])
        assert "batch_size" in settings["data"]


def test_gpt2_config_names_every_setting_of_module_and_data():
    settings = yaml.safe_load((REPO / "configs" / "gpt2.yaml").read_text())
    for section, target in (("model", DPOModule), ("data", PreferenceDataModule)):
        named = set(settings[section]) | (set(NOT_SAVED) & set(settings) if section == "model" else set())
        assert named == set(inspect.signature(target.__init__).parameters) - {"self"}


def test_make_help_lists_every_target():
    makefile = (REPO / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split())
    assert phony == set(re.findall(r"^([a-z]+):.*##", makefile, re.M))
