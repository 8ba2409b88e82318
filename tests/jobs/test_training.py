"""Whole jobs with schedules, packing, generated answers, patience and a second stage."""

import json

import pytest

from tests.support.jobs import TRAIN, records, run
from tests.support.ranks import warm_python
from ubsmoe_ds.adapters.adapter import read_adapter

A, B = "{name: a, budget: 0.5, lr: 0.002, train_batch_size: 8}", "{name: b, budget: 1.0, ranks: 2, expert_parallel: 2}"
CLIENTS = f"clients=[{A}, {B}]"
EPOCHS = ["train.local_steps=null", "train.local_epochs=0.2", "train.lr_schedule=linear", "train.warmup_rounds=1"]
# PG of all tokens and moments of all rows do not depend on which rank computes a row
WHOLE = ["pseudo_gradient.tokens_per_expert=null", "pseudo_gradient.moment_share=1.0"]
COMMON = ["data.rows=400", "data.eval_rows=24", *WHOLE]
ROUNDS = 3


def train(folder, name, *overrides):
    command = ["mpiexec", "-n", "3", *warm_python(), "-m", "mpi4py", TRAIN]
    code, output = run(*command, f"output={folder}", f"name={name}", CLIENTS, *overrides)
    assert code == 0, output
    return output


def stage_one(folder, packing):
    asked = ["train.weights=tokens", "evaluation.generate=3", "train.save_best=true", f"data.packing={packing}"]
    name = f"packing-{packing}"
    train(folder, name, f"train.rounds={ROUNDS}", *COMMON, *EPOCHS, *asked)
    return folder / name


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return stage_one(tmp_path_factory.mktemp("training"), "true")


def test_steps_rates_and_weights_are_recorded(packed):
    """Client a's rows in batches of 8, b's of 16; rates of 1/2, 1 and 1/2 of 0.002 and 0.003."""
    summary = json.loads((packed / "summary.json").read_text())
    rows = {row["client"]: row["rows"] for row in summary["clients"]}
    for number, factor in ((1, 0.5), (2, 1.0), (3, 0.5)):
        metrics = records(packed)[number]["metrics"]
        assert metrics["steps/a"] == -(-rows["a"] // 40) and metrics["steps/b"] == -(-rows["b"] // 80)
        assert metrics["learning_rate/a"] == pytest.approx(0.002 * factor)
        assert metrics["learning_rate/b"] == pytest.approx(0.003 * factor)
    weights = [row["weight"] for row in summary["clients"]]
    assert sum(weights) == pytest.approx(1) and weights != [rows[name] / sum(rows.values()) for name in "ab"]


def test_the_best_adapter_and_the_answers_are_kept(packed):
    losses = [record["metrics"]["eval/loss_weighted"] for record in records(packed)]
    summary = json.loads((packed / "summary.json").read_text())
    best = losses.index(min(losses))
    assert (summary["best_round"], summary["best_loss_weighted"]) == (best, losses[best])
    assert summary["stopped_after_round"] is None and summary["started_from"] is None
    facts = read_adapter(packed / f"adapter-best-round-{best}").facts
    assert facts["round"] == str(best) and facts["run_id"] == summary["run_id"]
    assert read_adapter(packed / "adapter").facts["round"] == str(ROUNDS)
    samples = [json.loads(line) for line in (packed / "samples.jsonl").read_text().splitlines()]
    found = [(sample["round"], sample["view"], sample["row"]) for sample in samples]
    assert found == [(number, view, row) for number in range(4) for view in ("k4", "k8") for row in range(3)]
    assert all(sample["generated"] and sample["prompt"] and sample["answer"] for sample in samples)


@pytest.mark.extended
def test_packed_or_not_the_losses_are_the_same(packed):
    plain = stage_one(packed.parent, "false")
    for ours, theirs in zip(records(packed), records(plain), strict=True):
        for name, value in theirs["metrics"].items():
            if name.startswith(("train_loss/", "eval_loss/", "gradient_norm/", "tokens/", "steps/", "eval/loss")):
                assert ours["metrics"][name] == pytest.approx(value, rel=2e-4), name


@pytest.mark.extended
def test_a_second_stage_begins_at_the_loss_at_which_the_first_ended(packed):
    """And patience ends it: its learning rate is far too large."""
    start, folder = packed / "adapter", packed.parent
    wild = ["deepspeed.optimizer.params.lr=0.5", "clients.0.lr=0.5", "train.patience=2", "train.rounds=9"]
    asked = [f"lora.from={start}", "train.local_steps=2", *COMMON, *wild]
    output = train(folder, "second", *asked)
    assert (
        "stopped after round 2 of 9: no lower eval/loss_weighted in 2 evaluations (train.patience); the best" in output
    )
    second, summary = records(folder / "second"), json.loads((folder / "second" / "summary.json").read_text())
    assert [record["round"] for record in second] == [0, 1, 2]
    assert summary["stopped_after_round"] == 2 and summary["best_round"] == 0
    first = read_adapter(start).facts
    assert {key: summary["started_from"][key] for key in ("run_id", "round")} == {
        "run_id": first["run_id"],
        "round": str(ROUNDS),
    }
    facts = read_adapter(folder / "second" / "adapter-best-round-0").facts
    assert facts["started_from_run_id"] == first["run_id"]
    for client in "ab":
        after, before = (side["metrics"][f"eval_loss/{client}"] for side in (records(packed)[-1], second[0]))
        assert before == pytest.approx(after, rel=1e-5)
    resumed = train(folder, "second", *asked, "--resume", "auto")
    assert "stopped after round 2 of 9" in resumed and len(records(folder / "second")) == 3
