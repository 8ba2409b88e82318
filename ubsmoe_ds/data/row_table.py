"""Rows of one source with what they are chosen and dealt by: in memory, or in a mapped file where they are many.

Imports no torch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.formats import CLOZE
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.files import raw_rows
from ubsmoe_ds.data.formats import format_of, read_row, renamed
from ubsmoe_ds.data.schema import Row, content, question_of
from ubsmoe_ds.data.stored import Sharing, StoredRows, text_of, write_table

IN_MEMORY = 32 * 2**20  # bytes of JSON text; beyond it rows are in a file that the ranks of a host share
DIGEST = 16  # bytes
FIELDS = {
    "row": "binary",
    "place": "string",
    "hold_out": "float64",
    "order": "float64",
    "same": "binary",
    "group": "string",
    "owner": "string",
    "length": "int64",
}


class Facts(NamedTuple):
    """Hold the facts of a row that decide whether it is chosen, and for which client.

    hold_out, order: in [0, 1), by its question: whether it is held out, and where it comes.
    same: digest of prompt and answer.
    group: the category that it is dealt by.
    owner: value of `data.client_column`.
    length: in characters.
    """

    hold_out: float
    order: float
    same: bytes
    group: str
    owner: str
    length: int


class FactsInMemory:
    """The facts of rows as columns."""

    def __init__(self, facts: Sequence[Facts]) -> None:
        self._columns = dict(zip(Facts._fields, zip(*facts, strict=True), strict=True))

    def numbers(self, name: str) -> np.ndarray:
        """Return a column, [N]; of `same` as texts of `DIGEST` bytes."""
        return np.array(self._columns[name], dtype=f"S{DIGEST}" if name == "same" else None)

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return (the place of each name of a column among the different ones, [N], and these in their order)."""
        return _coded(self._columns[name])


class StoredFacts:
    """The facts in a mapped table; a column is read when it is asked for, and not kept."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def numbers(self, name: str) -> np.ndarray:
        """Return a column, [N]; of `same` as texts of `DIGEST` bytes."""
        column = self._table.column(name)
        if name == "same":
            return np.concatenate([np.array(chunk.to_pylist(), dtype=f"S{DIGEST}") for chunk in column.chunks])
        return column.to_numpy()

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return (the place of each name of a column among the different ones, [N], and these in their order)."""
        encoded = self._table.column(name).combine_chunks().dictionary_encode()
        code_of_name, different = _coded(encoded.dictionary.to_pylist())
        return code_of_name[encoded.indices.to_numpy()], different


@dataclass(frozen=True)
class RowTable:
    """Rows of one format, with the facts of these and maybe others; number_N: places of the rows among the facts."""

    rows: Sequence[Row]
    format: str
    facts: FactsInMemory | StoredFacts
    number_N: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def numbers(self, name: str) -> np.ndarray:
        """Return a fact of each row, [N]."""
        return self.facts.numbers(name)[self.number_N]

    def codes(self, name: str) -> tuple[np.ndarray, list[str]]:
        """Return (the place of each row's name among the different ones, [N], and these in their order)."""
        codes, names = self.facts.codes(name)
        return codes[self.number_N], names

    def select(self, places: np.ndarray) -> "RowTable":
        """Return the rows at these places, in this order."""
        return RowTable(self.rows_at(places), self.format, self.facts, self.number_N[places])

    def rows_at(self, places: np.ndarray) -> Sequence[Row]:
        """Return the rows at these places, in this order."""
        if isinstance(self.rows, StoredRows):
            return self.rows.select(places)
        return [self.rows[place] for place in places.tolist()]

    def ordered(self) -> "RowTable":
        """Return the rows in an order that depends on their questions and the seed alone."""
        return self.select(np.argsort(self.numbers("order"), kind="stable"))


def table_of(rows: Sequence[Row], form: str, seed: int) -> RowTable:
    """Return rows in memory with their facts.

    Args:
        rows: the rows, of one format.
        form: their format.
        seed: of the order of rows.
    """
    return RowTable(rows, form, FactsInMemory([_facts(row, seed) for row in rows]), np.arange(len(rows)))


def read_table(sources: str | Sequence[str], config: DataConfig, split: str, seed: int, sharing: Sharing) -> RowTable:
    """Read the rows of one or several sources, all of one format, and check each.

    Args:
        sources: as `data.source`, without `synthetic`.
        config: how they are read.
        split: of a data set that has splits, where the source names none.
        seed: of the order of rows.
        sharing: with whom they are shared if they are many.

    Raises:
        UserError: naming the file, the row and the mistake in it.
    """
    reader = _Reader(sources, config, split)
    first: list[Row] = []
    size = 0
    for row in reader.rows:
        first.append(row)
        size += len(text_of(row))
        if size > IN_MEMORY:
            return _stored(chain(_drained(first), reader.rows), reader, seed, sharing)
    if not first:
        raise UserError(f"data: {sources if isinstance(sources, str) else ', '.join(sources)} holds no rows")
    return table_of(first, reader.format, seed)


class _Reader:
    """Reads rows one after another; the first one decides the format."""

    def __init__(self, sources: str | Sequence[str], config: DataConfig, split: str) -> None:
        self.format = ""
        self.rows = self._checked(sources, config, split)

    def _checked(self, sources: str | Sequence[str], config: DataConfig, split: str) -> Iterator[Row]:
        kept = {"group": config.label_column, "owner": config.client_column}
        for place, raw in raw_rows(sources, split):
            if not self.format:
                self.format = format_of(renamed(raw, place, config.columns), config.format, place)
            yield read_row(raw, self.format, place, config.columns, cloze=config.format == CLOZE, kept=kept)


def _drained(rows: list[Row]) -> Iterator[Row]:
    """Yield rows and let go of them."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _stored(rows: Iterator[Row], reader: _Reader, seed: int, sharing: Sharing) -> RowTable:
    """Write rows with their facts to a file that the ranks of a host share, and return it mapped."""
    records = ((text_of(row), getattr(row, "place", ""), *_facts(row, seed)) for row in rows)
    table = sharing.map(lambda path: write_table(path, FIELDS, records))
    numbers = np.arange(table.num_rows)
    return RowTable(StoredRows(table, numbers), reader.format, StoredFacts(table), numbers)


def _facts(row: Row, seed: int) -> Facts:
    question, parts = question_of(row), content(row)
    same = hashlib.blake2b("\0".join(parts).encode(), digest_size=DIGEST).digest()
    return Facts(
        hold_out=_position(question, 0),
        order=_position(question, seed + 1),
        same=same,
        group=row.get("group") or row["task"],
        owner=row.get("owner") or "",
        length=sum(map(len, parts)),
    )


def _position(question: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on question and seed, to split and order rows by question."""
    digest = hashlib.blake2b(f"{seed}\n{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _coded(names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Return (the place of each name among the different ones in their order, these)."""
    different = sorted(set(names))
    code = {name: number for number, name in enumerate(different)}
    return np.array([code[name] for name in names], dtype=np.int64), different
