"""The wheel, installed into an environment of its own and used from a folder that is not a checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from conftest import REPO, ROWS

pytestmark = pytest.mark.slow
SHORT = ("--trainer.accelerator", "cpu", "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Builds the wheel, installs it without a network, and gives a function that runs `dpo-lightning` in a folder."""
    pytest.importorskip("hatchling")
    root = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", root], cwd=REPO, check=True)
    venv.create(root / "env", symlinks=True)
    python = root / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, *root.glob("*.whl")], check=True)
    packages = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # what the wheel depends on
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(folder, *args):
        command = [root / "env" / "bin" / "dpo-lightning", *map(str, args)]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert str(REPO) not in done.stdout + done.stderr
        return done.stdout

    run.python, run.env = python, env
    return run


def test_the_installed_package_is_the_one_that_runs(installed, tmp_path):
    where = "import dpo_lightning; print(dpo_lightning.__file__, dpo_lightning.__version__)"
    found = subprocess.check_output([installed.python, "-c", where], cwd=tmp_path, env=installed.env, text=True).split()
    assert Path(found[0]).is_relative_to(installed.python.parents[1]) and found[1] == "0.1.0"


def test_every_configuration_is_in_the_wheel(installed, tmp_path):
    configs = sorted((REPO / "configs").rglob("*.yaml"))
    listed = installed(tmp_path, "configs").splitlines()
    assert [line.split()[0] for line in listed[: len(configs)]] == [
        path.relative_to(REPO / "configs").with_suffix("").as_posix() for path in configs
    ]
    assert installed(tmp_path, "configs", "gpt2") == (REPO / "configs" / "gpt2.yaml").read_text()


def test_it_trains_with_a_shipped_configuration(installed, tmp_path, model_folder):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    installed(
        tmp_path, "fit", "--config", "gpt2", "--model.name_or_path", model_folder, *SHORT, "--replies.num_prompts", 1,
        "--data.train_dataset", "rows.jsonl", "--data.max_length", 128, "--model.max_new_tokens", 4,
        "--model.warmup_steps", 0,
    )  # fmt: skip
    run = tmp_path / "lightning_logs" / "version_0"
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, run / "huggingface"))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_the_demo_says_where_its_report_is(installed, tmp_path):
    said = installed(tmp_path, "demo", *SHORT, "--replies.num_prompts", 2, "--model.max_new_tokens", 4)
    report = Path("lightning_logs") / "version_0" / "report.html"
    assert any(line.split()[:1] == [str(report)] for line in said.splitlines())
    assert (tmp_path / report).is_file()
    used = yaml.safe_load((tmp_path / report.with_name("config.yaml")).read_text())
    assert used["model"]["name_or_path"] == "dpo_lightning/demo/model"
