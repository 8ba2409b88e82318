"""Read raw rows from files, folders and the Hugging Face hub, one after another, with the place of each.

What a file holds follows from its ending: JSON lines, a JSON list, .csv, .tsv, .parquet or .arrow; .gz and .zst may
follow. A folder is one that `datasets` saved, or its files of rows in the order of their names. Nothing is kept in
memory beyond a row or a small batch of them. Imports no torch.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ubsmoe_ds.base.errors import RowError, UserError
from ubsmoe_ds.base.files import first_json, open_regular, parse_json, require_regular
from ubsmoe_ds.config.paths import ENDINGS, PACKED

LONGEST_LINE = 8 * 2**20  # bytes of a row in a file
BATCH = 256  # rows of columnar files that are read at a time
BOM = b"\xef\xbb\xbf"
SPLITS = {"train": ("train",), "test": ("test", "validation")}  # of a saved folder with several
Placed = tuple[str, Any]  # where a row is, and the row


def raw_rows(sources: str | Sequence[str], split: str) -> Iterator[Placed]:
    """Yield the place and the value of each row of one or several sources.

    Args:
        sources: as `data.source`, without `synthetic`.
        split: of a data set that has splits, where the source names none.

    Raises:
        UserError: naming file and row for what cannot be read.
    """
    for source in [sources] if isinstance(sources, str) else sources:
        kind, _, name = source.partition(":")
        if kind == "hub":
            yield from _hub(name, split)
        elif kind == "jsonl":
            yield from _guarded(Path(name), lines)
        else:
            yield from _path(source, split)


def _path(source: str, split: str) -> Iterator[Placed]:
    """Yield the rows of a file, a folder, or all files that a pattern fits."""
    path = Path(source)
    try:
        is_pattern = any(sign in source for sign in "*?[") and not path.exists()
        paths = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor)))) if is_pattern else [path]
        if path.is_dir():
            if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
                yield from _saved(path, split)
                return
            paths = sorted(file for file in path.iterdir() if _ending(file) in ENDINGS)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not paths:
        what = "no file fits this pattern" if is_pattern else f"the folder has no file of rows ({' '.join(ENDINGS)})"
        raise UserError(f"data: {source}: {what}; check the path")
    for file in paths:
        yield from _guarded(file, READERS.get(_ending(file), lines))


def _ending(path: Path) -> str:
    """Return the ending that says what a file holds."""
    name = path.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _guarded(path: Path, reader: Any) -> Iterator[Placed]:
    """Yield a file's rows; turn what its reader raises into one line that names the file."""
    count = 0
    try:
        require_regular(path)
        for row in reader(path):
            yield row
            count += 1
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from error
    except csv.Error as error:
        raise UserError(f"data: {path}, row {count + 1}: is no row of a table ({error})") from error
    except UnicodeDecodeError as error:
        raise RowError(f"data: {path}, after row {count}: is no UTF-8", error) from error
    except ValueError as error:  # of pyarrow; it may quote what it found
        raise RowError(f"data: {path}, after row {count}: cannot be read ({type(error).__name__})", error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: it is damaged"
    return UserError(f"data: {path} cannot be read ({reason}); check the path")


def _open(path: Path) -> BinaryIO:
    """Open a file for reading, unpacked if it is packed."""
    file = open_regular(path)
    if path.name.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if path.name.lower().endswith(".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file), "zstd"))
    return file


def lines(path: Path) -> Iterator[Placed]:
    """Yield the rows of JSON lines; blank lines are none."""
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            place = f"{path}, line {number}"
            if number == 1:
                line = line.removeprefix(BOM)
            if len(line) > LONGEST_LINE:
                raise UserError(f"data: {place}: is longer than {LONGEST_LINE} bytes; write one row a line")
            if line.strip():
                yield place, _parsed(line, place)


def _parsed(line: bytes, place: str) -> Any:
    try:
        return parse_json(line)
    except ValueError as error:
        raise RowError(f"data: {place}: is not a JSON object ({_where(error)})", error) from error


def _where(error: ValueError) -> str:
    """Return what is wrong with a JSON text, without its content."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is no UTF-8"
    return "a key stands twice, a number is too long or not finite, or it is nested too deeply"


def json_list(path: Path) -> Iterator[Placed]:
    """Yield the rows of a JSON list, or of JSON lines where the file begins with no `[`."""
    with _open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        buffer = text.read(2**16).lstrip()
        if buffer.startswith("["):
            yield from _items(text, buffer[1:], path)
            return
    yield from lines(path)


def _items(text: io.TextIOWrapper, buffer: str, path: Path) -> Iterator[Placed]:
    """Yield the items of a list from a stream; `buffer` is what has been read of it after the bracket."""
    number, more, ended = 1, True, False  # ended: an item, so that a comma or the bracket must follow
    while True:
        buffer, place = buffer.lstrip(), f"{path}, row {number}"
        if ended and buffer[:1] == ",":
            buffer, ended = buffer[1:], False
            continue
        if buffer[:1] == "]":
            return
        if ended and buffer:
            raise RowError(f"data: {place}: no comma stands before it", buffer[:200])
        try:
            value, end = first_json(buffer)
            if more and end == len(buffer):
                raise json.JSONDecodeError("a number may go on", buffer, end)
        except ValueError as error:
            if not more or len(buffer) > LONGEST_LINE or not isinstance(error, json.JSONDecodeError):
                raise RowError(f"data: {place}: is not a JSON object ({_where(error)})", error) from error
            part = text.read(max(2**16, len(buffer)))
            buffer, more = buffer + part, bool(part)
            continue
        yield place, value
        buffer, number, ended = buffer[end:], number + 1, True


def table(path: Path) -> Iterator[Placed]:
    """Yield the rows of a .csv or .tsv; the first line names the fields, and every value is a text."""
    csv.field_size_limit(LONGEST_LINE)
    separator = "\t" if _ending(path) == ".tsv" else ","
    with _open(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=separator, strict=True)
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise UserError(f"data: {path}, line 1: names a field twice; the first line must name the fields")
        for number, values in enumerate(filter(None, reader), start=1):
            place = f"{path}, row {number} (line {reader.line_num})"
            if len(values) != len(names):
                raise RowError(f"data: {place}: has {len(values)} values, the first line {len(names)} names", values)
            yield place, dict(zip(names, values, strict=True))


def parquet(path: Path) -> Iterator[Placed]:
    """Yield the rows of a .parquet file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield from _of_batches(file.iter_batches(BATCH), f"{path}, row ")


def arrow(path: Path) -> Iterator[Placed]:
    """Yield the rows of a .arrow file, in the form of a stream, which `datasets` writes, or of a file."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            batches: Any = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:
            file = pa.ipc.open_file(source)
            batches = (file.get_batch(number) for number in range(file.num_record_batches))
        yield from _of_batches(batches, f"{path}, row ")


def _of_batches(batches: Any, place: str) -> Iterator[Placed]:
    number = 0
    for batch in batches:
        for start in range(0, len(batch), BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"{place}{number}", row


READERS = {
    ".jsonl": lines,
    ".ndjson": lines,
    ".json": json_list,
    ".csv": table,
    ".tsv": table,
    ".parquet": parquet,
    ".arrow": arrow,
}


def _saved(path: Path, split: str) -> Iterator[Placed]:
    """Yield the rows of a folder that `datasets` saved; of one with several splits the one of this name."""
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(path))
    except Exception as error:  # it reads a format of several files, and raises anything
        raise UserError(f"data: {path} cannot be loaded ({type(error).__name__}); save it again") from error
    if not isinstance(found, Dataset):
        names = [name for name in SPLITS.get(split, (split,)) if name in found]
        if not names:
            raise UserError(
                f"data: {path}: has the splits {', '.join(found)}; name a folder of one, such as {path}/..."
            )
        found, path = found[names[0]], path / names[0]
    yield from _of_dataset(found, f"{path}, row ")


def _of_dataset(dataset: Any, place: str) -> Iterator[Placed]:
    yield from _of_batches(dataset.with_format("arrow").iter(BATCH), place)


def _hub(name: str, split: str) -> Iterator[Placed]:
    """Yield the rows of `OWNER/NAME[/SUBSET][@SPLIT]`."""
    # imported here: the hub is used only when the config asks for it
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    name, _, named_split = name.partition("@")
    split = named_split or split
    *whole, subset = name.split("/") if name.count("/") == 2 else (name, "")
    try:
        dataset = load_dataset("/".join(whole), *([subset] if subset else []), split=split)
    except DatasetGenerationError as error:  # quotes what could not be parsed
        raise RowError(
            f"data: hub:{name}@{split} holds rows that cannot be read ({type(error).__name__})", error
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"data: hub:{name}@{split} cannot be loaded: {message}") from error
    yield from _of_dataset(dataset, f"hub:{name}@{split}, row ")
