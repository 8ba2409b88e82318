"""Test the plan's command, and its memory and bytes against runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan import main, read_inputs
from tests.support.jobs import NOT_FORKED, SHORT, TRAIN, TWO_CLIENTS, records, run
from tests.support.ranks import REPO, clean_environment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.planning.group_plan import plan_group
from ubsmoe_ds.planning.memory_model import CPU_KERNELS, CPU_PROCESS, largest_phase
from ubsmoe_ds.planning.plan import plan

CONFIGS = REPO / "ds_configs"


TINY = CONFIGS / "tiny.yaml"


WITHIN = 0.15


LARGE = ["deepspeed.train_batch_size=128", "evaluation.batch_size=32", TWO_CLIENTS]  # the model outweighs the process


def planned(*arguments: str) -> tuple[int, str, str]:
    """Run launch/plan.py; return exit code, output and errors."""
    command = [sys.executable, "launch/plan.py", "accelerator=cpu", "train.rounds=1", *arguments]
    done = subprocess.run(command, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def compare_with_run(folder: Path, overrides: list[str]) -> list[float]:
    """Check the plan of a run on the CPU against what it took; return the measured bytes of each client.

    Ranks must not be forked: forked ones share pages of what is imported, which the plan does not count on.
    """
    summary = json.loads((folder / "summary.json").read_text())["clients"]
    metrics = records(folder)[-1]["metrics"]
    plans = plan(read_inputs(load_experiment(TINY, [*overrides, "accelerator=cpu"])))
    measured = [1e9 * row["peak_memory_gb"] for row in summary]
    for row, peak_bytes, cost in zip(summary, measured, plans, strict=True):
        assert largest_phase(cost.phases)[1] == pytest.approx(peak_bytes, rel=WITHIN), row
        assert cost.sent_bytes / 1e6 == pytest.approx(metrics[f"megabytes_sent/{row['client']}"], rel=0.1)
    return measured


@pytest.mark.extended
def test_memory_and_bytes_are_as_measured(tmp_path):
    """Batches are so large that a plan of the bare process would fail."""
    overrides = [*SHORT, "train.rounds=1", *LARGE]
    code, output = run(sys.executable, TRAIN, *overrides, f"output={tmp_path}", **NOT_FORKED)
    assert code == 0, output
    for measured in compare_with_run(tmp_path / "tiny", overrides):
        assert measured - CPU_PROCESS - CPU_KERNELS > 2 * WITHIN * measured


@pytest.mark.extended
def test_bytes_of_flora_are_as_measured(tmp_path):
    """Clients of unequal LoRA ranks send their own LoRA rank and get the stack of all; so must the plan."""
    overrides = [*SHORT, "train.rounds=1", "method=flora"]
    overrides += ["clients=[{name: a, budget: 0.25}, {name: b, budget: 0.5, ranks: 2}, {name: c, budget: 1.0}]"]
    code, output = run(sys.executable, TRAIN, *overrides, f"output={tmp_path}", **NOT_FORKED)
    assert code == 0, output
    compare_with_run(tmp_path / "tiny", overrides)


@pytest.mark.extended
def test_the_plan_predicts_the_demo(tmp_path):
    code, output = run(sys.executable, TRAIN, *SHORT, f"output={tmp_path}", **NOT_FORKED)
    assert code == 0, output
    compare_with_run(tmp_path / "tiny", SHORT)


def test_command_prints_the_plan_and_where_clients_are(tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("big slots=4\nsmall slots=2\n")
    code, output, errors = planned("--hostfile", str(hostfile), "--device-memory", "8G")
    assert (code, errors) == (0, "")
    assert "straggler: laptop, 1.5" in output and "small: desktop 2" in output
    assert output.count("yes") == 4 and "all kept" in output


REFUSED = {
    "too small": (["--device-memory", "0.3G"], "error: clients.0: 'phone' needs 0.57"),
    "ranks": (["--hosts", "1", "--devices", "4"], "error: clients: need 6 ranks, the hosts have 4 slots"),
    "devices": (["--hosts", "1"], "error: --hosts: goes with --devices"),
    "too long": (["data.max_length=1025"], "error: data.max_length: 1025 exceeds the model's max_position_embeddings"),
    "memory": (["--device-memory", "much"], "error: --device-memory: 'much' is no amount of memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_plan_ends_with_code_2_and_one_line(name, monkeypatch, capsys):
    """In this process, which has imported everything; the command above is a process of its own."""
    arguments, expected = REFUSED[name]
    monkeypatch.setattr(sys, "argv", ["plan.py", "accelerator=cpu", "train.rounds=1", *arguments])
    code, errors = main(), capsys.readouterr().err
    assert code == 2 and errors.startswith(expected) and errors.count("\n") == 1, errors


POPULATION = ["clients=[{count: 6, budgets: [0.25, 1.0]}]", "groups=[{count: 2}]", "sampling={clients: 3}"]


@pytest.mark.extended
@pytest.mark.parametrize("method", ["topk", "hetlora"])
def test_memory_of_groups_is_as_measured(method, tmp_path):
    """Three turns each on two groups: one keeps a sum of its turns, the other each of them."""
    clients = "clients=[{count: 6, budgets: [0.25, 0.5, 1.0]}]"
    overrides = ["train.rounds=1", "train.local_steps=1", "data.rows=800", "data.eval_rows=24", f"method={method}"]
    overrides += [clients, "groups=[{}, {ranks: 2, expert_parallel: 2}]", "deepspeed.train_batch_size=32"]
    code, output = run(sys.executable, TRAIN, *overrides, f"output={tmp_path}", timeout=600, **NOT_FORKED)
    assert code == 0, output
    inputs = read_inputs(load_experiment(TINY, [*overrides, "accelerator=cpu"]))
    metrics = records(tmp_path / "tiny")[-1]["metrics"]
    groups = [int(metrics[f"group/c{client}"]) for client in range(6)]
    rounds = [[[client for client in range(6) if groups[client] == group] for group in (0, 1)]]
    planned_bytes = max(largest_phase(plan_group(inputs, group, rounds).phases)[1] for group in (0, 1))
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text())["clients"]
    assert planned_bytes == pytest.approx(1e9 * max(row["peak_memory_gb"] for row in summary), rel=WITHIN)


@pytest.mark.parametrize("memory", ["8G", "0.1G"])
def test_a_population_is_planned_and_told_which_groups_suit_its_devices(memory, monkeypatch, capsys):
    """Two hosts of two devices: groups of one or two ranks. Nothing fits in 0.1 GB, less than a process needs."""
    options = ["--hosts", "2", "--devices", "2", "--device-memory", memory, "data.rows=400", *POPULATION]
    monkeypatch.setattr(sys, "argv", ["plan.py", "accelerator=cpu", "train.rounds=3", *options])
    code, (output, errors) = main(), capsys.readouterr()
    assert output.startswith("round 1: g0: ") and "all 3 rounds: groups idle " in output
    assert output.count("yes" if memory == "8G" else " no ") == 2  # g0 and g1 have different numbers of turns
    if memory == "8G":
        assert code == 0 and errors == "" and "groups for 4 devices, by the schedules of 3 rounds" in output
        assert "shortest rounds, if all devices are equally fast: groups=[{ranks: " in output
        assert "placement: host1: g0 1, g1 1" in output
    else:
        assert code == 2 and errors.count("\n") == 1
        assert errors.startswith("error: --device-memory: no shape of groups fits in 0.1 GB; the least, of ")
