"""The record of a run, across the jobs that it was resumed by."""

import json

from tests.support import tiny
from ubsmoe_ds.checkpoint.progress import Record
from ubsmoe_ds.federation.monitor import Monitor
from ubsmoe_ds.federation.roster import Lost
from ubsmoe_ds.launching.run_folder import open_run_folder


def record_rounds(monitor: Monitor, numbers: range) -> None:
    for number in numbers:
        monitor.round(Record(number, {"exchange/megabytes": 1.0, "steps/a": number}, {"seconds/round": 2.0}, None))


def test_records_are_of_all_jobs_of_a_run(tmp_path):
    """Rounds 0 to 2, then a checkpoint of round 1 is resumed: its job records rounds 2 and 3."""
    exp = tiny.experiment("unused", [{"budget": 1.0}]).model_copy(update={"output": str(tmp_path)})
    first = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"))
    record_rounds(first, range(3))
    first.close()
    resumed = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"), resume_at=2)
    assert [record["round"] for record in resumed.records()] == [0, 1]
    record_rounds(resumed, range(2, 4))
    assert [record["metrics"]["steps/a"] for record in resumed.records()] == [0, 1, 2, 3]
    assert {record["run_id"] for record in resumed.records()} == {"an id"}
    assert json.loads((exp.run_dir / "config.json").read_text())["run_id"] == "an id"


def test_clients_of_a_round_without_a_record_are_written_again(tmp_path):
    """The first rank died between the two files of round 2; another one goes on with round 3, and has the record."""
    exp = tiny.experiment("unused", [{"budget": 1.0}] * 9, groups=[{}]).model_copy(update={"output": str(tmp_path)})
    first = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"))
    for number in range(3):
        first.round(Record(number, {"exchange/megabytes": 1.0, "steps/c4": number}, {"seconds/round": 2.0}, None))
    first.close()
    lines = (exp.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (exp.run_dir / "metrics.jsonl").write_text("".join(lines[:2]))
    other = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"), resume_at=3)
    assert other.latest == 1
    other.round(Record(2, {"exchange/megabytes": 1.0, "steps/c4": 2}, {"seconds/round": 2.0}, None))
    lines = [json.loads(line) for line in (exp.run_dir / "clients.jsonl").read_text().splitlines()]
    assert [(line["round"], line["metrics"]["steps"]) for line in lines] == [(0, 0), (1, 1), (2, 2)]


def test_a_pseudo_gradient_that_outweighs_the_real_one_gets_one_line_a_client(tmp_path, capsys):
    exp = tiny.experiment("unused", [{"budget": 1.0}] * 3, pseudo_gradient={"estimator": "linearised", "scale": 0.5})
    exp = exp.model_copy(update={"output": str(tmp_path)})
    monitor = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"))
    monitor.outweighed(4, ["c0", "c1", "c2"], {"pseudo_over_real_norm/c0": 4.7, "pseudo_over_real_norm/c1": 1.0})
    assert capsys.readouterr().out.splitlines() == [
        "warning: round 4: client 'c0' has a pseudo-gradient 4.7 times its real gradient (median of its experts); "
        "lower pseudo_gradient.scale, now 0.5"
    ]


def test_what_deaths_cost_is_named(tmp_path, capsys):
    """A group and its turns; a client that no other group may train; and a client with a group of its own."""
    clients = [{"budget": 1.0, "groups": ["g1"]}, *[{"budget": 1.0}] * 9]
    exp = tiny.experiment("unused", clients, groups=[{}, {}, {}]).model_copy(update={"output": str(tmp_path)})
    monitor = Monitor(exp, "an id", open_run_folder(exp.run_dir, "an id"))
    out = [f"c{number}" for number in range(7)]
    monitor.lost(3, exp.without([1]), Lost(["g1"], ["c0"], out))
    own = tiny.experiment("unused", [{"budget": 1.0}] * 3)
    monitor.lost(3, own.without([2]), Lost(["c2"], [], []))
    sampled = tiny.experiment("unused", [{"budget": 1.0}] * 3, sampling={"clients": 2})
    monitor.lost(4, sampled.without([1]), Lost(["c1"], [], []))
    assert capsys.readouterr().out.splitlines() == [
        "warning: round 3: group 'g1' is lost (one of its ranks died); 2 groups continue",
        "warning: round 3: c0, c1, c2, c3, c4 and 2 more sit it out: their groups are lost",
        "warning: round 3: client 'c0' is lost (no group that is left may train it)",
        "warning: round 3: client 'c2' is lost (one of its ranks died); 2 clients continue",
        "warning: round 4: client 'c1' is lost (one of its ranks died); 2 clients continue",
    ]
