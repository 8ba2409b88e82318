"""Rows and tokens in memory-mapped Arrow files, for data that would not fit in the memory of every rank.

A file is written once on a host, by the first of the ranks that need it. All of them map it, and then its name is
removed: the system frees it with the last of them, however they end. Rows are stored as the JSON text that their digest
is of. Imports no torch.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ubsmoe_ds.base.files import writes
from ubsmoe_ds.data.schema import PlacedRow, Row
from ubsmoe_ds.launching.scratch import scratch_folder

BATCH = 1000  # rows that are written at a time
Write = Callable[[Path], None]


class Sharing(Protocol):
    """How the ranks of a host share a file."""

    def map(self, write: Write) -> Any:
        """Return an Arrow table that `write` writes to a path, memory-mapped."""


class Alone:
    """A process that shares with no other."""

    def map(self, write: Write) -> Any:
        """Write a file, map it, and remove its name."""
        with scratch_folder() as folder:
            return written(write, folder / "rows.arrow")


def written(write: Write, path: Path) -> Any:
    """Write a table and return it mapped.

    Raises:
        UserError: if there is no room for it.
    """
    with writes(Path(tempfile.gettempdir())):  # TMPDIR
        write(path)
    return mapped(path)


def mapped(path: Path) -> Any:
    """Return the table of an Arrow file, of which nothing is read before it is used."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def write_table(path: Path, fields: dict[str, Any], records: Iterable[Sequence[Any]]) -> None:
    """Write records to an Arrow file, some at a time.

    Args:
        path: the file.
        fields: name of each column -> its Arrow type, by name, such as "float64".
        records: with a value for each column.
    """
    import pyarrow as pa

    types = {"tokens": pa.large_list(pa.int32())}
    schema = pa.schema([(name, types.get(kind) or pa.type_for_alias(kind)) for name, kind in fields.items()])
    rest = iter(records)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while part := list(islice(rest, BATCH)):
            values = zip(*part, strict=True)
            columns = [pa.array(column, field.type) for column, field in zip(values, schema, strict=True)]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def text_of(row: Any) -> bytes:
    """Return the JSON text of a row that its digest is of."""
    return json.dumps(row, sort_keys=True, default=str).encode()


def texts_of(rows: Sequence[Any]) -> Iterator[bytes]:
    """Yield the JSON text of each row."""
    return rows.texts() if isinstance(rows, StoredRows) else map(text_of, rows)


class StoredRows(Sequence[Row]):
    """Rows in columns `row` and `place` of a mapped table, made when they are asked for.

    Args:
        table: the table.
        numbers: of the rows in it, in order.
    """

    def __init__(self, table: Any, numbers: np.ndarray) -> None:
        self.table, self.numbers = table, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: Any) -> Any:
        """Return a row, or for a slice the rows there."""
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        number = int(self.numbers[place])
        row, where = (self.table.column(name)[number].as_py() for name in ("row", "place"))
        return PlacedRow(json.loads(row), where)

    def select(self, places: np.ndarray) -> "StoredRows":
        """Return the rows at these places."""
        return StoredRows(self.table, self.numbers[places])

    def texts(self) -> Iterator[bytes]:
        """Yield the JSON text of each row."""
        column = self.table.column("row")
        for number in self.numbers.tolist():
            yield column[number].as_py()
