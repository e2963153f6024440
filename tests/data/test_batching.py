import numpy as np
import pytest
import torch

from dpo_lightning.data.batching import EncodedPair, collate, collate_prompts, to_packed, to_pairs, to_separate
from dpo_lightning.data.loaders import LengthGroupedBatchSampler, token_batches
from dpo_lightning.dpo.logps import shared_prefix_mask
from dpo_lightning.errors import UserError

PAIRS = [EncodedPair([5, 6], [7, 8, 2], [9, 2]), EncodedPair([5], [7, 2], [2])]


def test_collate_gives_the_tensors_of_its_docstring():
    batch = collate(PAIRS, [30, 40])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [5, 7, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 2], [0, 1, -1, -1, -1]]
    assert batch.predict_index.tolist() == [1, 2, 3, 1, 4, 5, 6, 5]
    assert batch.targets.tolist() == [7, 8, 2, 9, 2, 7, 2, 2]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 2, 2, 3]
    assert batch.pair_ids.tolist() == [30, 40]
    assert batch.weight.tolist() == [1, 1] and batch.margin.tolist() == [0, 0]
    assert batch.lengths == ((2, 2, 1), (1, 1, 0))
    assert batch.num_pairs == 2 and batch.shared


def test_of_a_row_with_one_completion_nothing_else_is_predicted():
    batch = collate(
        [EncodedPair([5, 6], [7, 8, 2], []), EncodedPair([5], [], [9, 4, 2]), EncodedPair([3], [2], [])], [0, 1, 2]
    )
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 9, 4, 0], [3, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1], [0, 2, 2, -1], [0, -1, -1, -1]]
    assert batch.predict_index.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert batch.targets.tolist() == [7, 8, 2, 9, 4, 2, 2]
    assert batch.sequence.tolist() == [0, 0, 0, 3, 3, 3, 4]
    assert batch.lengths == ((2, 2, 0), (1, 0, 2), (1, 0, 0))
    assert to_packed(batch).input_ids.tolist() == [[5, 6, 7, 8, 5, 3, 9, 4]]
    assert to_pairs(batch)[1] == EncodedPair([5], [], [9, 4, 2])
    separate = to_separate(batch)
    assert separate.input_ids.flatten()[separate.predict_index].tolist() == [6, 7, 8, 5, 9, 4, 3]


def test_prompts_meet_the_completions_of_the_pair_before():
    pairs = [EncodedPair([5, 6], [7, 8, 2], []), EncodedPair([5], [4, 2], [9, 2]), EncodedPair([3], [], [2])]
    batch = collate(pairs, [0, 1, 2], mismatch_length=3).mismatched
    assert to_pairs(batch) == [
        EncodedPair([5, 6], [], [2]),
        EncodedPair([5], [7, 8], []),
        EncodedPair([3], [4, 2], [9, 2]),
    ]
    assert collate(pairs, [0, 1, 2]).mismatched is None
    assert to_pairs(collate(pairs[:1], [0], mismatch_length=9).mismatched) == pairs[:1]


def test_prompts_do_not_meet_completions_of_their_equals():
    pairs = [EncodedPair([prompt], [completion], []) for prompt, completion in ((5, 1), (5, 2), (6, 3), (6, 4))]
    met = [pair.chosen_ids for pair in to_pairs(collate(pairs, range(4), mismatch_length=9).mismatched)]
    assert met == [[3], [4], [1], [2]]


def test_separate_rows_are_ordinary_sequences():
    batch = to_separate(collate(PAIRS, [0, 1]))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [5, 6, 9, 0], [5, 7, 0, 0], [5, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1], [0, 0, 2, -1], [0, 1, -1, -1], [0, -1, -1, -1]]
    # Targets 7, 8, EOS follow 6, 7, 8; then 9, EOS follow 6, 9; 7, EOS follow 5, 7; and EOS follows 5.
    assert batch.input_ids.flatten()[batch.predict_index].tolist() == [6, 7, 8, 6, 9, 5, 7, 5]
    assert (batch.predict_index // 4 == batch.sequence).all()
    assert not batch.shared and to_separate(batch) is batch


def test_a_packed_row_holds_the_rejected_parts_last_and_no_padding():
    batch = to_packed(collate([*PAIRS, EncodedPair([3], [4, 2], [8, 9, 2])], [0, 1, 2]))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 5, 7, 3, 4, 9, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 1, 2]]
    assert batch.segment_ids.tolist() == [[0, 0, 1, 1, 0, 1, 0, 1, 2, 2, 2]]
    assert batch.predict_index.tolist() == [1, 2, 3, 1, 8, 4, 5, 4, 6, 7, 6, 9, 10]
    assert batch.targets.tolist() == [7, 8, 2, 9, 2, 7, 2, 2, 4, 2, 8, 9, 2]


def test_pairs_survive_the_batch():
    assert to_pairs(collate(PAIRS, [0, 1])) == PAIRS


def test_mask_lets_rejected_see_the_prompt_but_not_the_chosen():
    mask = shared_prefix_mask(collate(PAIRS, [0, 1]).segment_ids)[:, 0].int()
    assert mask[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert mask.any(-1).all(), "a row that attends to nothing makes the softmax NaN"


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[5, 6], [7]], [3, 4])
    assert batch.input_ids.tolist() == [[5, 6], [0, 7]]
    assert batch.attention_mask.tolist() == [[1, 1], [0, 1]]
    assert batch.pair_ids.tolist() == [3, 4]


def lengths(n):
    return np.random.default_rng(0).integers(10, 200, n)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 1000])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_pair_is_handed_out_once_and_ranks_have_equally_many_batches(n, world, shuffle):
    if n < world:
        pytest.skip("fewer pairs than ranks")
    ranks = [LengthGroupedBatchSampler(lengths(n), 4, shuffle, 7, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in ranks]
    assert sorted(i for rank in batches for batch in rank for i in batch) == list(range(n))
    assert {len(rank) for rank in batches} == {len(ranks[0])}
    assert all(batch for rank in batches for batch in rank)
    assert ranks[0].sizes == [sum(map(len, parts)) for parts in zip(*batches, strict=True)]


@pytest.mark.parametrize("n", [6, 16, 17, 400])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("tokens", [240, 1000, 10**6])
def test_batches_are_filled_up_to_a_number_of_tokens(n, world, shuffle, tokens):
    every = lengths(n)
    ranks = [LengthGroupedBatchSampler(every, 4, shuffle, 7, rank, world, batch_tokens=tokens) for rank in range(world)]
    for epoch in (0, 1):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        batches = [list(sampler) for sampler in ranks]
        assert sorted(i for rank in batches for batch in rank for i in batch) == list(range(n))
        assert {len(rank) for rank in batches} == {len(ranks[0])}, "known before the epoch, and the same on all ranks"
        assert all(batch and len(batch) * every[batch].max() <= tokens for rank in batches for batch in rank)
        assert ranks[0].sizes == [sum(map(len, parts)) for parts in zip(*batches, strict=True)]


def test_a_short_last_batch_gets_pairs_from_those_before():
    # Sorted and cut at 20 tokens a rank: 4 pairs, 2, 2, and one that is left over.
    assert token_batches(np.array([5, 6, 9, 10, 11, 12, 13, 14, 15]), 20, 2) == [3, 2, 2, 2]
    with pytest.raises(UserError, match="data.batch_tokens is 20, which leaves only 1 of 3 pairs for the last batch"):
        token_batches(np.array([11, 12, 13]), 20, 2)


def test_token_batches_are_full_and_of_similar_length():
    n = lengths(5000)
    batches = list(LengthGroupedBatchSampler(n, 16, True, batch_tokens=4096))
    tokens = np.array([n[batch].sum() for batch in batches])
    assert tokens.mean() > 0.95 * 4096
    assert n.sum() / sum(len(batch) * n[batch].max() for batch in batches) > 0.98


@pytest.mark.parametrize("tokens", [None, 1000])
def test_order_is_a_function_of_seed_and_epoch(tokens):
    def order(seed, epoch):
        sampler = LengthGroupedBatchSampler(lengths(100), 8, True, seed, batch_tokens=tokens)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_unshuffled_keeps_the_datas_order():
    assert list(LengthGroupedBatchSampler(lengths(10), 4, False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_grouping_by_length_saves_padding_without_sorting_the_run():
    n = lengths(5000)
    batches = list(LengthGroupedBatchSampler(n, 16, True))
    padded = sum(len(batch) * n[batch].max() for batch in batches)
    assert n.sum() / padded > 0.95
    means = np.array([n[batch].mean() for batch in batches])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_too_few_pairs_for_the_ranks_is_said():
    with pytest.raises(UserError, match="2 pairs cannot be split among 3 processes"):
        LengthGroupedBatchSampler([1, 2], 4, False, num_replicas=3)


def test_weights_and_margins_go_with_their_pairs():
    pairs = [PAIRS[0]._replace(weight=0.5), PAIRS[1]._replace(margin=1.5)]
    batch = collate(pairs, [0, 1])
    for form in (batch, to_separate(batch)):
        assert (form.weight.tolist(), form.margin.tolist()) == ([0.5, 1.0], [0.0, 1.5])
    assert to_pairs(batch) == pairs


def test_batches_are_int64_but_for_weights_and_margins():
    other = {
        name: tensor.dtype
        for name, tensor in collate(PAIRS, [0, 1])._asdict().items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.int64
    }
    assert other == {"weight": torch.float32, "margin": torch.float32}
