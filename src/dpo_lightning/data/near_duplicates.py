"""Rows of token ids -> which of them nearly repeat another one.

Rows are compared as sets of three successive tokens, without those that many rows have (of a system prompt, say), by
MinHash and locality-sensitive hashing (Broder 1997, "On the resemblance and containment of documents"). rensa does
both, at about 40,000 short rows a second and without any other package; datasketch would need scipy and a hundred times
as long. It is an extra, since only the checks of `inspect` need it and not every platform has a wheel.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

SIMILAR = 0.8  # least Jaccard similarity of two rows' sets: one word in 40 tokens differs, or three in 80
PERMUTATIONS, BANDS = 128, 16  # finds nearly all rows of that similarity
NGRAM = 3
COMMON, COUNTED = 0.2, 1000  # share of the rows with an n-gram that is left out, and in how many rows it is counted


def near_duplicates(rows: Sequence[np.ndarray], others: Sequence[np.ndarray] = ()) -> tuple[np.ndarray, dict[int, int]]:
    """Finds repetitions; a few are missed or found by mistake, since similarities are estimated.

    Args:
        rows: of token ids, int32.
        others: the same.

    Returns:
        Which of the rows nearly repeat an earlier row, a bool for each; and the position of each of the others that
        nearly repeats a row -> the position of that row.

    Raises:
        ImportError: rensa is not installed.
    """
    from rensa import RMinHashDeduplicator

    index = RMinHashDeduplicator(SIMILAR, PERMUTATIONS, use_lsh=True, num_bands=BANDS)
    common = _common(rows)
    first = index.add_pairs((str(number), _own(row, common)) for number, row in enumerate(rows))
    matches = index.get_duplicate_sets([_own(row, common) for row in others])
    found = {number: int(min(keys, key=int)) for number, keys in enumerate(matches) if keys}
    return ~np.array(first, dtype=bool), found


def _common(rows: Sequence[np.ndarray]) -> set[bytes]:
    """The n-grams that many rows have."""
    counted = rows[:: max(1, len(rows) // COUNTED)]
    counts = Counter(ngram for row in counted for ngram in set(_ngrams(row)))
    return {ngram for ngram, count in counts.items() if count > max(5, COMMON * len(counted))}


def _own(row: np.ndarray, common: set[bytes]) -> list[bytes]:
    """The n-grams of a row that are not common, or all of them if there are no others."""
    ngrams = _ngrams(row)
    return [ngram for ngram in ngrams if ngram not in common] or ngrams


def _ngrams(row: np.ndarray) -> list[bytes]:
    size, raw = row.itemsize, np.ascontiguousarray(row).tobytes()
    return [raw[start : start + NGRAM * size] for start in range(0, max(1, len(raw) - (NGRAM - 1) * size), size)]
