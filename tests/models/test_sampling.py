"""Sampling: the model's probabilities, and each row's own random numbers."""

import numpy as np
import torch

from dpo_lightning.models.sampling import Draws, draw


def test_draws_have_the_models_probabilities():
    logits = torch.tensor([[2.0, -torch.inf, 0.5, 1.0]])
    numbers = torch.arange(1, 10_001) / 10_000  # all there are, evenly: no chance in the test
    for temperature in (1.0, 0.5):
        tokens = draw(logits.expand(10_000, 4), numbers, temperature, 1.0)
        torch.testing.assert_close(
            torch.bincount(tokens[:, 0], minlength=4) / 10_000,
            torch.softmax(logits[0] / temperature, 0),
            atol=2e-4,
            rtol=0,
        )


def test_top_p_keeps_the_smallest_nucleus():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]]))
    numbers = torch.arange(1, 10_001) / 10_000
    shares = [
        (torch.bincount(draw(logits.expand(10_000, 4), numbers, 1.0, top_p)[:, 0], minlength=4) / 10_000).tolist()
        for top_p in (0.4, 0.6, 0.9)
    ]
    np.testing.assert_allclose(
        shares, [[0, 1, 0, 0], [0, 0.5 / 0.85, 0, 0.35 / 0.85], [0.1 / 0.95, 0.5 / 0.95, 0, 0.35 / 0.95]], atol=2e-4
    )


def test_the_ends_of_the_numbers_draw_possible_tokens():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, 4)
    for top_p in (1.0, 0.99):
        tokens = draw(logits, torch.tensor([2.0**-24, 1.0]), 1.0, top_p)
        assert set(tokens[:, 0].tolist()) == {1, 2}


def test_a_rows_draws_are_its_own():
    logits = torch.zeros(2, 500)
    together, swapped = Draws([7, 8], 1.0, 1.0, 3), Draws([8, 7], 1.0, 1.0, 3)
    for _ in range(2):
        assert torch.equal(together(None, logits), swapped(None, logits).flip(0))
    alone = together(None, logits)[1:]
    swapped.keep(torch.tensor([0]))
    assert torch.equal(swapped(None, logits[:1]), alone)
