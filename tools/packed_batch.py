"""Draws docs/packed-batch.svg: a packed batch of two pairs and which token attends to which, from the package's code.

python tools/packed_batch.py
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpo_lightning.data.batching import collate, to_packed
from dpo_lightning.data.encoding import EncodedPair
from dpo_lightning.dpo.packing import Plan, Sequences

PICTURE = Path(__file__).parents[1] / "docs" / "packed-batch.svg"
PROMPTS, CHOSEN, REJECTED = ["How", "many", "?"], [" SELECT", " COUNT", "…", "end"], [" It", " is", "end"]
PAIRS = [(PROMPTS, CHOSEN, REJECTED), (["Who", "?"], [" SELECT", " name", "end"], [" Me", ".", "end"])]
CELL, LEFT, TOP = 56, 122, 102  # pixels: a token's square; the first one's corner in the attention matrix
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #111827; text-anchor: middle; }
  .label { fill: #374151; text-anchor: end; } .note { fill: #374151; text-anchor: start; }
  .prompt { fill: #bfdbfe; } .chosen { fill: #bbf7d0; } .rejected { fill: #fecaca; } .hidden { fill: #f3f4f6; }
  rect { stroke: #fff; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    .label, .note { fill: #d1d5db; } .hidden { fill: #2b2f38; } rect { stroke: #14151a; }
    .prompt { fill: #93b8ec; } .chosen { fill: #86cfa2; } .rejected { fill: #eb9a9a; }
  }
"""


def attention(plan: Plan, tokens: int) -> np.ndarray:
    """Which key (column) each query (row) of the packed row sees, [tokens, tokens] of bool."""
    seen = np.zeros((tokens, tokens), dtype=bool)
    query = 0
    for sequences in (plan.chosen, plan.rejected):
        assert isinstance(sequences, Sequences)
        end = np.cumsum(sequences.keys)
        index = np.arange(end[-1]) if sequences.key_index is None else sequences.key_index.numpy()
        for keys, count, queries in zip(np.split(index, end[:-1]), sequences.keys, sequences.queries, strict=True):
            for back in range(queries)[::-1]:  # the queries are the last of the keys, and causal
                seen[query, keys[: count - back]] = True
                query += 1
    return seen


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{words}</text>'.replace("'", '"')


def square(column: int, y: float, kind: str, words: str = "") -> str:
    x = LEFT + column * CELL
    rect = f'<rect x="{x}" y="{y:g}" width="{CELL}" height="{CELL / 2:g}" rx="3" class="{kind}"/>'
    return rect + (text(x + CELL / 2, y + CELL / 4 + 4, words) if words else "")


def drawn() -> Iterator[str]:
    """The elements of the picture."""
    vocabulary = [word for pair in PAIRS for part in pair for word in part]
    ids = [EncodedPair(*([vocabulary.index(word) for word in part] for part in pair)) for pair in PAIRS]
    batch = to_packed(collate(ids, range(len(ids))))
    tokens, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    kinds = [("prompt", "chosen", "rejected")[segment] for segment in batch.segment_ids[0]]
    seen = attention(Plan(batch), len(tokens))
    predicted: dict[int, list[str]] = {}
    for position, target in zip(batch.predict_index.tolist(), batch.targets.tolist(), strict=True):
        predicted.setdefault(position, []).append(vocabulary[target].strip())
    first = 0
    for part, sequences in (("prompt, chosen", Plan(batch).chosen), ("rejected", Plan(batch).rejected)):
        for pair, count in enumerate(sequences.queries if sequences else []):
            yield text(LEFT + (first + count / 2) * CELL, 14, f"pair {pair + 1}: {part}", "middle note")
            first += count
    for y, label in ((38, "token"), (62, "position id"), (84, "predicts"), (TOP + 16, "attends to:")):
        yield text(LEFT - 8, y, label, "label")
    for column, (token, position, kind) in enumerate(zip(tokens, positions, kinds, strict=True)):
        x = LEFT + (column + 0.5) * CELL
        yield square(column, 22, kind, vocabulary[token].strip())
        yield text(x, 62, str(position), "middle note")
        for line, word in enumerate(predicted.get(column, [])):
            yield text(x, 84 + 16 * line, word, "middle note")
        row = TOP + 4 + (column + 1) * CELL / 2
        yield text(LEFT - 8, row + 16, vocabulary[token].strip(), "label")
        for key in range(len(tokens)):
            yield square(key, row, kinds[key] if seen[column, key] else "hidden")


def svg() -> str:
    elements = list(drawn())
    tokens = sum(len(p) + len(c) + len(r) - 2 for p, c, r in PAIRS)
    width, height = LEFT + tokens * CELL + 4, TOP + 4 + (tokens + 1) * CELL // 2 + 4
    title = "<title>A packed batch of two pairs, and which token attends to which</title>"
    style = STYLE + "  .middle { text-anchor: middle; }\n"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, title, f"<style>{style}</style>", *elements, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(svg())
