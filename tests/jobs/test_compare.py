"""Comparisons as a user starts them: jobs that really run, and what an interruption leaves behind."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.jobs import Job, run
from tests.unit.studies.test_comparison import CONFIG, TWO

REAL = [sys.executable, "launch/compare.py", "--config", CONFIG, "--methods", "topk", "--seeds", "0", "--out"]


SHORT = [TWO, "train.rounds=1", "train.local_steps=1", "data.rows=200", "data.eval_rows=16"]


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


def await_output(process: subprocess.Popen, log: Path, seconds: float = 90.0) -> None:
    """Wait until the job has written the first line of its log, so that its ranks are running."""
    deadline = time.monotonic() + seconds
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
