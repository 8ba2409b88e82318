"""Fuzz of rows: all formats, files of all kinds with damage, and paths to them that lead to anything."""

import gzip
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from tests.soak.fuzz_cases import DAMAGES, TEXTS, VALUES, Surface, damaged, mutations, reads_only
from ubsmoe_ds.config.formats import AUTO, CLOZE, FORMATS
from ubsmoe_ds.data.schema import content, question_of, whole_text
from ubsmoe_ds.data.sources import evaluation_rows

ROW = {
    "task": "t",
    "id": "1",
    "instruction": "Which?",
    "answer": "the correct answer is b",
    "question": "Which?",
    "choices": ["one", "two"],
    "labels": ["a", "b"],
    "label": 1,
}
GOOD = json.dumps(ROW).encode()
LINES = [
    b"",
    b"   ",
    b"\r",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"\x00",
    GOOD[:-1],
    GOOD + GOOD,
    GOOD[:-1] + b', "label": 0}',
    GOOD[:-1] + b', "more": NaN}',
    GOOD[:-1] + b', "more": ' + b"9" * 6000 + b"}",
    GOOD.replace(b": 1}", b": true}"),
    GOOD.replace(b": 1}", b": NaN}"),
    GOOD.replace(b": 1}", b": 1e999}"),
    GOOD.replace(b": 1}", b": -1}"),
    GOOD.replace(b"Which?", b"\\ud800"),
    GOOD.replace(b"Which?", b"\\u0000"),
    GOOD.replace(b"Which?", b"W" * 2**20),
    GOOD.replace(b"Which?", b"W" * 2**25),
    b"[" * 100_000,
    b"x" * 2**25,
    b'{"task": ' * 5000 + b"1" + b"}" * 5000,
]


def _read(path: Path) -> None:
    source = f"jsonl:{path}"
    for form in ("instruction", "cloze"):
        for row in evaluation_rows(source, None, 0, form):
            json.dumps(row, allow_nan=False).encode()
            "".join(map(str, (row["task"], row["instruction"], row["answer"], *row["labels"]))).encode()


def check_lines(lines: list[bytes], folder: Path) -> bool:
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    return reads_only(lambda: _read(folder / "rows.jsonl"), folder, ["rows.jsonl"])


def check_row(row: Any, folder: Path) -> bool:
    return check_lines([json.dumps(row).encode()], folder)


def check_path(name: str, folder: Path) -> bool:
    """Check a path that leads to nothing, a folder, a pipe, a device, or a link."""
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "rows").write_bytes(GOOD)
    for link, target in {"link": "rows", "loop": "loop", "dead": "nothing", "to_pipe": "pipe"}.items():
        (folder / link).symlink_to(target)
    path = name if name.startswith("/") else f"{folder}/{name}"
    return reads_only(lambda: evaluation_rows(f"jsonl:{path}", None, 0), folder, ["data"])


def check_format(row: Any, folder: Path) -> bool:
    """Check a row of some format: read as it is recognised, as each format, and as a cloze."""
    (folder / "rows.jsonl").write_bytes(json.dumps(row).encode())

    def read(form: str) -> bool:
        return reads_only(lambda: _use(evaluation_rows(f"{folder}/rows.jsonl", None, 0, form)), folder, ["rows.jsonl"])

    return any([read(form) for form in (AUTO, CLOZE, *FORMATS)])


def _use(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        "".join([question_of(row), whole_text(row), row["task"], row["id"], *content(row)]).encode()


def check_file(case: tuple[str, tuple], folder: Path) -> bool:
    """Check a damaged file of a kind."""
    name, damage = case
    (folder / name).write_bytes(damaged(_whole(name), *damage))
    return reads_only(lambda: _use(evaluation_rows(f"{folder}/{name}", None, 0)), folder, ["data"])


@cache
def _whole(name: str) -> bytes:
    """Return a file of 20 rows."""
    rows = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(20)]
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    sink = pa.BufferOutputStream()
    if name.endswith(".parquet"):
        pq.write_table(table, sink)
    elif name.endswith(".arrow"):
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(lines)
    elif name.endswith(".gz"):
        return gzip.compress(lines)
    elif name.endswith(".csv"):
        return b"prompt,completion\n" + b"".join(f"{n} + 1 =, {n + 1}\n".encode() for n in range(20))
    else:
        return json.dumps(rows).encode()
    return sink.getvalue().to_pybytes()


EXAMPLES = [dict(row.example) for row in FORMATS.values()]
FILES = ["rows.json", "rows.csv", "rows.jsonl.gz", "rows.jsonl.zst", "rows.parquet", "rows.arrow"]
PATHS = ["folder", "pipe", "link", "loop", "dead", "to_pipe", "rows/below", "rows", "x" * 300, "a\x00b", "a\nb"]
DEVICES = ["/dev/zero", "/dev/null", "/dev/full", "/dev/tty", "/", "/proc/self/mem"]
LINE = st.one_of(
    st.just(GOOD),
    st.sampled_from(LINES),
    st.binary(max_size=20),
    DAMAGES.map(lambda how: damaged(GOOD, *how)),
)
SURFACES = [
    Surface("row", mutations(ROW, most=2, values=st.one_of(VALUES, TEXTS)), check_row, share=1.5),
    Surface("rows", st.lists(LINE, max_size=4), check_lines, share=1),
    Surface("format", st.sampled_from(EXAMPLES).flatmap(mutations), check_format),
    Surface("rows_file", st.tuples(st.sampled_from(FILES), DAMAGES), check_file, share=0.5),
    Surface("rows_path", st.one_of(st.sampled_from(PATHS + DEVICES), TEXTS), check_path, share=0.2),
]
