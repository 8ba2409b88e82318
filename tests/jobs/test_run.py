"""Run whole jobs, started as a user starts them."""

import json
import os
import re
import shutil
import signal
import sys

import pytest

from tests.support import tiny
from tests.support.jobs import SHORT, TRAIN, TWO_CLIENTS, Job, records, run, small_model
from tests.support.ranks import REPO, warm_python
from ubsmoe_ds.adapters.adapter import read_adapter
from ubsmoe_ds.models.hub import BUILTIN_MODELS

COMMONSENSE = REPO.parent / "shared" / "data" / "commonsense"
FEW_RANKS = [*SHORT, TWO_CLIENTS, small_model()]
CLIENTS = ("phone", "laptop", "desktop", "server")
LEARNING_RATE = 0.003  # of ds_configs/tiny.json


def test_run_folder_has_its_files_and_their_keys(demo):
    folder, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["client"] for row in summary["clients"]] == ["phone", "laptop", "desktop", "server"]
    assert [row["k"] for row in summary["clients"]] == [2, 4, 6, 8]
    keys = {"client", "budget", "k", "lora_rank", "rows", "weight", "flops_ratio", "peak_memory_gb"}
    keys |= {"tokens_per_second", "seconds_per_step"}
    keys |= {f"{field}_{when}" for field in ("loss", "accuracy") for when in ("before", "after")}
    assert all(set(row) == keys for row in summary["clients"])
    assert all(0.3 < row["peak_memory_gb"] < 1.5 for row in summary["clients"])
    # K 2 4 6 8 forward and backward, the head at answers only; forward alone with the whole head: 0.40 0.60 0.80 1
    ratios = [row["flops_ratio"] for row in summary["clients"]]
    assert ratios == pytest.approx([0.365, 0.577, 0.788, 1.0], abs=2e-3) and ratios[3] == 1.0
    assert all(row["tokens_per_second"] > 0 and row["seconds_per_step"] > 0 for row in summary["clients"])
    rows, kept = summary["rows"]["training"], [row["rows"] for row in summary["clients"]]
    assert [rows[row["client"]]["kept"] for row in summary["clients"]] == kept and min(kept) > 0
    assert [row["weight"] for row in summary["clients"]] == pytest.approx([count / sum(kept) for count in kept])
    assert summary["loss_weighted_after"] == records(folder)[-1]["metrics"]["eval/loss_weighted"]
    assert summary["utilisation_cv_before"] > 0 and summary["utilisation_cv_after"] > 0
    assert [record["round"] for record in records(folder)] == [0, 1, 2]
    config = json.loads((folder / "config.json").read_text())
    assert config["clients"][0]["name"] == "phone"
    ids = {line["run_id"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    assert ids == {read_adapter(folder / "adapter").facts["run_id"]}
    assert ids == {config["run_id"]} == {json.loads((folder / "summary.json").read_text())["run_id"]}


def test_metrics_are_complete_and_plausible(demo):
    folder, _ = demo
    last = records(folder)[-1]
    metrics, seconds = last["metrics"], last["seconds"]
    for client in CLIENTS:
        for name in (
            "eval_loss",
            "eval_accuracy",
            "train_loss",
            "dropped_share",
            "pseudo_over_real_norm",
            "tokens_per_second",
        ):
            where = seconds if name == "tokens_per_second" else metrics
            assert f"{name}/{client}" in where
        assert 0 < metrics[f"eval_loss/{client}"] < 10 and 0 <= metrics[f"eval_accuracy/{client}"] <= 1
        assert metrics[f"pseudo_over_real_norm/{client}"] > 0
        assert (metrics[f"dropped_share/{client}"] > 0) == (client == "laptop")  # the one with a capacity factor
    assert metrics["exchange/megabytes"] > 1
    assert sum(metrics[f"merge_weight/{client}"] for client in CLIENTS) == pytest.approx(1)
    assert {metrics[f"learning_rate/{client}"] for client in CLIENTS} == {LEARNING_RATE}
    parts = ("round", "local", "wait", "exchange", "merge", "evaluation")
    assert all(0 < seconds[f"seconds/{part}"] <= seconds["seconds/round"] for part in parts)
    assert all(f"seconds_{part}/{client}" in seconds for part in parts[1:] for client in CLIENTS)


def heat_maps(folder) -> list[int]:
    """Return the rounds with a heat map of utilisation in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Images("utilisation/layer_by_expert")]


def test_tensorboard_has_scalars_and_heat_maps(demo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(demo[0] / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"eval/loss", "eval_accuracy/phone", "seconds/exchange", "utilisation/cv"} <= set(tags["scalars"])
    assert heat_maps(demo[0]) == [1, 2]
    logged = {record["round"]: record["metrics"]["eval/loss"] for record in records(demo[0])}
    assert {e.step: pytest.approx(e.value, rel=1e-6) for e in events.Scalars("eval/loss")} == logged


def test_output_is_quiet(demo):
    """After the lines of DeepSpeed's launcher there are our lines and nothing else."""
    lines = [line for line in demo[1].splitlines() if line.strip() and not line.startswith("[20")]
    first = "tiny: ub_smoe, 4 clients on 6 ranks"
    table = ("mean loss of clients", "utilisation CV", "client ", *("phone ", "laptop ", "desktop ", "server "))
    ours = (first, "placement: ", "rows (weight): ", "before ", "round ", *table, "written to")
    assert [line for line in lines if not line.startswith(ours)] == []
    assert sum(line.startswith("round ") for line in lines) == 2 and "ETA" in demo[1]


@pytest.mark.extended
def test_a_second_run_is_bit_equal_and_needs_a_new_folder(demo, tmp_path):
    folder, _ = demo
    under_mpi = [*warm_python(), "-m", "mpi4py", TRAIN, *SHORT]
    in_use = [f"output={folder.parent}", "overwrite=false", TWO_CLIENTS]
    code, output = run("mpiexec", "-n", "3", *under_mpi, *in_use)
    assert code == 2 and "already holds a run" in output and output.count("error:") == 1
    code, output = run("deepspeed", TRAIN, *SHORT, f"output={tmp_path}")
    assert code == 0, output
    first, second = records(folder), records(tmp_path / "tiny")
    assert [r["metrics"] for r in first] == [r["metrics"] for r in second]


def test_the_second_example_trains_ten_of_a_hundred_clients(tmp_path):
    """README's population, two short rounds of it: schedule, figures by budget, and each client's own."""
    short = ["train.rounds=2", "train.local_steps=1", "evaluation.every=2", "deepspeed.train_batch_size=4"]
    config = ["--config", "ds_configs/population_tiny.yaml", "-v"]
    code, output = run("deepspeed", TRAIN, *config, *short, f"output={tmp_path}")
    assert code == 0, output
    folder = tmp_path / "population_tiny"
    of_clients = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    trained = [line for line in of_clients if "turn" in line["metrics"]]
    assert [line["round"] for line in trained] == [1] * 10 + [2] * 10
    schedules = re.findall(r"^round (\d): (g0: .*) \(predicted: g\d is busy longest, groups idle", output, re.MULTILINE)
    for number, schedule in schedules:
        found: dict[tuple[float, float], str] = {}
        for line in trained:
            if line["round"] == int(number):
                found[line["metrics"]["group"], line["metrics"]["turn"]] = line["client"]
        groups = [part.split(": ")[1].split() for part in schedule.split(", ")]
        assert found == {(g, t): name for g, names in enumerate(groups) for t, name in enumerate(names)}
    assert [number for number, _ in schedules] == ["1", "2"]
    by_budget = r"^  train loss by budget: b[\d.]+ \d\.\d+ \(\d\.\d+ to \d\.\d+\)  b"
    assert len(re.findall(by_budget, output, re.MULTILINE)) == 2
    assert "group/b0.25" not in (folder / "metrics.jsonl").read_text()
    assert heat_maps(folder) == [2], "one with each evaluation; round 0 has no utilisation yet"


def test_a_group_that_was_slow_gets_fewer_turns(tmp_path):
    """Six equal clients, two groups: three turns each in round 1, in which every step of g1 takes a second longer."""
    overrides = ["clients={count: 6, budgets: [0.5]}", "groups=[{count: 2}]", "train.schedule_by=measured"]
    overrides += [*SHORT, "train.local_steps=1", "evaluation.every=2", f"output={tmp_path}"]
    script = "tests/support/failing_train.py"
    code, output = run(sys.executable, script, *overrides, UBSMOE_DS_FAULT="slow@1:1")
    assert code == 0, output
    _, first, second = (record["metrics"] for record in records(tmp_path / "tiny"))
    on_g1 = [sum(metrics[f"group/c{client}"] for client in range(6)) for metrics in (first, second)]
    assert on_g1 == [3, 0]


def test_adapter_holds_the_whole_merged_state(demo):
    adapter = read_adapter(demo[0] / "adapter")
    assert adapter.lora_rank == 8 and adapter.scaling == 2.0 and adapter.facts["k_max"] == "8"
    assert adapter.state["layers.0.experts.gate.lora_A"].shape == (16, 8, 128)
    assert adapter.state["layers.2.experts.down.lora_B"].shape == (16, 128, 8)
    assert abs(adapter.state["layers.1.phi"]).max() > 0
    assert "layers.0.router.weight" in adapter.state


def test_wrong_world_size_names_the_right_command(tmp_path):
    code, output = run("mpiexec", "-n", "2", sys.executable, "-m", "mpi4py", TRAIN, f"output={tmp_path}")
    assert code == 2 and "2 MPI ranks were started, the clients need 1 (phone) + 1 (laptop) + 2 (desktop)" in output
    assert "run: mpiexec -n 6 python -u -m mpi4py launch/train.py" in output and output.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


BAD = {
    "config": (["train.epochs=3"], "error: train.epochs: unknown key"),
    "rows": (["data.source=jsonl:{tmp}/bad.jsonl"], "bad.jsonl, line 1: is not a JSON object"),
    "missing file": (["data.source=jsonl:{tmp}/none.jsonl"], "none.jsonl cannot be read"),
    "too long": (
        ["data.max_length=1025", TWO_CLIENTS],
        "data.max_length: 1025 exceeds the model's max_position_embeddings, 1024",
    ),
    "other tokenizer": (["model.path={tmp}/small", TWO_CLIENTS], "tokens, the model 61; it belongs to another model"),
    "empty share": (["data.partition=iid", "clients.0.share=1.0e-9"], "'phone' would get none of the"),
    "folder in use": (["output={tmp}/used", "overwrite=false"], "already holds a run"),
    "cuda": (["accelerator=cuda", TWO_CLIENTS], "torch sees no CUDA device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_code_2_and_writes_nothing(name, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"task": \n')
    tiny.save_model(tmp_path / "small")
    for path in BUILTIN_MODELS["builtin:tiny_olmoe"].glob("tokenizer*"):
        shutil.copy(path, tmp_path / "small")
    (tmp_path / "used" / "tiny").mkdir(parents=True)
    (tmp_path / "used" / "tiny" / "metrics.jsonl").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    overrides, expected = BAD[name]
    chosen = [text.replace("{tmp}", str(tmp_path)) for text in overrides]
    if not any(text.startswith("output=") for text in chosen):
        chosen.append(f"output={tmp_path}/new")
    code, output = run(sys.executable, TRAIN, *chosen)
    assert code == 2 and expected in output, output
    assert output.count("error:") == 1 and "Traceback" not in output
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "used" / "tiny" / "metrics.jsonl").read_text() == "precious"


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        pytest.param(
            *("raise@2", 1, "error: client 'b', rank 1 of 2 (job rank 2): RuntimeError: planted fault"),
            marks=pytest.mark.extended,
        ),
        ("user@1", 2, "error: data: planted mistake"),
    ],
)
def test_a_fault_in_one_rank_ends_the_job(fault, code, message, tmp_path):
    exit_code, output = run(
        "deepspeed", "tests/support/failing_train.py", *FEW_RANKS, f"output={tmp_path}", UBSMOE_DS_FAULT=fault
    )
    assert exit_code == code, output
    assert output.count(message) == 1 and "Traceback" not in output


def test_missing_bf16_is_one_line_and_nothing_is_written(tmp_path):
    """Started with the variables of an allocation of Slurm that is no more, for which mpiexec would wait."""
    overrides = ["deepspeed.bf16.enabled=true", f"output={tmp_path}/new"]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "gone", "SLURM_JOB_NUM_NODES": "1", "SLURM_CONF": "/dev/null"}
    code, output = run(
        "deepspeed", "tests/support/failing_train.py", *FEW_RANKS, *overrides, UBSMOE_DS_FAULT="nobf16@all", **slurm
    )
    assert output.count("note: SLURM_JOB_ID=7 is set, but s") == 1 and "all ranks run on this host" in output, output
    assert code == 2 and output.count("error: deepspeed.bf16.enabled: true, but") == 1, output
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_everything(tmp_path):
    """Until then the run's folder is the job's alone."""
    command = ["deepspeed", "tests/support/failing_train.py", *FEW_RANKS, f"output={tmp_path}"]
    job = Job(command, tmp_path / "log", UBSMOE_DS_FAULT="hang@2")
    job.wait_for("hanging")
    code, output = run(sys.executable, TRAIN, *FEW_RANKS, f"output={tmp_path}", "overwrite=true")
    assert code == 2 and re.search(r"output: \S+ is in use by run [0-9a-f]{32} \(process \d+ on ", output), output
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end(60) != 0, job.output
    assert job.output.count("error: interrupted") == 1


@pytest.mark.extended
@pytest.mark.skipif(not COMMONSENSE.exists(), reason="the shared commonsense rows are not beside this checkout")
def test_real_rows_lower_every_clients_loss(tmp_path):
    overrides = [
        f"data.source=jsonl:{COMMONSENSE}/train.jsonl",
        f"data.eval_source=jsonl:{COMMONSENSE}/dev.jsonl",
        "data.rows=1500",
        "data.eval_rows=24",
        "train.rounds=2",
        "train.local_steps=4",
        "deepspeed.train_batch_size=8",
        "evaluation.every=2",
        f"output={tmp_path}",
    ]
    code, output = run(sys.executable, TRAIN, *overrides, timeout=400)
    assert code == 0, output
    for row in json.loads((tmp_path / "tiny" / "summary.json").read_text())["clients"]:
        assert row["loss_after"] < row["loss_before"] - 0.01, row
