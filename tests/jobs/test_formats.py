"""Rows of every format trained end to end: each client has another one, with evaluation rows of its own."""

import json
import re
import subprocess

import pytest

from tests.support.jobs import records, train
from tests.support.ranks import REPO, clean_environment

DATA = REPO / "tests" / "data"
CHOICES = ("mmlu", "arc", "hellaswag", "instruction")
COMMON = ["train.rounds=2", "train.local_steps=8", "data.max_length=200", "method=topk", "deepspeed.train_batch_size=8"]


def split(name, folder):
    """Write a format's file in two parts, and return them: the first rows are evaluated."""
    lines = (DATA / f"{name}.jsonl").read_text().splitlines(keepends=True)
    for part, kept in (("eval", lines[:8]), ("train", lines[8:])):
        (folder / f"{name}.{part}.jsonl").write_text("".join(kept))
    return folder / f"{name}.train.jsonl", folder / f"{name}.eval.jsonl"


def run(names, folder, *overrides):
    clients = []
    for name in names:
        rows, evaluation = split(name, folder)
        clients.append(f"{{name: {name}, budget: 1.0, source: {rows}, eval_source: {evaluation}}}")
    code, output = train(f"clients=[{', '.join(clients)}]", f"output={folder}", "name=run", *COMMON, *overrides)
    assert code == 0, output
    return output, records(folder / "run"), json.loads((folder / "run" / "summary.json").read_text())


def check_losses(names, found, summary):
    """Assert that every client's loss on its own rows falls, and that only rows with choices have an accuracy."""
    assert [row["client"] for row in summary["clients"]] == list(names)
    for row in summary["clients"]:
        assert row["loss_after"] < 0.9 * row["loss_before"], row
    for name in names:
        assert [f"eval_accuracy/{name}" in record["metrics"] for record in found] == [name in CHOICES] * 3
        assert f"eval_perplexity/{name}" in found[-1]["metrics"]


def test_chat_and_choices_are_trained_together(tmp_path):
    names = ("messages", "mmlu")
    output, found, summary = run(names, tmp_path)
    check_losses(names, found, summary)
    assert "note: the model has no chat template" in output
    assert "eval/accuracy" not in found[-1]["metrics"], "one client has none, so there is no mean"
    assert summary["rows"]["own_evaluation"] == {name: {"kept": 8, "cut": 0, "dropped": 0} for name in names}


@pytest.mark.extended
@pytest.mark.parametrize("names", [("alpaca", "prompt_completion", "text"), ("sharegpt", "arc", "hellaswag")])
def test_other_formats_are_trained(names, tmp_path):
    _, found, summary = run(names, tmp_path, "deepspeed.train_batch_size=4")
    check_losses(names, found, summary)


@pytest.mark.extended
def test_rows_without_choices_have_no_accuracy_anywhere(tmp_path):
    """One file dealt to two clients: neither terminal, record, TensorBoard nor summary shows an accuracy."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    clients = "clients=[{name: a, budget: 0.5, max_rows: 9}, {name: b, budget: 1.0}]"
    data = [f"data.source={DATA / 'sharegpt.jsonl'}", f"data.chat_template={template}", "data.eval_fraction=0.3"]
    code, output = train(clients, *data, f"output={tmp_path}", "name=run", *COMMON)
    assert code == 0 and "accuracy" not in output and "eval loss" in output, output
    assert "rows (weight): a 9 (" in output and "are left out (a " in output and "in 10 bins" not in output
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = [*events.Tags()["scalars"], *(tmp_path / "run" / "metrics.jsonl").read_text().split('"')]
    names += (tmp_path / "run" / "summary.json").read_text().split('"')
    assert not [name for name in names if "accuracy" in name] and "eval/perplexity" in names


@pytest.mark.extended
def test_the_lines_of_the_readme_work_as_they_stand(tmp_path):
    """In a folder with links to what they name."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (lines,) = [block for block in blocks if "my_rows" in block]
    assert len(lines.splitlines()) == 3
    for name in ("launch", "ds_configs", "tests", "ubsmoe_ds"):
        (tmp_path / name).symlink_to(REPO / name)
    command = ["bash", "-ec", lines]
    done = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "perplexity" in done.stdout and (tmp_path / "runs" / "mine" / "adapter").is_dir()
