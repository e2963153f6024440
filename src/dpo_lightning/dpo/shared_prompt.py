"""Whether a model may read a pair's prompt once: its config decides, and a comparison with separate forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from dpo_lightning.data.batching import EncodedPair, PairBatch, collate, to_pairs
from dpo_lightning.dpo.logps import Scoring, pair_logps
from dpo_lightning.internals.transformers import attention_in_use
from dpo_lightning.models.generate import evaluating

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


# Model types whose attention takes a ready-made [B, 1, T, T] mask and explicit position ids; each was compared with
# separate forward passes. Other models read the two sequences of a pair separately.
SHARED_PREFIX_MODEL_TYPES = frozenset(
    "gpt2 llama qwen2 qwen3 qwen2_moe qwen3_moe gemma gemma2 gemma3_text mistral mixtral gpt_neox opt falcon phi phi3 "
    "gpt_bigcode starcoder2 stablelm olmo olmo2 olmo3 olmoe granite granitemoe cohere cohere2 smollm3 biogpt "
    "deepseek_v3 gptj codegen xglm gpt_oss".split()
)
# Of these, the ones whose pairs cannot be packed into one row: their scores are soft-capped, their attention has sinks,
# cannot be replaced (Falcon, XGLM), or does not get the arguments of the forward pass (StableLM).
UNPACKED_MODEL_TYPES = frozenset("gemma2 gpt_oss falcon xglm stablelm".split())


def scoring_from_config(config: "PretrainedConfig") -> Scoring:
    """The scoring that the config allows: recurrent models, ALiBi and unknown types read each sequence separately."""
    if config.model_type not in SHARED_PREFIX_MODEL_TYPES:
        return Scoring(
            shared=False, reason=f"models of type '{config.model_type}' are not known to share a prompt exactly"
        )
    if getattr(config, "alibi", False):
        return Scoring(shared=False, reason="ALiBi counts distance in columns, not in position ids")
    windowed = getattr(config, "use_sliding_window", True)
    return Scoring(window=(getattr(config, "sliding_window", None) or None) if windowed else None)


@torch.no_grad()
def choose_scoring(
    model: "PreTrainedModel",
    batch: PairBatch,
    max_pairs: int = 4,
    may_pack: bool = True,
    products: torch.dtype | None = None,
) -> Scoring:
    """The fastest way to score this model that agrees with its own full logits on real pairs.

    It is tried on a few pairs of `batch` with a real completion on both sides: a model that ignores the mask would go
    unnoticed with empty rejected completions. Autocast and TF32, which blur the comparison, are off meanwhile.

    Args:
        products: the dtype that a sharded model's weights are gathered in (`sharding.shard`), in which alone it can be
            compared, under autocast; None if they are gathered as they are.
    """
    scoring = scoring_from_config(model.config)
    sequences = [(pair.prompt_ids, pair.chosen_ids or pair.rejected_ids) for pair in to_pairs(batch)]
    sequences = sorted(sequences, key=lambda sequence: sum(map(len, sequence)))[-max_pairs:]
    others = sequences[1:] + sequences[:1]
    swapped = [EncodedPair(*sequence, other) for sequence, (_, other) in zip(sequences, others, strict=True)]
    device = batch.input_ids.device
    probe = collate(swapped, range(len(swapped))).to(device)
    tolerance = NOISE if model.dtype == torch.float32 and products is None else NOISE_IN_16_BITS

    def agrees(candidate: Scoring, tolerance: float = tolerance) -> bool:
        try:
            found = pair_logps(model, probe, candidate).token_logps
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # some models refuse a 4D mask
        off = (found - truth).abs() / (1 + truth.abs())
        # Mean and quantile, because on some hardware single tokens differ by more. Comparisons with NaN are false.
        return bool(off.mean() <= tolerance and off.quantile(0.99) <= 5 * tolerance)

    def agrees_packed(candidate: Scoring) -> bool:
        if model.config.model_type in UNPACKED_MODEL_TYPES or not agrees(candidate):
            return False
        if device.type != "cuda" or model.dtype != torch.float32:
            return True
        with torch.autocast("cuda", torch.bfloat16):  # which uses another kernel
            return agrees(candidate, NOISE_IN_16_BITS)

    with torch.autocast(device.type, products, products is not None), float32_products(), evaluating(model):
        truth = pair_logps(model, probe, Scoring(shared=False, gathered=False)).token_logps
        if scoring.shared:
            before = attention_in_use(model)
            if may_pack and agrees_packed(packed := scoring._replace(packed=True)):
                return packed
            if attention_in_use(model) != before:
                model.set_attn_implementation(before)
            if agrees(scoring):
                return scoring
        reason = scoring.reason or "its log-probs with a shared prompt differ from those of separate forwards"
        return Scoring(shared=False, gathered=agrees(Scoring(shared=False)), reason=reason)


@contextmanager
def float32_products() -> Iterator[None]:
    """Multiplies float32 matrices in float32 inside the context, whatever `torch.set_float32_matmul_precision` says."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # TF32 of a GPU, bfloat16 of a CPU
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


# The mean difference per token, relative to 1 + |log-prob|, that two ways of scoring may have. Measured: 2e-7 in
# float32, 1e-5 to 3e-4 in TF32, 1e-3 to 7e-3 in bfloat16. A wrong mask differs at least thirty times as much as TF32
# does in the same model: 5e-4 in an untrained one, 0.25 and 0.5 in two trained ones, in bfloat16 too.
NOISE, NOISE_IN_16_BITS = 4e-4, 1e-2
