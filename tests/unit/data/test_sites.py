"""Clients whose rows stay at their site: read by nobody else."""

import json
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.client_rows import client_rows
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import load_rows
from ubsmoe_ds.planning.row_lengths import read_row_lengths

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


def of_client(exp: Experiment, number: int):
    return client_rows(exp, SimpleNamespace(client=number, group_rank=0, comm=MPI.COMM_SELF))


def test_nobody_reads_the_rows_of_another_site(files):
    clients = [{"budget": 1.0, "source": files["a"]}, {"budget": 1.0, "source": "jsonl:/only/at/its/site.jsonl"}]
    exp = tiny.experiment("unused", clients, data={"eval_source": files["eval"]})
    found = of_client(exp, 0)
    assert found.counts[0] == len(found.training) > 0
    with pytest.raises(UserError, match="/only/at/its/site.jsonl cannot be read"):
        of_client(exp, 1)


def test_the_plan_reads_the_rows_of_each_site(files):
    """The same rows give the same plan, from sites and dealt from one file."""
    found = []
    for sources in (("null", "null"), (files["a"], files["b"])):
        clients = ", ".join(f"{{name: {n}, budget: 1.0, source: {s}}}" for n, s in zip(NAMES, sources, strict=True))
        data = [f"data.source={files['all']}", f"data.eval_source={files['eval']}", "data.eval_rows=24"]
        exp = load_experiment("ds_configs/tiny.yaml", [f"clients=[{clients}]", *data])
        found.append([of_client._replace(text_bytes=0) for of_client in read_row_lengths(exp)])
    assert found[0] == found[1] and found[0][0] != found[0][1]


def test_other_rows_at_a_site_are_other_data(files):
    digests = set()
    for source in (files["a"], files["b"]):
        exp = tiny.experiment("unused", [{"budget": 1.0, "source": source}], data={"eval_source": files["eval"]})
        digests.add(of_client(exp, 0).digest)
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("sources", "evaluation", "message"),
    [
        (
            ["jsonl:a", None],
            "jsonl:e",
            "c1 have no `source`, but others do; give one to all clients",
        ),
        (["jsonl:a", "jsonl:b"], None, "data.eval_source: must be set if each client has its own `source`"),
    ],
)
def test_half_a_description_is_refused(sources, evaluation, message):
    data = {"eval_source": evaluation} if evaluation else {}
    with pytest.raises(ValueError, match=message):
        tiny.experiment("unused", [{"budget": 1.0, "source": source} for source in sources], data=data)
