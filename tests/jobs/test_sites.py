"""Clients whose rows stay at their site: the same run as with the same rows of one file."""

import pytest

from tests.support.jobs import records, train
from tests.support.sites import NAMES, write_sites


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_sites(tmp_path_factory.mktemp("sites"))


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
