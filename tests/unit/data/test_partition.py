"""Rows dealt by a label, by length, by whose they are, and again until each client has enough."""

import json

import numpy as np
import pytest

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data.partition import deal, partition
from ubsmoe_ds.data.row_table import read_table
from ubsmoe_ds.data.stored import Alone


def clients(*shares, names="abcdef"):
    return [ClientConfig(name=name, budget=1.0, share=float(share)) for name, share in zip(names, shares, strict=False)]


def dealt(path, rows, who, **data):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(source=str(path), **data)
    table = read_table(str(path), config, "train", 0, Alone())
    shares, notes = deal(table, who, config, 0)
    return [[table.rows[number] for number in share] for share in shares], notes


def test_labels_of_a_column_are_dealt(tmp_path):
    rows = [{"text": f"text {n}", "topic": n % 4} for n in range(80)]
    shares, notes = dealt(tmp_path / "rows.jsonl", rows, clients(1, 1), partition="by_task", label_column="topic")
    assert [{row["group"] for row in share} for share in shares] == [{"0", "2"}, {"1", "3"}] and not notes
    by_hand = partition([str(n % 4) for n in range(80)], clients(1, 1), DataConfig(alpha=0.1), 0).shares
    shares, _ = dealt(tmp_path / "rows.jsonl", rows, clients(1, 1), alpha=0.1, label_column="topic")
    assert [len(share) for share in shares] == [len(share) for share in by_hand]


def test_rows_without_tasks_are_dealt_by_length(tmp_path):
    """With a small alpha nearly every bin goes to one client: lengths of one client come in whole tenths."""
    rows = [{"text": "x" * (n + 1)} for n in range(100)]
    (first, second), notes = dealt(tmp_path / "rows.jsonl", rows, clients(1, 1), alpha=0.001)
    assert notes == ["note: data.partition: rows have no tasks, so dirichlet deals 10 bins of their lengths"]
    bins = [{(len(row["completion"]) - 1) // 10 for row in share} for share in (first, second)]
    assert len(first) + len(second) == 100 and not bins[0] & bins[1] and bins[0] | bins[1] == set(range(10))
    with pytest.raises(UserError, match="data.partition: by_task, but all rows have the same task; set data.label_col"):
        dealt(tmp_path / "rows.jsonl", rows, clients(1, 1), partition="by_task")


def test_values_of_a_client_column_are_names_or_dealt_as_wholes(tmp_path):
    """a has its own 3 rows; of the others w (9 rows) goes to b, x (4) to a, y (2) to a, z (1) to a: 9 rows for b, then
    3 + 4 + 2 against 9 is a draw, which the first wins. With shares 1 : 4, x against 3 and 9 / 4 goes to b, y against 3
    and 13 / 4 to a, z to b."""
    owners = ["a"] * 3 + ["w"] * 9 + ["x"] * 4 + ["y"] * 2 + ["z"]
    rows = [{"text": f"text {n}", "hospital": owner} for n, owner in enumerate(owners)]
    natural = {"partition": "by_client", "client_column": "hospital"}
    shares, _ = dealt(tmp_path / "rows.jsonl", rows, clients(1, 1), **natural)
    assert [{row["owner"] for row in share} for share in shares] == [{"a", "x", "y", "z"}, {"w"}]
    weighted, _ = dealt(tmp_path / "rows.jsonl", rows, clients(1, 4), **natural)
    assert [{row["owner"] for row in share} for share in weighted] == [{"a", "y"}, {"w", "x", "z"}]
    with pytest.raises(UserError, match="clients: 'f' would get none of the 19 rows .share 1, partition by_client"):
        dealt(tmp_path / "rows.jsonl", rows, clients(1, 1, 1, 1, 1, 1), **natural)


def test_dirichlet_is_drawn_again_until_each_client_has_enough():
    tasks, who = ["a"] * 60 + ["b"] * 60, clients(1, 1, 1)
    config = DataConfig(alpha=0.2, min_rows=35)
    first = partition(tasks, who, DataConfig(alpha=0.2), 0).shares
    assert min(map(len, first)) < 35, "the first draw would not do"
    shares, (note,) = partition(tasks, who, config, 0)
    assert min(map(len, shares)) >= 35 and sorted(np.concatenate(shares)) == list(range(120))
    assert "dirichlet was drawn " in note and note.endswith("times, until each client had data.min_rows=35")
    assert [s.tolist() for s in shares] == [s.tolist() for s in partition(tasks, who, config, 0).shares]
    with pytest.raises(
        UserError, match="would get .* of the 120 rows, fewer than data.min_rows 41 .*; raise its share"
    ):
        partition(tasks, who, DataConfig(alpha=0.2, min_rows=41), 0)


def test_a_row_without_the_value_that_it_is_dealt_by_is_refused(tmp_path):
    rows = [{"text": "one", "topic": "x"}, {"text": "5ecret", "topic": None}]
    with pytest.raises(
        UserError, match="rows.jsonl, line 2: field 'topic', by which rows are dealt, is missing"
    ) as caught:
        dealt(tmp_path / "rows.jsonl", rows, clients(1), label_column="topic")
    assert "5ecret" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [{"partition": "by_client"}, {"client_column": "who", "source": "rows.jsonl"}, {"label_column": "topic"}],
)
def test_keys_that_need_each_other(data):
    with pytest.raises(ValueError, match="go together; set both|leave them out for synthetic"):
        DataConfig(**data)
