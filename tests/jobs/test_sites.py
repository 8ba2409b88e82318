"""Clients whose rows stay at their site: the same run as with the same rows of one file."""

import json

import pytest

from tests.support.jobs import records, train
from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import load_rows

NAMES = ("a", "b")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write a file of all rows, one of evaluation rows, and one of each client's share as a job deals it."""
    folder = tmp_path_factory.mktemp("sites")
    rows = synthetic.rows(240, seed=5)
    found = {"all": write(folder / "all.jsonl", rows[40:]), "eval": write(folder / "eval.jsonl", rows[:40])}
    config = DataConfig(source=found["all"], eval_source=found["eval"], partition="dirichlet", eval_rows=24)
    common, _ = load_rows(config, seed=0)
    clients = [ClientConfig(name=name, budget=1.0) for name in NAMES]
    for name, share in zip(NAMES, partition([row["task"] for row in common], clients, config, seed=0), strict=True):
        found[name] = write(folder / f"{name}.jsonl", reversed([common[number] for number in share]))
    return found


def test_the_same_rows_from_sites_are_the_same_run(files, tmp_path):
    found = {}
    for name, sources in (("common", ["null", "null"]), ("sites", [files["a"], files["b"]])):
        clients = ", ".join(
            f"{{name: {n}, budget: {b}, source: {s!r}}}".replace("'null'", "null")
            for n, b, s in zip(NAMES, (0.5, 1.0), sources, strict=True)
        )
        code, output = train(
            f"name={name}",
            f"output={tmp_path}",
            f"clients=[{clients}]",
            f"data.source={files['all'] if name == 'common' else 'synthetic'}",
            f"data.eval_source={files['eval']}",
            "data.eval_rows=24",
            "train.rounds=2",
            "train.local_steps=2",
        )
        assert code == 0, output
        found[name] = [record["metrics"] for record in records(tmp_path / name)]
    assert found["common"] == found["sites"]
