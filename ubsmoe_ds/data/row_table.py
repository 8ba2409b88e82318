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
    """What a row is chosen and dealt by.

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


class Columns(NamedTuple):
    """The facts of N rows; of group and owner the place among all names, in their order."""

    hold_out_N: np.ndarray
    order_N: np.ndarray
    same_N: np.ndarray
    group_N: np.ndarray
    owner_N: np.ndarray
    length_N: np.ndarray


@dataclass(frozen=True)
class RowTable:
    """Rows of one format with their facts; `owners` are the names of owners."""

    rows: Sequence[Row]
    format: str
    columns: Columns
    owners: Sequence[str]

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers: np.ndarray) -> "RowTable":
        """Return the rows of these numbers, in this order."""
        columns = Columns(*(column[numbers] for column in self.columns))
        return RowTable(self.rows_at(numbers), self.format, columns, self.owners)

    def rows_at(self, numbers: np.ndarray) -> Sequence[Row]:
        """Return the rows of these numbers, in this order."""
        if isinstance(self.rows, StoredRows):
            return self.rows.select(numbers)
        return [self.rows[number] for number in numbers.tolist()]

    def ordered(self) -> "RowTable":
        """Return the rows in an order that depends on their questions and the seed alone."""
        return self.select(np.argsort(self.columns.order_N, kind="stable"))


def table_of(rows: Sequence[Row], form: str, seed: int) -> RowTable:
    """Return rows in memory with their facts.

    Args:
        rows: the rows, of one format.
        form: their format.
        seed: of the order of rows.
    """
    facts = Facts(*(list(column) for column in zip(*(_facts(row, seed) for row in rows), strict=True)))  # type: ignore
    (group_N, _), (owner_N, owners) = _coded(facts.group), _coded(facts.owner)
    same_N = np.array(facts.same, dtype=f"S{DIGEST}")
    columns = Columns(np.array(facts.hold_out), np.array(facts.order), same_N, group_N, owner_N, np.array(facts.length))
    return RowTable(rows, form, columns, owners)


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
        for place, raw in raw_rows(sources, split):
            if not self.format:
                self.format = format_of(renamed(raw, place, config.columns), config.format, place)
            yield read_row(raw, self.format, place, config.columns, cloze=config.format == CLOZE)


def _drained(rows: list[Row]) -> Iterator[Row]:
    """Yield rows and let go of them."""
    rows.reverse()
    while rows:
        yield rows.pop()


def _stored(rows: Iterator[Row], reader: _Reader, seed: int, sharing: Sharing) -> RowTable:
    """Write rows with their facts to a file that the ranks of a host share, and return it mapped."""
    records = ((text_of(row), getattr(row, "place", ""), *_facts(row, seed)) for row in rows)
    table = sharing.map(lambda path: write_table(path, FIELDS, records))
    (group_N, _), (owner_N, owners) = (_coded_column(table.column(name)) for name in ("group", "owner"))
    hold_out_N, order_N, length_N = (table.column(name).to_numpy() for name in ("hold_out", "order", "length"))
    parts = [np.array(chunk.to_pylist(), dtype=f"S{DIGEST}") for chunk in table.column("same").chunks]
    columns = Columns(hold_out_N, order_N, np.concatenate(parts), group_N, owner_N, length_N)
    return RowTable(StoredRows(table, np.arange(table.num_rows)), reader.format, columns, owners)


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


def _coded_column(column: Any) -> tuple[np.ndarray, list[str]]:
    """Return what `_coded` returns of a mapped column."""
    encoded = column.combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    code_of_name, different = _coded(names)
    return code_of_name[encoded.indices.to_numpy()], different
