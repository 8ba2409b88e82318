"""What a run leaves behind: adapters of rounds and clients, and plain weights by the command."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import OlmoeForCausalLM

from tests.ranks import REPO, clean_environment, run_ranks
from ubsmoe_ds.federation.adapter import CLIENTS, read_adapter
from ubsmoe_ds.models.peft_format import SIDECAR

CLIENT_KS = {"phone": 2, "laptop": 4, "desktop": 6, "server": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's four clients on six ranks; adapters after each of two rounds and at the end."""
    folder = tmp_path_factory.mktemp("export")
    overrides = ["train.rounds=2", "train.local_steps=2", "train.save_every=1", "evaluation.every=2"]
    overrides += ["data.rows=200", "data.eval_rows=20"]
    config = str(REPO / "ds_configs" / "tiny.yaml")
    arguments = {"config": config, "overrides": overrides, "names": ["ub_smoe"], "folder": str(folder)}
    run_ranks(folder, 6, "tests.scenarios:methods", arguments)
    return folder / "ub_smoe"


@pytest.mark.slow
def test_adapters_of_rounds_and_the_end(run):
    found = {path.name: read_adapter(path) for path in sorted(run.glob("adapter*"))}
    assert list(found) == ["adapter", "adapter-round-1", "adapter-round-2"]
    last = found["adapter"].state
    assert all(torch.equal(last[name], found["adapter-round-2"].state[name]) for name in last)
    moved = [name for name in last if not torch.equal(last[name], found["adapter-round-1"].state[name])]
    assert len(moved) > len(last) / 2
    for name, k in CLIENT_KS.items():
        of_client = read_adapter(run / "adapter" / CLIENTS / name)
        assert of_client.facts["k"] == str(k)
        assert all(torch.equal(of_client.state[key], value) for key, value in last.items())
    with safe_open(run / "adapter" / SIDECAR, framework="pt") as beside:
        assert {name.split(".")[2] for name in beside.keys()} == {"phi"}  # noqa: SIM118 - no mapping


@pytest.mark.slow
def test_export_writes_plain_weights_and_says_what_is_lost(run, tmp_path):
    command = [sys.executable, "launch/export.py", "--adapter", str(run / "adapter"), "--merge", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "note: plain weights have no place for phi" in done.stderr
    merged = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    adapter = read_adapter(run / "adapter")
    base = OlmoeForCausalLM.from_pretrained(adapter.base)
    A, B = (adapter.state[f"layers.1.experts.down.lora_{factor}"] for factor in "AB")
    expected = base.model.layers[1].mlp.experts.down_proj + adapter.scaling * B @ A
    torch.testing.assert_close(merged.model.layers[1].mlp.experts.down_proj, expected)
    again = subprocess.run(command, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert again.returncode == 2 and again.stderr.count("\n") == 2 and "is not empty" in again.stderr
