"""A job that was stopped and resumed ends with the same bits as one that was never stopped."""

import json

import numpy as np
import pytest

from tests.support.jobs import records, small_model
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.extended

CONFIG = "ds_configs/tiny.yaml"
SHORT = ["train.rounds=3", "train.local_steps=3", "data.rows=200", "data.eval_rows=12", "evaluation.batch_size=2"]
SHORT += ["checkpoint.keep=9", "deepspeed.train_batch_size=4", small_model()]
CLIENTS = ["clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}]"]
ZERO2 = ["deepspeed.zero_optimization.stage=2"]
SCAFFOLD = ["train.scaffold=true"]
PROX = ["train.prox_mu=0.5"]
BF16 = ["deepspeed.bf16.enabled=true"]
WARMUP = ["deepspeed.scheduler={type: WarmupLR, params: {warmup_num_steps: 8, warmup_max_lr: 0.01}}"]
# overrides, then the polls of the last rank at which the job is stopped: 0 is before the first evaluation, 3 + 3 r
# between rounds; evaluation polls too
VARIANTS: dict[str, list] = {
    "ub_smoe": [[], 0, 1, 9, 4],
    "zero2": [[*ZERO2, *WARMUP, *PROX], 8],
    "bf16_zero2": [[*BF16, *ZERO2, *PROX, *SCAFFOLD], 8],
    "fedadam": [["method=flame", "merge.server_optimizer=adam", "merge.server_lr=0.01", "lora.attention=true"], 8, 6],
    "momentum_sgd": [[*SCAFFOLD, "deepspeed.optimizer={type: SGD, params: {lr: 0.1, momentum: 0.9}}"], 8],
    "hetlora": [["method=hetlora", "lora.prune_gamma=0.7", "lora.prune_penalty=0.5"], 8],
    "nf4_bf16": [["model.quantize=nf4", "lora.attention=true", *BF16], 8],
    "flora_bf16": [["method=flora", *BF16, *PROX], 8],
    "packed": [
        [
            "data.packing=true",
            "train.local_steps=null",
            "train.local_epochs=0.5",
            "train.lr_schedule=cosine",
            "train.warmup_rounds=1",
            "train.weights=tokens",
            "train.patience=2",
            "evaluation.generate=2",
        ],
        8,
        6,
    ],
    "flexlora_reset": [["method=flexlora"], 8],
}

# (round, serial of the checkpoint): twice in the first evaluation, then within a round, then within the next one
STOPS = [(0, 1), (0, 2), (1, 3), (2, 5)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    arguments = {"config": CONFIG, "overrides": [*SHORT, *CLIENTS], "variants": VARIANTS, "folder": str(folder)}
    return folder, run_ranks(folder, 3, "tests.support.scenarios:stopped_and_resumed", arguments, timeout=900)


@pytest.mark.parametrize("name", VARIANTS)
def test_bits_equal_those_of_a_job_that_was_never_stopped(name, results):
    folder, ranks = results
    whole, resumed = records(folder / name), records(folder / f"{name}-resumed")
    assert [r["round"] for r in resumed] == [0, 1, 2, 3]
    assert [r["metrics"] for r in resumed] == [r["metrics"] for r in whole]
    checked = 0
    for result in ranks:
        for key in [key for key in result if key.startswith(f"{name}/")]:
            np.testing.assert_array_equal(result[key.replace(name, f"{name}-resumed", 1)], result[key], err_msg=key)
            checked += 1
    assert checked > 3 * 15


@pytest.mark.parametrize("name", ["ub_smoe", "flora_bf16"])
def test_it_learned_something(name, results):
    """If nothing were learned, equal bits would prove nothing."""
    losses = [r["metrics"]["eval/loss"] for r in records(results[0] / name)]
    assert len(set(losses)) == 4 and losses[-1] < losses[0]


def test_stops_fall_where_they_should(results):
    """This variant is stopped four times."""
    checkpoints = results[0] / "ub_smoe-resumed" / "checkpoints"
    assert list(results[1][0]["stops/ub_smoe"]) == [
        f"stopped in round {number} of 3, saved to {checkpoints / f'{serial:06d}-within-round-{number}'}"
        for number, serial in STOPS
    ]


def test_seconds_of_a_round_include_those_before_the_stop(results):
    """Client a had taken all its steps of round 2 when b was stopped."""
    folder = results[0] / "ub_smoe-resumed"
    manifest = json.loads((folder / "checkpoints" / "000005-within-round-2" / "manifest.json").read_text())
    before = manifest["clients"]["a"]
    assert before["steps"] == 3 and before["seconds"] > 0.01
    assert records(folder)[2]["seconds"]["seconds_local/a"] > before["seconds"]


def test_hetlora_did_prune(results):
    last = records(results[0] / "hetlora")[-1]["metrics"]
    assert last["lora_rank/b"] < 8
    assert json.loads((results[0] / "hetlora-resumed" / "config.json").read_text())["method"] == "hetlora"
