"""model + PairBatch -> PairLogps: one forward, the LM head only where a completion token is predicted.

Whether a model may read a pair's prompt once (the shared layout of `batching`) is decided here too: from its
config, and by one comparison with ordinary forwards on real pairs (`choose_scoring`).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpo_lightning.data.batching import PADDING, PROMPT, EncodedPair, PairBatch, collate, to_pairs, to_separate
from dpo_lightning.models.routing import router_loss

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Model types whose attention takes a ready-made [B, 1, T, T] mask and explicit position ids; each was compared with
# separate forwards. Anything else reads the two sequences of a pair apart.
SHARED_PREFIX_MODEL_TYPES = frozenset(
    "gpt2 llama qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text mistral mixtral gpt_neox opt falcon phi phi3 "
    "gpt_bigcode starcoder2 stablelm olmo olmo2 olmo3 olmoe granite granitemoe cohere cohere2 smollm3 biogpt "
    "deepseek_v3 gptj codegen xglm gpt_oss".split()
)
HEAD_CHUNK = 1024  # predicted tokens whose [chunk, V] logits exist at a time
# By how much two ways of scoring may differ per token in the mean, relative to 1 + |log-prob|. Measured: 2e-7 in
# float32, 1e-5 to 3e-4 in TF32, 1e-3 in bfloat16; a wrong mask differs thirty times or more as much as TF32 does in the
# same model: 5e-4 in an untrained one, up to 0.1 in others.
NOISE, NOISE_IN_16_BITS = 4e-4, 1e-2
LOGITS_IN_CACHE, LOGITS_AT_ONCE = 2**20, 2**26  # elements that a CPU and that a GPU works on in one go


class PairLogps(NamedTuple):
    """Log-probabilities of B pairs' completion tokens under one model, float32."""

    token_logps: Tensor  # [N] nats, in the order of the batch's targets
    sequence: Tensor  # [N] int64 in [0, 2B): see PairBatch
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


class Scoring(NamedTuple):
    """How log-probs are computed for a model: the fast way unless it is known or found to be wrong."""

    shared: bool = True  # a pair's prompt is read once
    gathered: bool = True  # the head runs only at predicting positions; else the model's own full logits are used
    window: int | None = None  # sliding window of the model or of some of its layers, in tokens
    reason: str = ""  # why it is not the fast way


FAST = Scoring()


def pair_logps(
    model: "PreTrainedModel", batch: PairBatch, scoring: Scoring = FAST, sum_squares: bool = False
) -> PairLogps:
    """Log-probabilities of every completion token, with gradients where the model has them.

    Args:
        model: a causal LM of transformers (with adapters injected or not), dropout off.
        batch: shared pairs on the model's device.
        scoring: what `choose_scoring` found for this model.
        sum_squares: also give `log_sum_squares`, at the price of a second pass through the head without gradients.
    """
    # Of a sharded model the weights are gathered first (`dpo_lightning.models.sharding.shard`).
    compute = getattr(model, "sharded_pair_logps", None)
    return (compute or functools.partial(compute_pair_logps, model))(batch, scoring, sum_squares)


def compute_pair_logps(model: "PreTrainedModel", batch: PairBatch, scoring: Scoring, sum_squares: bool) -> PairLogps:
    """`pair_logps` of a model whose weights are all there."""
    if not scoring.shared:
        batch = to_separate(batch)
    inputs = _inputs(model, batch, scoring.window)
    if scoring.gathered:
        output = model.base_model(**inputs, use_cache=False)
        hidden = output[0].flatten(0, 1)[batch.predict_index]
        token_logps = head_logps(model, hidden, batch.targets)
        squares = head_log_sum_squares(model, hidden) if sum_squares else None
    else:
        output = model(**inputs, use_cache=False)
        logits = output.logits.flatten(0, 1)[batch.predict_index]
        token_logps = _target_logps(logits, batch.targets)
        squares = _log_sum_squares(logits) if sum_squares else None
    balance = router_loss(model, output, batch.segment_ids != PADDING)
    return PairLogps(token_logps, batch.sequence, batch.num_pairs, balance, squares)


def _inputs(model: "PreTrainedModel", batch: PairBatch, window: int | None) -> dict[str, Any]:
    if not batch.shared:
        return {"input_ids": batch.input_ids, "attention_mask": (batch.segment_ids != PADDING).long()}
    mask = shared_prefix_mask(batch.segment_ids)
    attention_mask = _for_attention(model, mask)
    if window:
        near = _for_attention(model, mask & within_window(batch.position_ids, window))
        # Models that mix layers with and without a window take a mask for each kind, the others the one of all layers.
        layered = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
        attention_mask = {"full_attention": attention_mask, "sliding_attention": near} if layered else near
    return {"input_ids": batch.input_ids, "attention_mask": attention_mask, "position_ids": batch.position_ids}


def _for_attention(model: "PreTrainedModel", mask: Tensor) -> Tensor:
    if model.config._attn_implementation != "eager":
        return mask
    # Eager attention adds its mask; a bool one would silently mean "+1 where attended".
    dtype = torch.get_autocast_dtype(mask.device.type) if torch.is_autocast_enabled(mask.device.type) else model.dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def shared_prefix_mask(segment_ids: Tensor) -> Tensor:
    """Who attends to whom, bool [B, 1, T, T] (True = attends): causal, to the prompt and to one's own segment.

    Padding attends to itself too, since a row of the mask without a True would make the softmax NaN.
    """
    width = segment_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=segment_ids.device).tril_()
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    return (causal & ((key == PROMPT) | (key == query)))[:, None]


def within_window(position_ids: Tensor, window: int) -> Tensor:
    """Which keys are fewer than `window` positions before their query, bool [B, 1, T, T].

    Counted on position ids, which run on from the prompt in both completions, not on columns.
    """
    return (position_ids[:, :, None] - position_ids[:, None, :] < window)[:, None]


def head_logps(model: "PreTrainedModel", hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities [N] float32 of `targets` [N] from hidden states [N, H], the head applied in chunks.

    With several chunks each one's logits are computed again in the backward pass, so that only one chunk's
    [HEAD_CHUNK, V] logits are ever held.
    """
    if len(targets) <= HEAD_CHUNK:
        return _target_logps(_logits(model, hidden), targets)

    def chunk_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return _target_logps(_logits(model, hidden), targets)

    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks])


@torch.no_grad()
def head_log_sum_squares(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    """Log of the sum of squared token probabilities, [N] float32, from hidden states [N, H]."""
    return torch.cat([_log_sum_squares(_logits(model, chunk)) for chunk in hidden.split(HEAD_CHUNK)])


def _logits(model: "PreTrainedModel", hidden: Tensor) -> Tensor:
    logits = model.get_output_embeddings()(hidden)
    config = model.config
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


def _target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return _TargetLogps.apply(logits, targets)


class _TargetLogps(torch.autograd.Function):
    """Log-softmax in float32 of logits [N, V], at `targets` [N] only: [N] float32.

    Beyond the logits, as they come, nothing of their size is kept or made: the backward pass writes their gradient
    where they were. Both passes go by blocks of rows that stay in the cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """Gives the log-probabilities."""
        totals = torch.cat([block.float().logsumexp(-1) for block in logits.split(_block_rows(logits))])
        ctx.save_for_backward(logits, targets, totals)
        return logits.gather(1, targets[:, None]).squeeze(1).float() - totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gives the gradient of the logits: (1 at the target - probability) times that of the log-probability."""
        logits, targets, totals = ctx.saved_tensors
        rows = _block_rows(logits)
        for block, *columns in zip(*(t.split(rows) for t in (logits, targets, totals, grad)), strict=True):
            target, total, factor = (column[:, None] for column in columns)
            gradient = (block.float() - total).exp_().mul_(-factor)
            block.copy_(gradient.scatter_add_(1, target, factor))
        return logits, None


def _block_rows(logits: Tensor) -> int:
    elements = LOGITS_IN_CACHE if logits.device.type == "cpu" else LOGITS_AT_ONCE
    return max(1, elements // logits.shape[1])


@torch.no_grad()
def _log_sum_squares(logits: Tensor) -> Tensor:
    return (2 * logits.float().log_softmax(-1)).logsumexp(-1)


# ---------------------------------------------------------------------- may this model share the prompt?


def scoring_from_config(config: "PretrainedConfig") -> Scoring:
    """What the config alone says: recurrent models, ALiBi and unknown types read pairs apart."""
    if config.model_type not in SHARED_PREFIX_MODEL_TYPES:
        return Scoring(
            shared=False, reason=f"models of type '{config.model_type}' are not known to share a prompt exactly"
        )
    if getattr(config, "alibi", False):
        return Scoring(shared=False, reason="ALiBi counts distance in columns, not in position ids")
    windowed = getattr(config, "use_sliding_window", True)
    return Scoring(window=(getattr(config, "sliding_window", None) or None) if windowed else None)


@torch.no_grad()
def choose_scoring(model: "PreTrainedModel", batch: PairBatch, max_pairs: int = 4) -> Scoring:
    """The fastest way to score this model that agrees with its own full logits on real pairs.

    A few pairs of `batch` are probed, with real completions on both sides, so that a mask that is ignored shows even
    where the data's rejected completions are empty. Run without autocast and TF32, which would blur the comparison.
    """
    scoring = scoring_from_config(model.config)
    pairs = sorted(to_pairs(batch), key=lambda pair: len(pair.prompt_ids) + len(pair.chosen_ids))[-max_pairs:]
    swapped = [
        EncodedPair(a.prompt_ids, a.chosen_ids, b.chosen_ids) for a, b in zip(pairs, pairs[1:] + pairs[:1], strict=True)
    ]
    device = batch.input_ids.device
    probe = collate(swapped, range(len(swapped))).to(device)
    tolerance = NOISE if model.dtype == torch.float32 else NOISE_IN_16_BITS

    def agrees(candidate: Scoring) -> bool:
        try:
            found = pair_logps(model, probe, candidate).token_logps
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # models with their own idea of masks refuse a 4D one
        off = (found - truth).abs() / (1 + truth.abs())
        # Means and quantiles, since on some hardware a single token is off by more. NaN agrees with nothing.
        return bool(off.mean() <= tolerance and off.quantile(0.99) <= 5 * tolerance)

    with torch.autocast(device.type, enabled=False), float32_products(), evaluating(model):
        truth = pair_logps(model, probe, Scoring(shared=False, gathered=False)).token_logps
        if scoring.shared and agrees(scoring):
            return scoring
        reason = scoring.reason or "its log-probs with a shared prompt differ from those of separate forwards"
        return Scoring(shared=False, gathered=agrees(Scoring(shared=False)), reason=reason)


@contextmanager
def float32_products() -> Iterator[None]:
    """Products of float32 matrices in float32 for a while, whatever `torch.set_float32_matmul_precision` has said."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # TF32 of a GPU, bfloat16 of a CPU
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
