"""docs/first-steps.md, followed by the letter in an empty folder: install, demo, chat, and the reader's own rows.

PyPI and the hub are replaced by folders: a wheel of this checkout, and the demo's model under the name `gpt2`.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from conftest import REPO
from dpo_lightning.models.hub import PACKAGE

PAGE, CHINESE = (REPO / "docs" / name / "first-steps.md" for name in ("", "zh"))
BLOCK = re.compile(r"^((?:    [^\n]+\n)+)|^```text\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Commands and texts of a page, in order; one of the two is empty."""
    return [(commands.replace("    ", ""), text) for commands, text in BLOCK.findall(page.read_text())]


def as_script(page: Path) -> str:
    """What a reader does: writes the table, types the commands, and the lines after `>` into the last of them."""
    script = ""
    for commands, text in blocks(page):
        if commands:
            script += commands
        elif text.startswith("prompt,"):
            script += f"cat > rows.csv <<'END'\n{text}END\n"
        elif text.startswith("> "):
            typed = "".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("> "))
            script = script.rstrip("\n") + f" <<'END'\n{typed}END\n"
    return script


def test_the_chinese_page_has_the_same_commands():
    assert [commands for commands, _ in blocks(CHINESE)] == [commands for commands, _ in blocks(PAGE)]


@pytest.mark.slow
def test_the_page_followed_by_the_letter(tmp_path):
    pytest.importorskip("hatchling")
    wheels, folder = tmp_path / "wheels", tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", wheels], cwd=REPO, check=True)
    folder.mkdir()
    shutil.copytree(PACKAGE / "demo" / "model", folder / "gpt2")
    packages = "$(echo .venv/lib/python*/site-packages)"
    others = f"echo '{sysconfig.get_path('purelib')}' > {packages}/others.pth\n"  # what pip would fetch from PyPI
    install = "pip install dpo-lightning\n"
    script = as_script(PAGE)
    assert install in script and "<<'END'\n/schema" in script
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_FIND_LINKS": str(wheels)}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    done = subprocess.run(
        ["bash", "-ec", script.replace(install, install + others)],
        cwd=folder, env=env, text=True, timeout=1200,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert (folder / ".venv" / "bin" / "dpo-lightning").is_file()
    assert re.search(r"^valid SQL 0% → [78]\d% on 96 questions$", done.stdout, re.M)
    assert re.search(r"policy: +SELECT fortress FROM castles", done.stdout)
    assert "rows.csv: 8 rows read, 8 pairs" in done.stdout
    for run in ("version_0", "version_1"):
        assert {"report.html", "huggingface", "checkpoints"} <= {
            path.name for path in (folder / "lightning_logs" / run).iterdir()
        }
