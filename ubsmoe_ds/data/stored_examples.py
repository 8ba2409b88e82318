"""Examples of rows that are in a file: tokenised when a step needs them, as all of them would take long and much room.

A row that is too long is met only when its turn comes; then the next one that fits takes its place. How many rows are
cut and dropped is estimated from the first ones.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ubsmoe_ds.data.batches import Example
from ubsmoe_ds.data.lengths import Lengths
from ubsmoe_ds.data.schema import Row

SAMPLE = 1000  # rows that lengths are estimated from; also the most that are tried in a row for one that fits
Encode = Callable[[Sequence[Row]], Iterable[tuple[Example | None, bool]]]


class StoredExamples(Sequence[Example]):
    """An example for each row of a file.

    Args:
        rows: the rows, of one client.
        encode: returns of some rows each as (example, or None if it is too long; whether it was cut).
    """

    def __init__(self, rows: Sequence[Row], encode: Encode) -> None:
        self.rows, self.encode = rows, encode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        """Return the example of a row, or if it is too long, of the next row that fits."""
        return self.take([number])[0]

    def take(self, numbers: Sequence[int]) -> list[Example]:
        """Return the examples of rows; of each that is too long, that of the next row that fits."""
        found = [example for example, _ in self.encode([self.rows[number] for number in numbers])]
        return [self._next(number) if e is None else e for number, e in zip(numbers, found, strict=True)]

    def lengths(self) -> Lengths:
        """Return how many rows fit, are cut and are too long, estimated from the first ones."""
        found = list(self.encode(list(self.rows[:SAMPLE])))
        kept = sum(example is not None for example, _ in found)
        cut = sum(cut for _, cut in found)
        times = len(self) / len(found)
        return Lengths(round(kept * times), round(cut * times), len(self) - round(kept * times))

    def _next(self, number: int) -> Example:
        """Return the example of the first row after this one that fits; there is one among the first `SAMPLE`."""
        for place in range(number + 1, number + 1 + len(self)):
            ((example, _),) = self.encode([self.rows[place % len(self)]])
            if example is not None:
                return example
        raise AssertionError("no row fits")
