"""A run with quantised weights, from training to the evaluation of its adapter."""

import json
import subprocess
import sys

import pytest

from tests.support.jobs import SHORT, TRAIN, TWO_CLIENTS, records, run
from tests.support.ranks import REPO, clean_environment, warm_python
from ubsmoe_ds.adapters.adapter import read_adapter
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data.sources import load_rows


def test_a_quantised_run_learns_and_is_evaluated_as_it_was_trained(tmp_path):
    """Two clients, one of two ranks that share the experts; in another process its adapter has its last loss."""
    settings = ["model.quantize=nf4", "lora.attention=true", f"output={tmp_path}"]
    code, output = run(sys.executable, TRAIN, *SHORT, TWO_CLIENTS, *settings)
    assert code == 0 and "of 16 experts, weights in nf4, LoRA rank 8" in output, output
    losses = [record["metrics"]["eval/loss"] for record in records(tmp_path / "tiny")]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.005
    folder = tmp_path / "tiny" / "adapter" / "clients" / "b"
    assert read_adapter(folder).facts["quantize"] == "nf4"
    data = tmp_path / "rows.jsonl"
    rows = load_rows(load_experiment(REPO / "ds_configs" / "tiny.yaml", SHORT).data, 0).evaluation
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    line = [*warm_python(), "launch/evaluate.py", "--adapter", str(folder), "--data", f"jsonl:{data}", "--json"]
    done = subprocess.run(line, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny" / "summary.json").read_text(encoding="utf-8"))
    (after,) = [client["loss_after"] for client in summary["clients"] if client["client"] == "b"]
    assert json.loads(done.stdout.splitlines()[0])["loss"] == pytest.approx(after, abs=1e-4)
