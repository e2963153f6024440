import pytest
import torch

from dpo_lightning.judging.reply_metrics import ReplyMetrics, repetition


@pytest.mark.parametrize(
    ("token_ids", "share"),
    [([], 0.0), ([1, 1, 1], 0.0), ([1, 2, 3, 4], 0.0), ([7] * 8, 0.8), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition(token_ids, share):
    assert repetition(token_ids) == pytest.approx(share)


def test_means_over_replies_merge_over_ranks():
    """Two ranks with 2 and 1 replies; their sum-states added up as torchmetrics does when it synchronises."""
    first, second = ReplyMetrics(), ReplyMetrics()
    first.update([[7] * 8, [1, 2, 3, 4]], [False, True])
    second.update([[]], [True])
    for name in first._defaults:
        setattr(first, name, getattr(first, name) + getattr(second, name))
    values = first.compute()
    assert values["reply/eos_rate"] == torch.tensor(2 / 3)
    assert values["reply/length"] == torch.tensor(4.0)
    assert values["reply/repetition"].item() == pytest.approx(0.8 / 3)


def test_tensors_of_ids_are_welcome_too():
    metric = ReplyMetrics()
    metric.update(torch.tensor([[5, 5, 5, 5, 5]]).tolist(), torch.tensor([True]).tolist())
    assert metric.compute()["reply/repetition"] == 0.5


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_reply_gives_nan():
    values = ReplyMetrics().compute()
    assert set(values) == {"reply/eos_rate", "reply/length", "reply/repetition"}
    assert all(value.isnan() for value in values.values())


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        ReplyMetrics().update([[1]], [True, False])
