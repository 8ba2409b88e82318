"""Figures of many clients, by budget, by hand; and the record that is put together again."""

import json

from tests.support import tiny
from ubsmoe_ds.checkpoint.progress import Record
from ubsmoe_ds.federation.budgets import budget_rows, by_budget, read_records, sums_up
from ubsmoe_ds.federation.monitor import Monitor
from ubsmoe_ds.launching.run_folder import open_run_folder


def population(count: int, **sections):
    clients = [{"budget": budget} for budget in [0.25, 1.0] * (count // 2)]
    return tiny.experiment("unused", clients, groups=[{}], **sections)


def test_scalars_by_budget_by_hand():
    """c0 and c2 have budget 0.25, c1 has 1.0; a group's figure is no client's."""
    scalars = {
        "train_loss/c0": 1.0,
        "train_loss/c2": 4.0,
        "train_loss/c1": 3.0,
        "train/loss": 2.0,
        "seconds_local/g0": 5.0,
        "group/c0": 3,
        "turn/c0": 1,
    }
    summed, of_clients = by_budget({"c0": "b0.25", "c1": "b1", "c2": "b0.25", "c3": "b1"}, scalars)
    assert summed == {
        "train/loss": 2.0,
        "seconds_local/g0": 5.0,
        "train_loss/b0.25": 2.5,
        "train_loss_min/b0.25": 1.0,
        "train_loss_max/b0.25": 4.0,
        "train_loss/b1": 3.0,
        "train_loss_min/b1": 3.0,
        "train_loss_max/b1": 3.0,
    }
    assert of_clients == {
        "c0": {"train_loss": 1.0, "group": 3, "turn": 1},
        "c1": {"train_loss": 3.0},
        "c2": {"train_loss": 4.0},
    }


def test_rows_of_the_table_by_hand():
    rows = [
        {"client": "c0", "budget": 0.25, "k": 2, "loss_after": 1.0, "tokens_per_second": float("nan"), "rounds": 0},
        {"client": "c1", "budget": 1.0, "k": 8, "loss_after": 2.0, "tokens_per_second": 10.0, "rounds": 1},
        {"client": "c2", "budget": 0.25, "k": 2, "loss_after": 3.0, "tokens_per_second": 30.0, "rounds": 3},
    ]
    first, second = budget_rows(rows)
    assert (first["client"], first["k"], first["loss_after"]) == ("2 of b0.25, 3 turns", 2, 2.0)
    assert first["tokens_per_second"] == 30.0  # of the one that was measured
    assert (second["client"], second["loss_after"]) == ("1 of b1, 1 turns", 2.0)


def test_a_record_of_many_clients_is_split_and_read_back(tmp_path):
    exp = population(10).model_copy(update={"output": str(tmp_path)})
    assert (
        sums_up(exp) and not sums_up(population(8)) and not sums_up(tiny.experiment("unused", [{"budget": 1.0}] * 10))
    )
    metrics = {"exchange/megabytes": 1.0, "steps/c0": 2, "steps/c1": 3}
    seconds = {"seconds/round": 2.0, "seconds_local/c0": 0.5}
    first = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"))
    for number in range(3):
        first.round(Record(number, metrics, seconds, None))
    first.close()
    lines = [json.loads(line) for line in (exp.run_dir / "clients.jsonl").read_text().splitlines()]
    assert [(line["round"], line["client"]) for line in lines] == [(n, c) for n in range(3) for c in ("c0", "c1")]
    assert "steps/c0" not in (exp.run_dir / "metrics.jsonl").read_text()
    found = read_records(exp, exp.run_dir)
    assert all(metrics.items() <= record["metrics"].items() for record in found)
    assert all(seconds.items() <= record["seconds"].items() for record in found)
    resumed = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"), resume_at=1)
    assert len((exp.run_dir / "clients.jsonl").read_text().splitlines()) == 2
    resumed.close()
