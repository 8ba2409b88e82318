"""Many rows in a mapped file: the same run as from memory, and what a rank holds of it."""

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.ranks import REPO
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data import row_table, shares, stored, stored_examples, synthetic
from ubsmoe_ds.data.batches import Example
from ubsmoe_ds.data.encoding import read_encoder
from ubsmoe_ds.data.lengths import Lengths
from ubsmoe_ds.data.shares import check_rows, common_rows
from ubsmoe_ds.data.stored import StoredRows
from ubsmoe_ds.data.stored_examples import StoredExamples

DATA = REPO / "tests" / "data"
CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}]"


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in synthetic.rows(600, seed=4)))
    return path


def experiment(*overrides):
    return load_experiment(REPO / "ds_configs" / "tiny.yaml", [CLIENTS, *overrides])


@pytest.mark.parametrize(("name", "length"), [("questions", 90), ("messages", 200), ("text", 60)])
def test_a_run_from_a_file_is_the_run_from_memory(name, length, questions, tmp_path, monkeypatch):
    """Digest, shares, evaluation rows, counts and steps are equal where no row is too long."""
    monkeypatch.setattr(stored, "BATCH", 100)
    other = tmp_path / "dev.jsonl"
    source = questions if name == "questions" else DATA / f"{name}.jsonl"
    other.write_text("".join(source.read_text().splitlines(keepends=True)[3:40]))
    for evaluation in ([], [f"data.eval_source={other}"]):
        exp = experiment(f"data.source={source}", "data.eval_fraction=0.3", f"data.max_length={length}", *evaluation)
        encoder, found = read_encoder(exp), []
        for limit in (2**20 * 64, 1000):
            monkeypatch.setattr(row_table, "IN_MEMORY", limit)
            common = common_rows(exp)
            rows = common.of_client(1)
            examples, lengths = encoder.encode(rows, "b")
            assert isinstance(rows, StoredRows) == isinstance(examples, StoredExamples) == (limit == 1000)
            steps = [step.micro[0] for step in islice(encoder.steps(examples, 1, exp.clients[1]), 12)]
            found.append((common, [*rows], [row.place for row in rows], [*examples], lengths, steps))
        (first, *kept), (second, *again) = found
        assert first.digest == second.digest and first.evaluation == second.evaluation
        assert [part.tolist() for part in first.shares] == [part.tolist() for part in second.shares]
        assert first.unused == second.unused and kept[:-1] == again[:-1]
        for one, other_step in zip(kept[-1], again[-1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one[:4], other_step[:4], strict=True))


def test_a_row_that_is_too_long_gives_way_to_the_next_that_fits(monkeypatch):
    """Rows 2 and 3 of five are too long; numbers are estimated from the first four: half of them fit, one is cut."""
    rows = [{"n": n} for n in range(5)]

    def encode(part):
        return [(None if row["n"] in (2, 3) else Example([row["n"]], [1]), row["n"] == 1) for row in part]

    examples = StoredExamples(rows, encode)
    assert [example.prompt for example in examples.take([0, 2, 3, 1])] == [[0], [4], [4], [1]]
    assert examples[4].prompt == [4] and len(examples) == 5 and examples.lengths() == Lengths(3, 1, 2)
    monkeypatch.setattr(stored_examples, "SAMPLE", 4)
    assert examples.lengths() == (round(2 * 5 / 4), round(5 / 4), 5 - round(2 * 5 / 4))


def test_a_bad_row_far_down_is_named_and_nothing_is_left(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "IN_MEMORY", 1000)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with questions.open("a") as file:
        file.write('{"task": "t"}\n')
    exp = experiment(f"data.source={questions}")
    check_rows(exp)  # reads the first rows alone
    with pytest.raises(UserError, match="rows.jsonl, line 601: field 'id' is missing"):
        common_rows(exp)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_file_has_no_name_once_it_is_mapped(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(row_table, "IN_MEMORY", 1000)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows = common_rows(experiment(f"data.source={questions}")).of_client(0)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"] and rows[0]["task"] in synthetic.TASKS
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert any(f"{tmp_path}/ubsmoe_ds-" in line and "(deleted)" in line for line in maps)


def test_a_full_disk_is_one_line(questions, monkeypatch):
    monkeypatch.setattr(row_table, "IN_MEMORY", 1000)

    def full(path, fields, records):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(row_table, "write_table", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device.; free space there or choose"):
        common_rows(experiment(f"data.source={questions}"))


def test_rows_of_a_file_are_selected_by_place(questions, monkeypatch):
    monkeypatch.setattr(row_table, "IN_MEMORY", 1000)
    rows = common_rows(experiment(f"data.source={questions}")).training.rows
    assert [*rows.select(np.array([5, 2, 7]))] == [rows[5], rows[2], rows[7]] and [*rows[1:3]] == [rows[1], rows[2]]
    assert shares.has_sites(experiment().clients) is False
