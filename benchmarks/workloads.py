"""Rows in the founding format -> the three workloads of the benchmarks (prompt/chosen/rejected rows), and a model.

- founding: rejected completions are empty (EOS alone);
- shuffled: another row's answer is rejected;
- long: as founding, behind prompts of at least `LONG` tokens (other rows' tables come before the row's own).
"""

import json
from pathlib import Path

from dpo_lightning.data.encoding import encode_batch, load_tokenizer
from dpo_lightning.data.loaders import LengthGroupedBatchSampler
from dpo_lightning.data.rejected import shuffled_partners

LONG = 400  # tokens
SEED = 42


def read_rows(path: str) -> list[dict[str, str]]:
    """The rows of a JSONL file with question, context and answer."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def make_pairs(name: str, rows: list[dict[str, str]], tokenizer) -> list[dict[str, str]]:
    """One workload's pairs, in the rows' order."""
    answers = [row["answer"] for row in rows]
    partners = shuffled_partners(answers, SEED, "the rows") if name == "shuffled" else None
    pairs = []
    for i, row in enumerate(rows):
        prompt = f"{row['context']}\nQuestion: {row['question']}\nAnswer:"
        other = i
        while name == "long" and len(tokenizer(prompt)["input_ids"]) < LONG:
            other = (other + 1) % len(rows)
            prompt = f"{rows[other]['context']}\n{prompt}"
        rejected = "" if partners is None else f" {answers[partners[i]]}"
        pairs.append({"prompt": prompt, "chosen": f" {row['answer']}", "rejected": rejected})
    return pairs


def write_workload(name: str, rows_file: str, tokenizer_name: str, batch_size: int, batches: int, path: Path) -> None:
    """Writes `batches * batch_size` pairs in the order of the package's length-grouped batches.

    Both contenders then read the file from top to bottom: the same pairs in each batch, as little padding for the one
    as for the other.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    rows = read_rows(rows_file)
    wanted = batch_size * batches
    rows = (rows * (wanted // len(rows) + 1))[:wanted]
    pairs = make_pairs(name, rows, tokenizer)
    columns = {key: [pair[key] for pair in pairs] for key in pairs[0]}
    lengths = encode_batch(columns, tokenizer, max_length=1024)["length"]
    order = [i for batch in LengthGroupedBatchSampler(lengths, batch_size, shuffle=True, seed=SEED) for i in batch]
    path.write_text("".join(json.dumps(pairs[i]) + "\n" for i in order), encoding="utf-8")


def model_folder(model: str | None, tokenizer_name: str, folder: Path) -> str:
    """`model` itself, or a new folder with GPT-2 small's architecture and random weights."""
    if model:
        return model
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    load_tokenizer(tokenizer_name).save_pretrained(folder)
    return str(folder)
