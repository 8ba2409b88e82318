"""Whole jobs on CUDA: two clients on one device, stopped and resumed; a client of two devices in every layout."""

import json
import sys

import pytest
import torch

from tests.support.jobs import NOT_FORKED, Job, records, train

SIZES = ["train.rounds=3", "train.local_steps=3", "data.rows=200", "data.eval_rows=24", "checkpoint.keep=9"]
TWO_CLIENTS = ["clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0}]", "oversubscribe=true"]
ON_CUDA = NOT_FORKED | {"DS_ACCELERATOR": "cuda"}


def losses(folder) -> list[float]:
    """Return the weighted evaluation loss of each round."""
    return [record["metrics"]["eval/loss_weighted"] for record in records(folder / "tiny")]


def trained(folder, accelerator: str, *overrides: str) -> list[float]:
    """Run a job and return its losses."""
    code, output = train(*SIZES, *overrides, f"output={folder}", f"accelerator={accelerator}", **NOT_FORKED)
    assert code == 0 and f"({accelerator})" in output, output
    return losses(folder)


@pytest.fixture(scope="module")
def whole(device, tmp_path_factory):
    """Two clients of one rank each share the first device, in two NCCL worlds."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(folder, "cuda", *TWO_CLIENTS)


def test_two_clients_train_as_on_the_cpu(whole, tmp_path):
    """Near: PG draws tokens from the device's own generator, and sums have another order."""
    folder, on_device = whole
    on_cpu = trained(tmp_path, "cpu", *TWO_CLIENTS)
    assert on_device[0] == pytest.approx(on_cpu[0], rel=1e-3)
    assert on_device[-1] == pytest.approx(on_cpu[-1], rel=0.03) and on_device[-1] < on_device[0]
    summary = json.loads((folder / "tiny" / "summary.json").read_text())
    assert all(client["peak_memory_gb"] > 0 for client in summary["clients"])


def test_a_stopped_job_goes_on(whole, tmp_path):
    """Stopped within the second round; the same bits are promised for CPUs only."""
    command = [sys.executable, "tests/support/failing_train.py", *SIZES, *TWO_CLIENTS, f"output={tmp_path}"]
    job = Job([*command, "accelerator=cuda"], tmp_path / "log", UBSMOE_DS_FAULT="slow@1", **ON_CUDA)
    job.wait_for("round   1/3", 300)
    job.process.terminate()
    assert job.end(120) == 75, job.output
    resumed = trained(tmp_path, "cuda", *TWO_CLIENTS, "--resume", "auto")
    assert resumed == pytest.approx(whole[1], rel=0.01)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices here")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_a_client_of_two_devices_trains_as_on_the_cpu(expert_parallel, stage, tmp_path):
    client = f"clients=[{{name: a, budget: 0.5, ranks: 2, expert_parallel: {expert_parallel}}}]"
    overrides = [client, f"deepspeed.zero_optimization.stage={stage}", "deepspeed.bf16.enabled=true"]
    first, second = (trained(tmp_path / name, name, *overrides) for name in ("cuda", "cpu"))
    assert first == pytest.approx(second, rel=0.03)
