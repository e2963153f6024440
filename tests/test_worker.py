"""A process with limits: whatever the code in it does, the caller gets an answer or an error, and can ask again."""

import os
import subprocess
import sys

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.worker import Worker, WorkerEnded, WorkerError
from processes import gone

HELPER = """
import os, signal, subprocess, sys, time

def start(*arguments):
    def answer(request):
        return eval(request, globals() | {"arguments": arguments})
    return answer

def deep(n):
    return deep(n + 1) + 1

def deaf():
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    time.sleep(60)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "helper_of_workers.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    worker = Worker("helper_of_workers:start", [1, "b"], what="a test", seconds=1, megabytes=64)
    yield worker
    worker.end()


def test_answers_are_json_and_prints_are_none_of_them(worker):
    assert worker.ask("print('{}') or os.write(1, b'{}') and arguments") == [1, "b"]
    first = worker.ask("os.getpid()")
    assert worker.ask("os.getpid()") == first != os.getpid()
    with pytest.raises(WorkerError, match="raised EOFError"):
        worker.ask("input()")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("sys.exit(3)", "raised SystemExit: 3"),
        ("deep(0)", "raised RecursionError"),
        ("signal.raise_signal(signal.SIGINT) or {1}", "raised TypeError: .*not JSON serializable"),
    ],
)
def test_an_exception_is_an_error_and_the_process_goes_on(worker, code, words):
    first = worker.ask("os.getpid()")
    with pytest.raises(WorkerError, match=words):
        worker.ask(code)
    assert worker.ask("os.getpid()") == first


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("time.sleep(60)", "took more than 1 seconds"),
        ("sum(iter(int, 1))", "took more than 1 seconds"),
        ("deaf()", "took more than 1 seconds"),
        ("subprocess.run(['sleep', '60'])", "took more than 1 seconds"),
        ("'x' * 10**9", "took more than 64 MiB of memory"),
        ("os._exit(5)", r"ended its process \(exit code 5\)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"ended its process \(signal 11\)"),
    ],
)
def test_a_process_that_ended_is_replaced(worker, code, words):
    with pytest.raises(WorkerEnded, match=words):
        worker.ask(code)
    assert worker.ask("1 + 1") == 2


def test_a_process_that_ended_between_two_requests_is_replaced(worker):
    first = worker.ask("os.getpid()")
    os.kill(first, 9)
    worker._process.wait()
    assert worker.ask("os.getpid()") != first


def test_what_cannot_be_started_is_one_line(monkeypatch):
    with pytest.raises(UserError, match="the process for a test cannot be started: UserError: .*'no_such:f'"):
        Worker("no_such:f", what="a test", seconds=1, megabytes=64).ask(1)


def test_the_process_ends_with_the_one_that_asked(tmp_path):
    """Also if that is killed while the code hangs."""
    (tmp_path / "helper_of_workers.py").write_text(HELPER)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from dpo_lightning.worker import Worker\n"
        "worker = Worker('helper_of_workers:start', what='a test', seconds=1, megabytes=64)\n"
        "print(worker.ask('os.getpid()'), flush=True); worker.ask('sum(iter(int, 1))')"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    asking = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    pid = int(asking.stdout.readline())
    asking.kill()
    asking.communicate()
    assert gone(pid)
