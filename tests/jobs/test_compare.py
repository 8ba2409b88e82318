"""Comparisons as a user starts them: jobs that really run, and what an interruption leaves behind."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.jobs import Job, records, run, small_model
from tests.unit.studies.test_comparison import CONFIG, TWO

REAL = [sys.executable, "launch/compare.py", "--config", CONFIG, "--methods", "topk", "--seeds", "0", "--out"]


SHORT = [TWO, "train.rounds=1", "train.local_steps=1", "data.rows=200", "data.eval_rows=16", small_model()]


def test_real_comparison_and_again(tmp_path):
    command = [*REAL, str(tmp_path), *SHORT]
    code, output = run(*command)
    assert code == 0, output
    assert output.startswith("[1/1] topk") and len(output.splitlines()) == 2
    poor, rich = csv.DictReader((tmp_path / "results.csv").open())
    assert (poor["k"], rich["k"]) == ("4", "8") and 0 < float(poor["flops_ratio"]) < float(rich["flops_ratio"]) == 1.0
    assert 0 < float(poor["loss"]) < 10 and float(poor["megabytes_sent"]) > 0 and float(rich["local_seconds"]) > 0
    assert [row["round"] for row in csv.DictReader((tmp_path / "rounds.csv").open())] == ["0", "1"]
    written = (tmp_path / "runs" / "topk-seed0" / "summary.json").stat().st_mtime_ns
    code, again = run(*command)
    assert code == 0 and "done before" in again
    assert (tmp_path / "runs" / "topk-seed0" / "summary.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("send", ["SIGINT to the group", "SIGTERM to the process"])
def test_interrupted_comparison_leaves_no_job_behind(send, tmp_path):
    job = Job([*REAL, str(tmp_path), *SHORT, "train.rounds=500"], tmp_path / "log")
    await_output(job.process, tmp_path / "runs" / "topk-seed0.log")
    if send == "SIGINT to the group":
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        job.process.terminate()
    assert job.end(60) == 130
    assert job.output == "error: interrupted; the same command continues where it stopped\n"


POPULATION = [
    "clients=[{count: 10, budgets: [0.25, 0.5, 1.0]}]",
    "groups=[{count: 2}]",
    "sampling={clients: 4}",
    "train.rounds=3",
    "train.local_steps=2",
    "data.rows=400",
    "data.eval_rows=16",
]


@pytest.mark.extended
def test_an_interrupted_comparison_over_a_population_goes_on_to_the_same_results(tmp_path):
    """The first method is stopped when its first round is saved. A run of it alone is the peer."""
    command = [sys.executable, "launch/compare.py", "--config", CONFIG, "--seeds", "0", "--methods"]
    whole = [*command, "flexlora", "topk", "--out", str(tmp_path / "out"), *POPULATION]
    job, log = Job(whole, tmp_path / "log"), tmp_path / "out" / "runs" / "flexlora-seed0.log"
    await_output(job.process, log, seconds=240, text="round   2/3")
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end(60) == 130
    code, output = run(*whole, timeout=600)
    assert code == 0 and "resumed from" in log.read_text(), output
    code, alone = run(*command, "flexlora", "--out", str(tmp_path / "alone"), *POPULATION, timeout=600)
    assert code == 0, alone
    found, peer = (records(tmp_path / folder / "runs" / "flexlora-seed0") for folder in ("out", "alone"))
    assert [record["metrics"] for record in found] == [record["metrics"] for record in peer] and len(found) == 4
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 2 * 10 and all(float(row["loss"]) > 0 for row in rows)
    text = (tmp_path / "out" / "results.md").read_text()
    assert "the clients of each round are the same for all methods of a seed" in text
    table = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(table) == 2 + 2 + 1 and not any(cell in line for line in table for cell in (" - ", "nan"))


def await_output(process: subprocess.Popen, log: Path, seconds: float = 90.0, text: str = "\n") -> None:
    """Wait until a text is in a job's log; a first line says that its ranks are running."""
    deadline = time.monotonic() + seconds
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
