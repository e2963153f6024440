"""list[EncodedPair] -> PairBatch, and the order in which pairs are batched.

A row of a PairBatch holds a pair with its prompt once:

    prompt[0..P)  chosen[0..C-1)  rejected[0..R-1)

The last token of a completion predicts nothing and is left out; the last prompt token predicts the first token of
both completions. An empty rejected completion (EOS alone) adds no token at all. A row with one completion is a pair
whose other completion predicts nothing.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.data.encoding import EncodedPair

PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, -1
REFERENCE_LOGPS = "reference_logps"  # a column that a data set may have, and the field of PairBatch that it becomes


class PairBatch(NamedTuple):
    """B pairs as tensors. N is the number of completion tokens of all pairs: the tokens that are predicted.

    In the shared layout a row is a pair; in the separate one (`to_separate`) rows 2b and 2b + 1 are the chosen and the
    rejected sequence of pair b; in the packed one (`to_packed`) a single row holds all pairs. Everything downstream
    reads only these fields and works with each layout.
    """

    input_ids: Tensor  # [rows, T] int64; padding is 0 and never attended to by a real token
    position_ids: Tensor  # [rows, T] int64; the rejected part restarts where the prompt ends
    segment_ids: Tensor  # [rows, T] int64; 0 prompt, 1 chosen, 2 rejected, -1 padding
    predict_index: Tensor  # [N] int64 into the flattened [rows * T]: the position whose hidden state predicts the token
    targets: Tensor  # [N] int64, the token ids that are predicted
    sequence: Tensor  # [N] int64 in [0, 2B): 2b for the chosen completion of pair b, 2b + 1 for its rejected one
    pair_ids: Tensor  # [B] int64, position of the pair in its data set
    weight: Tensor  # [B] float32, what the pair's loss is multiplied by
    margin: Tensor  # [B] float32, by how much the loss wants chosen above rejected, in units of beta times nats
    reference_logps: Tensor | None = None  # [N] float32 nats, the targets under the reference, if precomputed
    lengths: tuple[tuple[int, int, int], ...] = ()  # B times the columns of the prompt, chosen and rejected parts
    mismatched: "PairBatch | None" = None  # the prompts with each other's completions, see `mismatch`

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on a device; `lengths` stay on the host, where kernels are given their sizes.

        The host does not wait for copies from pinned memory to a GPU.
        """
        ahead = torch.device(device).type == "cuda"
        moved = [field.to(device, non_blocking=ahead) if isinstance(field, Tensor) else field for field in self]
        batch = PairBatch._make(moved)
        return batch if batch.mismatched is None else batch._replace(mismatched=batch.mismatched.to(device))

    @property
    def num_pairs(self) -> int:
        """B."""
        return self.pair_ids.numel()

    @property
    def shared(self) -> bool:
        """Whether a row is a pair."""
        return self.input_ids.shape[0] == self.num_pairs


def collate(
    pairs: Sequence[EncodedPair],
    pair_ids: Sequence[int],
    reference_logps: Sequence[Sequence[float]] | None = None,
    mismatch_length: int | None = None,
) -> PairBatch:
    """Builds a shared-prefix PairBatch, padded on the right to its longest row.

    `reference_logps` has a list for each pair: the log-probs of its chosen and then its rejected tokens. With
    `mismatch_length` the batch has `mismatched` pairs of at most that many tokens.

    Two pairs, prompt [5, 6] with chosen [7, 8, 2] and rejected [9, 2], and prompt [5] with [7, 2] and [2]:

        input_ids     [[5, 6, 7, 8, 9],     position_ids [[0, 1, 2, 3, 2],     segment_ids [[0, 0, 1, 1, 2],
                       [5, 7, 0, 0, 0]]                   [0, 1, 0, 0, 0]]                  [0, 1, -1, -1, -1]]
        predict_index [1, 2, 3, 1, 4, 5, 6, 5]
        targets       [7, 8, 2, 9, 2, 7, 2, 2]
        sequence      [0, 0, 0, 1, 1, 2, 2, 3]
        weight        [1, 1]
        margin        [0, 0]
    """
    ids = [(pair.prompt_ids, pair.chosen_ids, pair.rejected_ids) for pair in pairs]
    rows = [prompt + chosen[:-1] + rejected[:-1] for prompt, chosen, rejected in ids]
    width = max(map(len, rows))
    input_ids = np.zeros((len(rows), width), dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    segment_ids = np.full_like(input_ids, PADDING)
    predict_index: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    for b, (row, (prompt, chosen, rejected)) in enumerate(zip(rows, ids, strict=True)):
        p, c = len(prompt), len(prompt) + max(len(chosen) - 1, 0)
        input_ids[b, : len(row)] = row
        position_ids[b, :c] = np.arange(c)
        position_ids[b, c : len(row)] = np.arange(p, p + len(row) - c)
        segment_ids[b, :p], segment_ids[b, p:c], segment_ids[b, c : len(row)] = PROMPT, CHOSEN, REJECTED
        first = b * width
        predict_index += range(first + p - 1, first + p - 1 + len(chosen))
        predict_index += [first + p - 1, *range(first + c, first + len(row))][: len(rejected)]
        targets += chosen + rejected
        sequence += [2 * b] * len(chosen) + [2 * b + 1] * len(rejected)
    return PairBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(position_ids),
        torch.from_numpy(segment_ids),
        torch.tensor(predict_index),
        torch.tensor(targets),
        torch.tensor(sequence),
        torch.as_tensor(pair_ids),
        weight=torch.tensor([pair.weight for pair in pairs]),
        margin=torch.tensor([pair.margin for pair in pairs]),
        reference_logps=None if reference_logps is None else torch.tensor(list(chain.from_iterable(reference_logps))),
        lengths=tuple(
            (len(prompt), max(len(chosen) - 1, 0), max(len(rejected) - 1, 0)) for prompt, chosen, rejected in ids
        ),
        mismatched=None if mismatch_length is None else collate(mismatch(pairs, mismatch_length), pair_ids),
    )


def mismatch(pairs: Sequence[EncodedPair], max_length: int) -> list[EncodedPair]:
    """Each prompt with the completions of an earlier pair, those of the last pairs coming around to the first prompts.

    As in TRL that is the pair before, unless pairs have equal prompts: then it is as much earlier as lets the fewest
    prompts meet completions of their equals. A single pair keeps its own.

    Args:
        max_length: tokens of a prompt and completion together; longer completions are cut.
    """
    prompts = np.unique([hash(tuple(pair.prompt_ids)) for pair in pairs], return_inverse=True)[1]
    shift = min(range(1, len(pairs)), key=lambda by: (prompts == np.roll(prompts, by)).sum(), default=0)
    others = [pairs[i - shift] for i in range(len(pairs))]
    rooms = [max_length - len(pair.prompt_ids) for pair in pairs]
    return [
        EncodedPair(pair.prompt_ids, other.chosen_ids[:room], other.rejected_ids[:room])
        for pair, other, room in zip(pairs, others, rooms, strict=True)
    ]


def collate_columns(
    columns: Mapping[str, Sequence], pair_ids: Sequence[int], mismatch_length: int | None = None
) -> PairBatch:
    """`collate` for pairs as columns: one for each field of EncodedPair, and `reference_logps` if there is one."""
    pairs = zip(*(columns[field] for field in EncodedPair._fields), strict=True)
    return collate([EncodedPair(*fields) for fields in pairs], pair_ids, columns.get(REFERENCE_LOGPS), mismatch_length)


def to_separate(batch: PairBatch) -> PairBatch:
    """The same pairs as 2B ordinary sequences (prompt + one completion), for models that cannot share a prompt.

    Since position ids restart at the rejected part, the column of a token in its own sequence is its position id.
    """
    if not batch.shared:
        return batch
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    prompt, *completions = np.array(batch.lengths).T
    columns = int((prompt + np.maximum(*completions)).max())
    first = np.arange(batch.num_pairs) * width
    tokens, rows = [], []  # indices into the flattened batch of each pair's two sequences, and the row of each token
    for side, length in enumerate(completions):
        before = completions[0] if side else 0
        tokens += [consecutive(first, prompt), consecutive(first + prompt + before, length)]
        rows += [np.repeat(2 * np.arange(batch.num_pairs) + side, count) for count in (prompt, length)]
    token, row = (torch.from_numpy(np.concatenate(part)).to(device, non_blocking=True) for part in (tokens, rows))
    to = row * columns + batch.position_ids.flatten()[token]

    def laid_out(ids: Tensor, padding: int) -> Tensor:
        separate = ids.new_full((2 * batch.num_pairs * columns,), padding)
        return separate.scatter_(0, to, ids.flatten()[token]).view(-1, columns)

    position = batch.position_ids.flatten()[batch.predict_index]
    return batch._replace(
        input_ids=laid_out(batch.input_ids, 0),
        position_ids=laid_out(batch.position_ids, 0),
        segment_ids=laid_out(batch.segment_ids, PADDING),
        predict_index=batch.sequence * columns + position,
    )


def to_packed(batch: PairBatch, padding: int = 0) -> PairBatch:
    """The same pairs as one row [1, T] of real tokens: every pair's prompt and chosen part, then all rejected parts.

    In this order prompt and chosen part of each pair are one contiguous sequence. `padding` more tokens end the row.
    """
    assert batch.shared
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    prompt, chosen, rejected = np.array(batch.lengths).T
    first = np.arange(batch.num_pairs) * width
    columns = [consecutive(first, prompt + chosen), consecutive(first + prompt + chosen, rejected)]
    token = torch.from_numpy(np.concatenate(columns)).to(
        device, non_blocking=True
    )  # index into the flattened [rows * width]
    packed_index = token.new_empty(batch.input_ids.numel())
    packed_index[token] = torch.arange(len(token), device=device)

    def packed(field: Tensor, filler: int = 0) -> Tensor:
        return F.pad(field.flatten()[token], (0, padding), value=filler)[None]

    return batch._replace(
        input_ids=packed(batch.input_ids),
        position_ids=packed(batch.position_ids),
        segment_ids=packed(batch.segment_ids, PADDING),
        predict_index=packed_index[batch.predict_index],
    )


def consecutive(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """counts[b] consecutive integers from first[b] on, for every b: ([5, 0], [2, 3]) -> [5, 6, 0, 1, 2]."""
    return np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())


def to_pairs(batch: PairBatch) -> list[EncodedPair]:
    """The pairs that a batch in the shared layout was made from."""
    assert batch.shared
    pairs = []
    for b in range(batch.num_pairs):
        chosen, rejected = (batch.targets[batch.sequence == 2 * b + side].tolist() for side in (0, 1))
        prompt = batch.input_ids[b][batch.segment_ids[b] == PROMPT].tolist()
        pairs.append(EncodedPair(prompt, chosen, rejected, batch.weight[b].item(), batch.margin[b].item()))
    return pairs


class PromptBatch(NamedTuple):
    """B prompts padded on the left, ready for generation."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64; 0 at padding
    pair_ids: Tensor  # [B] int64, position of the prompt in its data set


def collate_prompts(prompts: Sequence[list[int]], pair_ids: Sequence[int]) -> PromptBatch:
    """Pads prompts on the left: [[5, 6], [7]] -> input_ids [[5, 6], [0, 7]], attention_mask [[1, 1], [0, 1]]."""
    width = max(map(len, prompts))
    input_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for b, ids in enumerate(prompts):
        input_ids[b, width - len(ids) :] = torch.tensor(ids)
        attention_mask[b, width - len(ids) :] = 1
    return PromptBatch(input_ids, attention_mask, torch.as_tensor(pair_ids))
