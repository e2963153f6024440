"""model + PairBatch -> PairLogps: one forward pass, with the LM head only where a completion token is predicted."""

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dpo_lightning.data.batching import PADDING, PROMPT, PairBatch, to_packed, to_separate
from dpo_lightning.dpo import packing
from dpo_lightning.dpo.head import head_log_sum_squares, head_logps, log_sum_squares, target_logps, tied_embedding
from dpo_lightning.dpo.products import fast_linear_layers, padding_for
from dpo_lightning.internals.transformers import attention_in_use
from dpo_lightning.models.routing import router_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs' completion tokens under one model, float32."""

    token_logps: Tensor  # [N] nats, in the order of the batch's targets
    sequence: Tensor  # [N] int64 in [0, 2B), ascending: see PairBatch
    num_pairs: int  # B
    router_loss: Tensor | None = None  # weighted load-balancing loss of a mixture of experts, a scalar
    log_sum_squares: Tensor | None = None  # [N] log of the sum of p^2 over the vocabulary, where asked for; no gradient

    def _per_side(self, values: Tensor) -> Tensor:
        return values.new_zeros(2 * self.num_pairs).index_add(0, self.sequence, values).view(-1, 2)

    @property
    def sums(self) -> Tensor:
        """Summed log-probabilities, [B, 2]: chosen, rejected."""
        return self._per_side(self.token_logps)

    @property
    def lengths(self) -> Tensor:
        """Number of completion tokens, EOS counted, [B, 2] float32."""
        return self._per_side(torch.ones_like(self.token_logps))

    @property
    def first_tokens(self) -> Tensor:
        """Log-probabilities of each completion's first token, [B, 2]; that of an empty completion is its EOS.

        Meaningless for a completion without tokens.
        """
        sequences = torch.arange(2 * self.num_pairs, device=self.sequence.device)
        first = torch.searchsorted(self.sequence, sequences).clamp_max(len(self.token_logps) - 1)
        return self.token_logps.index_select(0, first).view(-1, 2)


class Scoring(NamedTuple):
    """How to compute the log-probs of a model: the fast way, unless that is known or found to be wrong for it."""

    shared: bool = True  # a pair's prompt is read once
    gathered: bool = True  # the head runs only at predicting positions; else the model's own full logits are used
    window: int | None = None  # sliding window of the model or of some of its layers, in tokens
    reason: str = ""  # why it is not the fast way
    packed: bool = False  # all pairs of a batch in one row without padding; only with `shared`


FAST = Scoring()


def pair_logps(
    model: "PreTrainedModel", batch: PairBatch, scoring: Scoring = FAST, sum_squares: bool = False
) -> PairLogps:
    """Log-probabilities of all completion tokens, with gradients if the model has them.

    Args:
        model: a causal LM of transformers (with adapters injected or not), dropout off.
        batch: shared pairs on the model's device.
        scoring: what `shared_prompt.choose_scoring` returned for this model.
        sum_squares: also compute `log_sum_squares`, by a second pass through the head without gradients.
    """
    # Of a sharded model the weights are gathered first (`dpo_lightning.models.sharding.shard`).
    compute = getattr(model, "sharded_pair_logps", None)
    return (compute or functools.partial(compute_pair_logps, model))(batch, scoring, sum_squares)


def compute_pair_logps(model: "PreTrainedModel", batch: PairBatch, scoring: Scoring, sum_squares: bool) -> PairLogps:
    """`pair_logps` of a model whose weights are all there."""
    if scoring.packed:
        batch = to_packed(batch, padding_for(model, sum(map(sum, batch.lengths))))
        inputs = packing.inputs(model, batch)
    else:
        batch = batch if scoring.shared else to_separate(batch)
        inputs = _inputs(model, batch, scoring.window)
    if scoring.gathered:
        with tied_embedding(model) as tied, fast_linear_layers(model):
            output = model.base_model(**inputs, use_cache=False)
        hidden = output[0].flatten(0, 1).index_select(0, batch.predict_index)
        token_logps = head_logps(model, hidden, batch.targets, tied)
        squares = head_log_sum_squares(model, hidden) if sum_squares else None
    else:
        with fast_linear_layers(model):
            output = model(**inputs, use_cache=False)
        logits = output.logits.flatten(0, 1)[batch.predict_index]
        token_logps = target_logps(logits, batch.targets)
        squares = log_sum_squares(logits) if sum_squares else None
    balance = router_loss(model, output, batch.segment_ids != PADDING)
    return PairLogps(token_logps, batch.sequence, batch.num_pairs, balance, squares)


def _inputs(model: "PreTrainedModel", batch: PairBatch, window: int | None) -> dict[str, Any]:
    if not batch.shared:
        return {"input_ids": batch.input_ids, "attention_mask": (batch.segment_ids != PADDING).long()}
    mask = shared_prefix_mask(batch.segment_ids)
    everywhere = _for_attention(model, mask)
    attention_mask: Tensor | dict[str, Tensor] = everywhere
    if window:
        near = _for_attention(model, mask & within_window(batch.position_ids, window))
        # Models that mix layers with and without a window take a mask for each kind, the others the one of all layers.
        layered = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
        attention_mask = {"full_attention": everywhere, "sliding_attention": near} if layered else near
    return {"input_ids": batch.input_ids, "attention_mask": attention_mask, "position_ids": batch.position_ids}


def _for_attention(model: "PreTrainedModel", mask: Tensor) -> Tensor:
    if attention_in_use(model) != "eager":
        return mask
    # Eager attention adds its mask; a bool one would silently mean "+1 where attended".
    dtype = torch.get_autocast_dtype(mask.device.type) if torch.is_autocast_enabled(mask.device.type) else model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def shared_prefix_mask(segment_ids: Tensor) -> Tensor:
    """The attention mask, bool [B, 1, T, T] (True = attends): causal, to the prompt and to the token's own segment.

    Padding attends to itself, because the softmax of a row without any True would be NaN.
    """
    width = segment_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment_ids.device).tril_()
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    return (causal & ((key == PROMPT) | (key == query)))[:, None]


def within_window(position_ids: Tensor, window: int) -> Tensor:
    """The keys that are fewer than `window` positions before their query, bool [B, 1, T, T].

    Counted in position ids, which continue from the prompt in both completions, not in columns.
    """
    return (position_ids[:, :, None] - position_ids[:, None, :] < window)[:, None]
