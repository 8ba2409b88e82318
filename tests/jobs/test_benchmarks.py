"""Check that benchmarks run, print JSON lines and check their own results; times are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.extended

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--hidden", "32", "--experts", "8", "--repeats", "1", "--json"]
COMMANDS = {
    "moe_block": (
        1,
        ["--width", "16", "--tokens", "48", "--k", "2", "--threads", "1", "--routing", "uniform", "zipf", *SMALL],
        {"floor", "separate", "ubsmoe", "hf_eager", "hf_grouped_mm", "hf_base", "deepspeed"},
    ),
    "train_step": (
        1,
        ["--layers", "1", "--tokens", "64", "--k", "1", "2", *SMALL],
        {
            "ubsmoe",
            "hf_peft",
            *(f"ubsmoe-{part}" for part in ["no_dmr", "no_pg", "no_lora", "checkpointing", "nf4", "int8"]),
        },
    ),
    "pseudo_gradient": (
        1,
        ["--sizes", "builtin", "--tokens", "256", "--repeats", "1", "--json"],
        {"none", "expert_mean", "token_weighted", "linearised"},
    ),
    "packing": (1, ["--layers", "1", "--rows", "4", "--steps", "1", *SMALL], {"packed", "padded"}),
    "loading": (
        1,
        ["--gigabytes", "0.6", "--expert-parallel", "1", "--quantize", "nf4", "int8", "--json"],
        {"ubsmoe", "ubsmoe-nf4", "ubsmoe-int8", "transformers"},
    ),
    "exchange": (
        3,
        ["--megabytes", "1", "--repeats", "1", "--json"],
        {"memcpy", "ubsmoe", "ubsmoe-mpi", "owners", "owners-mpi", "owners-bf16", "allreduce", "model", "projection"},
    ),
    "population": (4, ["--clients", "4", "--repeats", "1", "--json"], {"round", "turn", "schedule", "memory"}),
}
UNTIMED = ("schedule", "memory")


@pytest.mark.parametrize("name", COMMANDS)
def test_benchmark_runs(name):
    ranks, arguments, implementations = COMMANDS[name]
    script = [f"benchmarks/{name}.py", *arguments]
    command = [sys.executable, *script]
    if ranks > 1:
        mpiexec = str(Path(sys.executable).with_name("mpiexec"))
        command = [mpiexec, "-n", str(ranks), sys.executable, "-m", "mpi4py", *script]
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {record["impl"] for record in records} - {"flower"} == implementations
    assert all(record["bench"] == name for record in records)
    timed = [record for record in records if record["impl"] not in UNTIMED]
    assert all(record["ms"] > 0 for record in timed)
    assert all(record["ratio"] > 0 for record in timed if record["impl"] != "projection")
    if name == "loading":  # a bound on memory, not on time; no part of the checkpoint is in memory twice
        ratios = {record["impl"]: record["ratio"] for record in records}
        assert 1 <= ratios["ubsmoe"] < 1.2 and 1 <= ratios["ubsmoe-nf4"] < 1.5 and 1 <= ratios["ubsmoe-int8"] < 1.3
