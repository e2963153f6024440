"""Real runs of the command line, killed at random moments and gone on with, end in the very same weights.

Also: damaged checkpoints, a full disk, a folder that cannot be written. `make faults` (DPO_FAULTS=long) kills at
least a hundred times and prints a table of the kills by phase; DPO_KILLS sets how often each configuration is killed.
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from harness import Moment, Run, Zygote, differences, random_moment, same

from conftest import REPO, ROWS
from dpo_lightning.callbacks.checkpoint_files import newest_undamaged
from processes import alive

LONG = os.environ.get("DPO_FAULTS") == "long"
GPT2, LORA = str(REPO / "configs" / "gpt2.yaml"), str(REPO / "configs" / "lora.yaml")
EVERYTHING = [
    "--data.val_size", "6", "--data.test_size", "0", "--data.batch_size", "4", "--data.max_length", "128",
    "--data.num_workers", "2", "--model.max_new_tokens", "8", "--model.lr_scheduler_type", "cosine",
    "--model.warmup_steps", "3", "--model.learning_rate", "1e-3", "--trainer.accelerator", "cpu",
    "--trainer.precision", "32-true", "--trainer.accumulate_grad_batches", "2", "--trainer.log_every_n_steps", "2",
    "--trainer.val_check_interval", "0.3", "--trainer.callbacks", "TQDMProgressBar",
    "--trainer.max_epochs", "2" if LONG else "1",
    "--replies.every_n_steps", "3", "--replies.num_prompts", "2", "--replies.num_shown", "1",
    "--last.every_n_steps", "1", "--model.reference", "online",
]  # fmt: skip
TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "2"]
BY_STEPS = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "15"]
# Name -> more configurations, more arguments, ranks, kills in the short and in the long version.
CONFIGURATIONS = {
    "all weights": ([], [], 1, 2, 30),
    "limited by steps": ([], BY_STEPS, 1, 0, 20),
    "LoRA": ([LORA], [], 1, 0, 30),
    "two ranks": ([], TWO_RANKS, 2, 1, 25),
    "cached reference": ([], ["--model.reference", "cached"], 1, 0, 20),
}
TABLE: collections.Counter[tuple[str, str]] = collections.Counter()


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """The process that runs are forked from."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def make_run(tmp_path: Path, zygote: Zygote, model_folder: Path, write_rows: Callable) -> Callable[..., Run]:
    """Makes a run of a configuration in a folder of its own."""
    rows = write_rows(ROWS)

    def make(name: str, configs: Sequence[str] = (), args: Sequence[str] = (), ranks: int = 1) -> Run:
        argv = ["fit", *(arg for config in (GPT2, *configs) for arg in ("--config", config))]
        argv += ["--model.name_or_path", str(model_folder), "--data.train_dataset", rows, *EVERYTHING, *args]
        return Run(zygote, tmp_path / name, argv, ranks)

    return make


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Prints the kills by configuration and phase when all is done."""
    yield
    phases = sorted({phase for _, phase in TABLE})
    if phases:
        rows = [["kills", *phases, "all"]]
        for name in dict.fromkeys(name for name, _ in TABLE):
            counts = [TABLE[name, phase] for phase in phases]
            rows.append([name, *map(str, counts), str(sum(counts))])
        text = "\n".join("".join(cell.ljust(18 if i == 0 else 11) for i, cell in enumerate(row)) for row in rows)
        path = os.environ.get("DPO_FAULTS_TABLE")
        Path(path).write_text(text + "\n") if path else print(f"\n{text}")


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_killed_run_ends_as_if_it_had_never_been_killed(name: str, make_run: Callable[..., Run]) -> None:
    configs, args, ranks, few, many = CONFIGURATIONS[name]
    wanted = int(os.environ.get("DPO_KILLS", many if LONG else few))
    if not wanted:
        pytest.skip("in the long version only")
    twin = make_run("twin", configs, args, ranks)
    assert not any(twin.wait(twin.start())), twin.tail()
    kills, seed = 0, 0
    while kills < wanted:
        seed += 1
        rng = random.Random(f"{name} {seed}")
        run = make_run(f"run{seed}", configs, args, ranks)
        while len(run.kills) < min(8, wanted - kills):
            more = ["reference pass"] * 4 if "cached" in name else []
            codes = run.attempt(random_moment(rng, more) if LONG else SHORT[len(run.kills) % len(SHORT)])
            if set(codes) != {-9}:
                break
        if any(codes := run.attempt()):  # to the end; where it was reached already, this exports once more
            pytest.fail(f"{codes} after kills in {run.kills}:\n{run.tail()}")
        kills += len(run.kills)
        TABLE.update((name, phase) for phase in run.kills)
        assert differences(run.run_folder(), twin.run_folder()) == [], run.kills
        assert (run.run_folder() / "huggingface" / "config.json").exists() or "LoRA" in name
        shutil.rmtree(run.folder)


# In the phases that matter most; the moments within them are random all the same.
SHORT = (Moment("save", 3, 0.001), Moment("validation", 2, 0.0), Moment("training", 1, 0.3))


@pytest.mark.skipif(not LONG, reason="in the long version only: it starts python four times")
def test_ctrl_c_ends_both_ranks_of_lightnings_own_launcher_and_they_go_on(make_run: Callable[..., Run]) -> None:
    twin = make_run("twin", args=TWO_RANKS, ranks=2)
    assert twin.wait(twin.start()) == [0, 0], twin.tail()
    run = make_run("run", args=TWO_RANKS)
    command = [sys.executable, str(REPO / "cli.py"), *run.args]
    process = subprocess.Popen(
        command, cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    for line in process.stdout:
        if "Replies, step 6" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in printed, printed[-3000:]
    assert printed.count("which is saved; to resume:") == 1
    subprocess.run([*command, "--ckpt_path", "last"], cwd=run.folder, check=True, timeout=300, capture_output=True)
    assert differences(run.run_folder(), twin.run_folder()) == []


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def finished(zygote, model_folder, tmp_path_factory) -> Run:
    """A run of a few steps."""
    folder = tmp_path_factory.mktemp("finished")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    argv = ["fit", "--config", GPT2, "--model.name_or_path", str(model_folder), "--data.train_dataset", str(rows)]
    run = Run(zygote, folder / "run", [*argv, *EVERYTHING, *BY_STEPS, "--trainer.max_steps", "4"])
    assert run.wait(run.start()) == [0], run.tail()
    return run


def corrupt(path: Path, rng: random.Random) -> str:
    """Truncates, empties, deletes or changes a file, and says which."""
    kind = rng.choice(["truncated", "flipped", "flipped", "emptied", "deleted", "overwritten"])
    data = bytearray(path.read_bytes())
    if kind == "deleted":
        path.unlink()
        return kind
    path.unlink()  # it may be another checkpoint's file under a second name
    if kind == "truncated":
        data = data[: rng.randrange(1, len(data))]
    elif kind == "flipped":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "emptied":
        data = bytearray()
    else:
        start = rng.randrange(len(data))
        data[start : start + 512] = rng.randbytes(512)
    path.write_bytes(data)
    return kind


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_checkpoint_is_passed_over_or_does_no_harm(seed: int, finished: Run, tmp_path: Path, recwarn) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished.run_folder() / "checkpoints", folder)
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    kind = corrupt(folder / "last.ckpt", random.Random(seed))
    found = newest_undamaged([folder])
    said = [str(warning.message) for warning in recwarn if "skipping" in str(warning.message)]
    if found == folder / "last.ckpt":  # a date or a gap in the archive was hit
        assert kind in ("flipped", "overwritten") and not said
        assert same(torch.load(found, weights_only=True), whole)
    else:
        assert found is not None and found.name != "last.ckpt"
        assert kind == "deleted" or len(said) == 1 and "last.ckpt" in said[0]


@pytest.mark.parametrize("named", ["last", "file"])
def test_the_command_goes_on_from_another_one_or_names_it(named: str, finished: Run, tmp_path: Path) -> None:
    run = Run(finished.zygote, tmp_path / "run", finished.args)
    shutil.copytree(finished.folder / "lightning_logs", run.folder / "lightning_logs")
    last = Path("lightning_logs") / "version_0" / "checkpoints" / "last.ckpt"
    whole = torch.load(run.folder / last, weights_only=True)
    data = (run.folder / last).read_bytes()
    (run.folder / last).unlink()
    (run.folder / last).write_bytes(data[: len(data) // 2])
    codes = run.wait(run.start("--ckpt_path", "last" if named == "last" else str(last)))
    if named == "last":
        assert codes == [0] and "skipping" in run.tail(20000)
        newest = newest_undamaged([(run.folder / last).parent])
        assert same(torch.load(newest, weights_only=True)["state_dict"], whole["state_dict"])
    else:
        assert codes == [2]
        assert (
            "is not a readable checkpoint" in run.last_line()
            and "the newest undamaged one beside it" in run.last_line()
        )
        assert "Traceback" not in run.tail(20000)


# ---------------------------------------------------------------------- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB, where one may mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_old_checkpoint_stands(small_disk: Path, make_run: Callable[..., Run]) -> None:
    run = make_run("run", args=["--trainer.default_root_dir", str(small_disk), "--export.enabled", "false"])
    pids = run.start()
    checkpoints = small_disk / "lightning_logs" / "version_0" / "checkpoints"
    while not (checkpoints / "previous.ckpt").exists() and alive(pids[0]):
        time.sleep(0.01)
    filler = os.open(small_disk / "filler", os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(filler, bytes(4096)):
            pass
    os.close(filler)
    assert run.wait(pids) == [2], run.tail()
    assert "Traceback" not in run.tail(100000)
    errors = [line for line in run.tail(100000).replace("\r", "\n").splitlines() if "error: " in line]
    assert len(errors) == 1 and "No space left on device" in errors[0], errors
    assert newest_undamaged([checkpoints]) is not None
    assert not list(checkpoints.glob("*.partial"))
    (small_disk / "filler").unlink()
    assert run.attempt() == [0], run.tail()


def test_a_folder_that_cannot_be_written_is_one_line(small_disk: Path, make_run: Callable[..., Run]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = make_run("run", args=["--trainer.default_root_dir", str(small_disk)])
    assert run.wait(run.start()) == [2], run.tail()
    assert "Traceback" not in run.tail(100000) and "Read-only file system" in run.last_line()
