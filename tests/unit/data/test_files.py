"""Files of rows of every kind hold the same rows; what cannot be read is one line that names file and row."""

import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.paths import check_source
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import files
from ubsmoe_ds.data.files import raw_rows

ROWS = [{"prompt": f'Grüße {n}, "zwei"\n', "completion": f" {n} ✓"} for n in range(600)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
COMMAS = "prompt,completion\r\n" + "".join(
    f'"{r["prompt"]}"'.replace('"zwei"', '""zwei""') + f",{r['completion']}\r\n" for r in ROWS
)


def zstd(data):
    with pa.BufferOutputStream() as sink:
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()


def arrow_stream(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def arrow_file(path):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


WRITERS = {
    "rows.jsonl": lambda path: path.write_bytes(LINES),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "rows@home.ndjson": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n\r\n")),
    "list.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "bom.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "lines.json": lambda path: path.write_bytes(LINES),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES)),
    "rows.JSONL.zst": lambda path: path.write_bytes(zstd(LINES)),
    "list.json.zst": lambda path: path.write_bytes(zstd(json.dumps(ROWS).encode())),
    "rows.csv": lambda path: path.write_bytes(COMMAS.encode()),
    "bom.csv.gz": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + COMMAS.encode())),
    "rows.tsv": lambda path: path.write_bytes(
        COMMAS.replace(",completion", "\tcompletion")
        .replace(', ""', "\0")
        .replace('",', '"\t')
        .replace("\0", ', ""')
        .encode()
    ),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=70),
    "stream.arrow": arrow_stream,
    "file.arrow": arrow_file,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_from_every_kind_of_file(name, tmp_path):
    path = tmp_path / name
    WRITERS[name](path)
    source = check_source(str(path), synthetic=False)
    found = list(raw_rows(source, "train"))
    assert [row for _, row in found] == ROWS
    assert all(name in place for place, _ in found) and len({place for place, _ in found}) == len(ROWS)
    if name == "splits":
        assert [row for _, row in raw_rows(source, "test")] == ROWS[:2]
        assert [row for _, row in raw_rows(f"{path}/test", "train")] == ROWS[:2]


def test_several_files_are_read_in_the_order_of_their_names(tmp_path):
    for name, part in (("b.jsonl", ROWS[2:4]), ("a.json", ROWS[:2]), ("notes.txt", ROWS[:1])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    folder = [row for _, row in raw_rows(str(tmp_path), "train")]
    pattern = [row for _, row in raw_rows(f"{tmp_path}/?.js*", "train")]
    listed = [row for _, row in raw_rows([f"{tmp_path}/a.json", f"jsonl:{tmp_path}/b.jsonl"], "train")]
    assert folder == pattern == listed == ROWS[:4]
    (tmp_path / "[a].jsonl").write_text(json.dumps(ROWS[5]))
    assert [row for _, row in raw_rows(f"{tmp_path}/[a].jsonl", "train")] == [ROWS[5]], "a file of this very name"


def test_a_list_that_comes_in_pieces(tmp_path, monkeypatch):
    """Numbers, texts and blanks that a piece of the file cuts."""
    path = tmp_path / "rows.json"
    path.write_text("[ " + " ,\n".join(json.dumps({"n": 10**n, "text": "é" * n}) for n in range(60)) + "\n]\n ")
    expected = json.loads(path.read_text())
    monkeypatch.setattr(files, "PIECE", 3)
    assert [row for _, row in raw_rows(str(path), "train")] == expected


BAD = {
    "no.jsonl": (None, "no.jsonl cannot be read (No such file or directory); check the path"),
    "cut.json": (b'[{"a": 1}, {"a": ', "cut.json, row 2: is not a JSON object (column 7)"),
    "comma.json": (b'[{"a": 1} {"a": 2}]', "comma.json, row 2: no comma stands before it"),
    "open.json": (b'[{"a": 1}', "open.json, row 2: is not a JSON object (column 1)"),
    "twice.json": (b'[{"a": 1, "a": 2}]', "twice.json, row 1: is not a JSON object (a key stands twice"),
    "latin.jsonl": ('{"a": "é"}'.encode("latin-1"), "latin.jsonl, line 1: is not a JSON object (byte 8 is no UTF-8)"),
    "latin.csv": (b"a,b\n1,2\n3,\xe9\n", "latin.csv, after row 0: is no UTF-8"),
    "wide.csv": (b"a,b\n1,2\n3,5ecret,5\n", "wide.csv, row 2 (line 3): has 3 values, the first line 2 names"),
    "quote.csv": (b'a,b\n1,"5ecret\n', "quote.csv, row 1: is no row of a table (unexpected end of data)"),
    "twice.csv": (b"a,a\n1,2\n", "twice.csv, line 1: names a field twice"),
    "not.parquet": (b"5ecret", "not.parquet, after row 0: cannot be read (ArrowInvalid)"),
    "not.arrow": (b"5ecret", "not.arrow, after row 0: cannot be read (ArrowInvalid)"),
    "not.jsonl.gz": (b"5ecret", "not.jsonl.gz cannot be read (BadGzipFile: it is damaged); check the path"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "cut.jsonl.gz cannot be read (EOFError: it is damaged)"),
    "not.jsonl.zst": (b"5ecret", "not.jsonl.zst cannot be read (OSError: it is damaged)"),
    "none*.jsonl": (None, "none*.jsonl: no file fits this pattern; check the path"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_line(name, tmp_path):
    data, expected = BAD[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(raw_rows(str(tmp_path / name), "train"))
    assert expected in str(caught.value) and "5ecret" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_rows_and_a_split_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"the folder has no file of rows \(.jsonl"):
        list(raw_rows(str(tmp_path), "train"))
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(ROWS[:2])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="has the splits dev; name a folder of one"):
        list(raw_rows(str(tmp_path / "saved"), "train"))
    (tmp_path / "saved" / "dev" / "state.json").write_text("{")
    with pytest.raises(UserError, match="dev cannot be loaded .JSONDecodeError.; save it again"):
        list(raw_rows(str(tmp_path / "saved" / "dev"), "train"))


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:rows", ("rows", None, "train")),
        ("hub:org/rows", ("org/rows", None, "train")),
        ("hub:org/rows@dev[:5%]", ("org/rows", None, "dev[:5%]")),
        ("hub:org/rows/de", ("org/rows", "de", "train")),
        ("hub:org/rows/de@test", ("org/rows", "de", "test")),
    ],
)
def test_a_data_set_of_the_hub_has_subset_and_split(source, asked, monkeypatch):
    found = []

    def load_dataset(name, subset=None, *, split):
        found.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS[:2])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [row for _, row in raw_rows(DataConfig(source=source).source, "train")] == ROWS[:2] and found == [asked]
