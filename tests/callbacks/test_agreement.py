"""All processes learn the largest number of the call before, at the same call."""

from types import SimpleNamespace

import torch

from dpo_lightning.callbacks.agreement import Agreement
from ranks import run_ranks

SAID = {0: [0, 0, 7, 0, 0, 0], 1: [0, 3, 0, 0, 0, 0]}


def agree(rank, world):
    trainer = SimpleNamespace(world_size=world, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    agreed = Agreement()
    return [agreed(trainer, number) for number in SAID[rank]]


def in_a_group(rank):
    torch.distributed.init_process_group("gloo")
    try:
        return agree(rank, 2)
    finally:
        torch.distributed.destroy_process_group()


def test_one_process_is_told_at_once():
    assert agree(1, 1) == SAID[1]


def test_two_processes_are_told_one_call_later():
    assert run_ranks(2, in_a_group) == [[0, 0, 3, 7, 0, 0]] * 2
