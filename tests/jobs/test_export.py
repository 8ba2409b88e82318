"""Outputs of a run: adapters of rounds and clients, and plain weights and figures by the commands."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import OlmoeForCausalLM

from tests.support.ranks import REPO, clean_environment, run_ranks, warm_python
from ubsmoe_ds.adapters.adapter import CLIENTS, load_trained, read_adapter
from ubsmoe_ds.adapters.peft_format import SIDECAR
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.client.evaluation import generate_answers, parse_answer
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data.sources import load_rows
from ubsmoe_ds.launching.run_folder import clear_run_folder
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.models.tokenizer import read_tokenizer

DATA = ["data.rows=200", "data.eval_rows=20"]
CLIENT_KS = {"phone": 2, "laptop": 4, "desktop": 6, "server": 8}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The demo's four clients on six ranks; adapters after each of two rounds and at the end."""
    folder = tmp_path_factory.mktemp("export")
    overrides = ["train.rounds=2", "train.local_steps=2", "train.save_every=1", "evaluation.every=2"]
    overrides += DATA
    config = str(REPO / "ds_configs" / "tiny.yaml")
    arguments = {"config": config, "overrides": overrides, "names": ["ub_smoe"], "folder": str(folder)}
    run_ranks(folder, 6, "tests.support.scenarios:methods", arguments)
    return folder / "ub_smoe"


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


def test_export_writes_plain_weights_and_says_what_is_lost(run, tmp_path):
    command = [*warm_python(), "launch/export.py", "--adapter", str(run / "adapter"), "--merge", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "note: plain weights have no place for phi" in done.stderr
    merged = OlmoeForCausalLM.from_pretrained(tmp_path / "out")
    adapter = read_adapter(run / "adapter")
    base = OlmoeForCausalLM.from_pretrained(adapter.base)
    A, B = (adapter.state[f"layers.1.experts.down.lora_{factor}"] for factor in "AB")
    stored = base.model.layers[1].mlp.experts.down_proj
    expected = (stored + adapter.scaling * B @ A).to(stored.dtype)  # the precision of the checkpoint
    assert stored.dtype == torch.bfloat16 and not torch.equal(expected, stored)
    torch.testing.assert_close(merged.model.layers[1].mlp.experts.down_proj, expected)
    again = subprocess.run(command, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "is in use" in again.stderr


def test_evaluate_repeats_the_figures_of_the_run(run, tmp_path):
    """The table of the run's last evaluation, from its adapters, in another process and without expert parallelism."""
    rows = load_rows(load_experiment(REPO / "ds_configs" / "tiny.yaml", DATA).data, 0).evaluation
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for client in (summary["clients"][0], summary["clients"][-1]):
        adapter = run / "adapter" / CLIENTS / client["client"]
        arguments = ["--adapter", str(adapter), "--data", f"jsonl:{data}", "--exact-match", "--json"]
        records = command("evaluate", *arguments)
        assert [record["task"] for record in records] == ["all", *sorted({row["task"] for row in rows})]
        assert records[0]["k"] == CLIENT_KS[client["client"]] and records[0]["rows"] == len(rows)
        assert records[0]["loss"] == pytest.approx(client["loss_after"], abs=1e-4)
        assert records[0]["accuracy"] == pytest.approx(client["accuracy_after"])
        assert records[0]["exact_match"] == pytest.approx(in_own_words(adapter, rows))
        assert sum(record["rows"] for record in records[1:]) == len(rows)
    asked = command("evaluate", "--adapter", str(run / "adapter"), "--data", f"jsonl:{data}", "--k", "2", "--json")
    phone = command("evaluate", "--adapter", str(run / "adapter/clients/phone"), "--data", f"jsonl:{data}", "--json")
    assert asked == phone


def in_own_words(folder: Path, rows: list[dict]) -> float:
    """Share of rows that the adapter's model answers right, each row alone."""
    model, tokenizer = load_trained(read_adapter(folder)), read_tokenizer(BUILTIN_MODELS["builtin:tiny_olmoe"], 768)
    lengths = {"max_length": 256, "batch_size": 1, "max_new_tokens": 16}
    texts = [generate_answers(model, model.layers[0].gate.k, [row], tokenizer, **lengths)[0] for row in rows]
    said = [parse_answer(text, row["labels"]) for text, row in zip(texts, rows, strict=True)]
    return sum(label == row["label"] for label, row in zip(said, rows, strict=True)) / len(rows)


def command(name: str, *arguments: str) -> list[dict]:
    """The JSON lines that a command prints."""
    line = [*warm_python(), f"launch/{name}.py", *arguments]
    done = subprocess.run(line, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_an_adapter_of_another_model_is_refused(run, tmp_path):
    adapter = read_adapter(run / "adapter")
    state = {**adapter.state, "layers.0.phi": torch.zeros(3)}
    with pytest.raises(UserError, match=r"'layers.0.phi' \[3\] has no place"):
        load_trained(adapter._replace(state=state))
    line = [*warm_python(), "launch/evaluate.py", "--adapter", str(tmp_path), "--data", "synthetic"]
    done = subprocess.run(line, cwd=REPO, env=clean_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "adapter_config.json" in done.stderr


def test_overwriting_removes_the_adapters_of_the_run_before(tmp_path):
    exp = load_experiment(REPO / "ds_configs" / "tiny.yaml", [f"output={tmp_path}", "overwrite=true"])
    for folder in ("adapter", "adapter/clients/phone", "adapter-round-9"):
        (exp.run_dir / folder).mkdir(parents=True)
        for name in ("adapter_model.safetensors", SIDECAR, "adapter_config.json"):
            (exp.run_dir / folder / name).write_text("old")
    (exp.run_dir / "adapter" / "notes.txt").write_text("mine")
    clear_run_folder(exp.run_dir)
    assert [str(path.relative_to(exp.run_dir)) for path in sorted(exp.run_dir.rglob("*"))] == [
        "adapter",
        "adapter/notes.txt",
    ]
