"""Builds everything that ships in this folder from scratch: data set, tokenizer, tiny pretrained GPT-2.

    python -m dpo_lightning.demo.build --output_dir FOLDER [--steps N N N] [--threads N]

Writes FOLDER/data/{train,valid,test}.jsonl and the Hugging Face folder FOLDER/model. Data and tokenizer are the same on
any machine; the weights on the same kind of CPU with the same number of threads and library versions. Takes about 45
minutes on one core without AMX, and 1.2 GB of memory.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .corpus import coined_word, plain_word, random_text
from .generate import write_data

EOS = "<|endoftext|>"
VOCAB_SIZE = 2048
POSITIONS = 512
BATCH_SIZE = 16
# Steps, peak learning rate and kind of names of each pass. A pass starts from the half-precision weights that the
# previous one saved. The last pass has names like those of a new schema, which the tokenizer splits into odd pieces.
PASSES = ((2600, 2.5e-3, plain_word), (1600, 1.5e-3, plain_word), (1200, 1e-3, coined_word))
# Upper-case words and these function words include the space before them, other words do not. So a name has the same
# tokens in `(name VARCHAR,`, in `AVG(name)` and in a question, which makes it easy to copy.
FUNCTION_WORDS = "the|of|all|is|are|for|each|in|whose|where|which|with|that|than|by|and|or|to|me|a|an"
PRETOKENS = "|".join((
    r", ",
    rf" (?:{FUNCTION_WORDS})(?=[ ?.,])",
    r" ?[A-Z][A-Z0-9]+",
    r"[A-Za-z][a-z]*",
    r"[0-9]{1,2}",
    r" ?[^\sA-Za-z0-9]",
    r"\s",
))  # fmt: skip


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on pretraining texts. As in GPT-2, EOS is `<|endoftext|>` and there is no pad token."""
    rng = random.Random(f"tokenizer {seed}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENS), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(("".join(random_text(rng)) for _ in range(20_000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, unk_token=EOS, model_max_length=POSITIONS
    )


def make_model(seed: int, eos_id: int) -> GPT2LMHeadModel:
    """A GPT-2 of about 2.3 million parameters, freshly initialised."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=POSITIONS, n_embd=192, n_layer=4, n_head=6, initializer_range=0.06,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=eos_id, eos_token_id=eos_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    # Positions start as sines and cosines, so that attention to the previous token, which copying needs, forms sooner.
    width = config.n_embd // 2
    angles = torch.arange(config.n_positions)[:, None] / 1000 ** (torch.arange(width) / width)
    model.transformer.wpe.weight.data = 0.08 * torch.cat([angles.sin(), angles.cos()], dim=1)
    return model


def batches(tokenizer: PreTrainedTokenizerFast, word, seed: int):
    """Yields (input ids [B, T], labels [B, T]) of texts of similar length, without end.

    The context, whose names are random, and padding have label -100, so they add nothing to the loss.
    """
    rng = random.Random(f"texts {seed}")
    while True:
        contexts, texts = zip(*(random_text(rng, word) for _ in range(64 * BATCH_SIZE)), strict=True)
        contexts, texts = tokenizer(list(contexts)).input_ids, tokenizer(list(texts)).input_ids
        pairs = sorted(zip(contexts, texts, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [pairs[i : i + BATCH_SIZE] for i in range(0, len(pairs), BATCH_SIZE)]
        rng.shuffle(groups)
        for group in groups:
            rows = [torch.tensor([*context, *text, tokenizer.eos_token_id]) for context, text in group]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
            labels = ids.clone()
            for row, (context, _) in enumerate(group):
                labels[row, : len(context)] = -100
            yield ids.clamp(min=0), labels


def pretrain(model: GPT2LMHeadModel, texts, steps: int, peak: float) -> None:
    """Trains the model on `texts` (see `batches`) in place: AdamW, 100 steps of warm-up, cosine decay."""

    def rate(step: int) -> float:
        return min((step + 1) / 100, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start = time.time()
    model.train()
    for step, (ids, labels) in zip(range(steps), texts, strict=False):
        hidden, targets = model.transformer(ids).last_hidden_state[:, :-1], labels[:, 1:]
        predicted = targets != -100
        loss = cross_entropy(model.lm_head(hidden[predicted]), targets[predicted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)


def save_model(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves weights in half precision. The config still says float32, so that they are loaded in float32."""
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float().config.dtype = torch.float32
    model.config.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's data set, tokenizer and tiny model.")
    parser.add_argument("--output_dir", type=Path, required=True, help="where data/ and model/ are written")
    parser.add_argument(
        "--steps",
        type=int,
        nargs=len(PASSES),
        default=[p[0] for p in PASSES],
        help="steps of each pass",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of tokenizer, weights and pretraining texts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    write_data(args.output_dir / "data")
    tokenizer = train_tokenizer(args.seed)
    model = make_model(args.seed, tokenizer.eos_token_id)
    for number, (steps, (_, peak, word)) in enumerate(zip(args.steps, PASSES, strict=True)):
        pretrain(model, batches(tokenizer, word, args.seed + number), steps, peak)
        save_model(model, tokenizer, args.output_dir / "model")


if __name__ == "__main__":
    main()
