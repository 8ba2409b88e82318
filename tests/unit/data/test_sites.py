"""Clients whose rows stay at their site: read by nobody else."""

import json
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from tests.support import tiny
from tests.support.sites import NAMES, write, write_sites
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data.client_rows import client_rows
from ubsmoe_ds.data.site_key import key_of
from ubsmoe_ds.data.sources import digest
from ubsmoe_ds.planning.row_lengths import read_row_lengths


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_sites(tmp_path_factory.mktemp("sites"))


def of_client(exp: Experiment, number: int):
    alone = {"comm": MPI.COMM_SELF, "group_comm": MPI.COMM_SELF, "group_hosts": [["here"]] * len(exp.clients)}
    return client_rows(exp, SimpleNamespace(group=number, rank=0, group_rank=0, hosts=["here"], **alone))


def test_nobody_reads_the_rows_of_another_site(files):
    clients = [{"budget": 1.0, "source": files["a"]}, {"budget": 1.0, "source": "jsonl:/only/at/its/site.jsonl"}]
    exp = tiny.experiment("unused", clients, data={"eval_source": files["eval"]})
    found = of_client(exp, 0)
    assert found.counts[0] == len(found.of_client(0)) > 0
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


def test_nobody_can_test_a_guess_of_a_sites_rows(files, tmp_path, monkeypatch):
    """Whoever has the run and the code, but not the site's key, gets another digest of the right rows."""
    row = json.loads(Path(files["a"].removeprefix("jsonl:")).read_text().splitlines()[0])
    clients = [{"budget": 1.0, "source": write(tmp_path / "one.jsonl", [row])}]
    exp = tiny.experiment("unused", clients, data={"eval_source": files["eval"]})
    rows = of_client(exp, 0)
    guess = digest([[*bytes.fromhex(digest([*rows.of_client(0), *rows.evaluation]))]])
    assert len(rows.of_client(0)) == 1 and guess != rows.digest == of_client(exp, 0).digest
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert of_client(exp, 0).digest != rows.digest
    assert stat.S_IMODE((tmp_path / "another user" / "ubsmoe_ds" / "site.key").stat().st_mode) == 0o600


def test_clients_of_one_site_with_equal_rows_have_different_keys():
    assert key_of("a") == key_of("a") != key_of("b")


def test_a_key_that_cannot_be_kept_secret_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    key_of("a")
    (path,) = (tmp_path / "ubsmoe_ds").iterdir()
    path.chmod(0o640)
    with pytest.raises(UserError, match="XDG_STATE_HOME: .*site.key' may be read by others; remove it"):
        key_of("a")
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(UserError, match="does not hold 32 bytes"):
        key_of("a")
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    with pytest.raises(UserError, match="XDG_STATE_HOME: the key of the site cannot be kept in '/dev/null/ubsmoe_ds"):
        key_of("a")


def test_a_client_is_evaluated_on_rows_of_its_own(files, tmp_path):
    """Its own evaluation rows are left out of its training rows, and at most `max_rows` of these are used."""
    rows = [json.loads(line) for line in Path(files["a"].removeprefix("jsonl:")).read_text().splitlines()]
    own = write(tmp_path / "own.jsonl", [*rows[:5], *({**row, "answer": f"no, {row['answer']}"} for row in rows[5:8])])
    both = {"source": files["a"], "eval_source": own, "max_rows": 7}
    exp = tiny.experiment("unused", [{"budget": 1.0} | both], data={"eval_source": files["eval"], "eval_rows": 20})
    found = of_client(exp, 0)
    assert len(found.evaluation) == 20 and len(found.own_evaluation(0)) == 8
    asked = {(row["instruction"], row["answer"]) for row in found.own_evaluation(0)}
    assert not asked & {(row["instruction"], row["answer"]) for row in found.of_client(0)}
    assert len(found.of_client(0)) == found.counts[0] == 7 and found.left_out == [(5, len(rows) - 5 - 7)]
    alone = of_client(tiny.experiment("unused", [{"budget": 1.0} | both]), 0)
    assert alone.evaluation == [] and alone.own_evaluation(0) == found.own_evaluation(0)
    assert alone.digest != found.digest, "other evaluation rows are other data"
    common = {"budget": 1.0, "eval_source": own}
    dealt = of_client(tiny.experiment("unused", [common], data={"source": files["a"]}), 0)
    assert dealt.left_out[0].evaluated > 0 and len(dealt.own_evaluation(0)) == 8 and dealt.evaluation


def test_the_plan_is_for_the_longest_evaluation_rows(files, tmp_path):
    rows = [json.loads(line) for line in Path(files["a"].removeprefix("jsonl:")).read_text().splitlines()]
    long = [{**rows[0], "id": "long", "instruction": rows[0]["instruction"] * 3}]
    exp = load_experiment(
        "ds_configs/tiny.yaml",
        [
            f"clients=[{{name: a, budget: 1.0, eval_source: {write(tmp_path / 'long.jsonl', long)}}}, "
            "{name: b, budget: 1.0}]",
            f"data.source={files['all']}",
        ],
    )
    first, second = read_row_lengths(exp)
    assert first.eval_length > second.eval_length and first.eval_rows == second.eval_rows + 1


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
