"""Put several rows of a step into one sequence, each on its own: attention and positions begin anew with every row.

A packed step has the rows that it has without packing, on all ranks and micro-batches together; only who computes them
differs. So losses are the same up to rounding.
"""

from collections.abc import Sequence
from heapq import heapify, heapreplace

TRIES = 16  # numbers of sequences that are tried


def share_out(lengths: Sequence[int], parts: int, longest: int) -> list[list[list[int]]]:
    """Deal the rows of a step to its parts, one for each rank and micro-batch.

    All parts get the same number of sequences, and all sequences are padded to one length. Rows are dealt by length:
    the longest one left goes to the emptiest sequence, so none is empty and all are about equally full. Of the `TRIES`
    smallest numbers of sequences, and of one for each row, that with the fewest tokens is taken, padding included; so
    packing never costs more tokens than it saves.

    Args:
        lengths: tokens of each row; a multiple of `parts` rows.
        parts: ranks times micro-batches.
        longest: most tokens of a sequence; no row has more.

    Returns:
        [part][sequence], the numbers of its rows.
    """
    alone, fewest = len(lengths) // parts, max(1, -(-sum(lengths) // (parts * longest)))
    best, best_tokens = [[row] for row in range(len(lengths))], len(lengths) * max(lengths)
    for of_part in range(fewest, min(fewest + TRIES, alone)):
        sequences = _balanced(lengths, parts * of_part)
        fullest = max(sum(lengths[row] for row in rows) for rows in sequences)
        if fullest <= longest and len(sequences) * fullest < best_tokens:
            best, best_tokens = sequences, len(sequences) * fullest
    return [best[part::parts] for part in range(parts)]


def _balanced(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Return so many sequences of rows with about equally many tokens; equal ones are taken in order."""
    sequences: list[list[int]] = [[] for _ in range(count)]
    filled = [(0, number) for number in range(count)]
    heapify(filled)
    for row in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        tokens, number = filled[0]
        sequences[number].append(row)
        heapreplace(filled, (tokens + lengths[row], number))
    return sequences
