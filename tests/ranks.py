"""Runs a function in several processes that find each other as those of torchrun do, without its start-up time."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT = 240  # seconds after which a run counts as hanging


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(count: int, function: Callable[[int], Any]) -> list[Any]:
    """What `function(rank)` gives in each of `count` forked processes; their failures fail the test."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    port = free_port()

    def work(rank: int) -> None:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "TORCHELASTIC_RUN_ID": "test",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # A fork replaces torch's thread pool at its first use, and two threads that do so at once abort the process.
        torch.set_num_threads(torch.get_num_threads())
        try:
            queue.put((rank, function(rank)))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # pytest's own exit handlers are not this process's

    processes = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "a process hangs"
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
    return [result for _, result in sorted(queue.get() for _ in processes)]
