"""Rows of token ids -> which of them nearly repeat another one.

Rows are compared as sets of three successive tokens, by MinHash and locality-sensitive hashing (Broder 1997, "On the
resemblance and containment of documents"). rensa does both, at about 40,000 short rows a second and without any other
package; datasketch would need scipy and a hundred times as long. It is an extra, since only the checks of `inspect`
need it and not every platform has a wheel.
"""

from collections.abc import Sequence

import numpy as np

SIMILAR = 0.8  # least Jaccard similarity of two rows' sets: one word in 40 tokens differs, or three in 80
PERMUTATIONS, BANDS = 128, 16  # finds nearly all rows of that similarity
NGRAM = 3


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
    first = index.add_pairs((str(number), _ngrams(row)) for number, row in enumerate(rows))
    matches = index.get_duplicate_sets([_ngrams(row) for row in others])
    found = {number: int(min(keys, key=int)) for number, keys in enumerate(matches) if keys}
    return ~np.array(first, dtype=bool), found


def _ngrams(row: np.ndarray) -> list[bytes]:
    size, raw = row.itemsize, np.ascontiguousarray(row).tobytes()
    return [raw[start : start + NGRAM * size] for start in range(0, max(1, len(raw) - (NGRAM - 1) * size), size)]
