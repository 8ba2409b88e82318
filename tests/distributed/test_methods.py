"""Every method runs end to end on six ranks, one after the other in one job."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from tests.support.ranks import REPO, run_ranks
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.config.methods import PRESETS
from ubsmoe_ds.models.families import FAMILIES

TINY = REPO / "ds_configs" / "tiny.yaml"


RANK_METHODS = ["hetlora", "hetlora_plain", "flexlora", "flora", "florist"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    overrides = ["train.rounds=2", "train.local_steps=4", "data.rows=800", "data.eval_rows=24", "evaluation.every=2"]
    overrides += ["deepspeed.train_batch_size=8"]
    overrides += ["lora.prune_gamma=0.6"]  # so that pruning shows in two rounds
    arguments = {"config": str(TINY), "overrides": overrides, "names": list(PRESETS), "folder": str(folder / "runs")}
    return folder / "runs", run_ranks(folder, 6, "tests.support.scenarios:methods", arguments, timeout=580)


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_learns_on_six_ranks(name, runs):
    """The loss of each of four clients of unequal layout falls, and the run has its files."""
    folder, results = runs
    summary = json.loads((folder / name / "summary.json").read_text())
    for client in summary["clients"]:
        assert client["loss_after"] < client["loss_before"] - 0.01, client
    assert [client["k"] for client in summary["clients"]] == ([8] * 4 if name in RANK_METHODS else [2, 4, 6, 8])
    by_rank = [2, 4, 6, 8] if name in RANK_METHODS else [8] * 4
    ranks = [client["lora_rank"] for client in summary["clients"]]
    assert ranks == by_rank or (name == "hetlora" and all(r <= full for r, full in zip(ranks, by_rank, strict=True)))
    assert [int(results[rank][f"{name}/rank"]) for rank in (0, 1, 2, 4)] == ranks
    adapter = folder / name / "adapter"
    of_clients = [adapter / "clients" / client["client"] for client in summary["clients"]]
    for k, saved in zip([8, *(client["k"] for client in summary["clients"])], [adapter, *of_clients], strict=True):
        if name == "flora":
            assert [path.name for path in saved.iterdir() if path.is_file()] == ["weights.safetensors"]
            continue
        state, rank, _ = peft_format.read(saved, FAMILIES["olmoe"], num_experts=16)
        assert state["layers.1.experts.down.lora_A"].shape == (16, rank, 128)
        with safe_open(saved / peft_format.SIDECAR, framework="pt") as beside:
            assert beside.metadata()["k"] == str(k)


def test_only_flora_changes_the_frozen_weights(runs):
    """FLoRA changes them equally on all ranks: ranks 0, 1, 4 and 5 hold all experts, ranks 2 and 3 half each."""
    _, results = runs
    for projection in ("gate", "up", "down"):
        before, after = (results[0][f"{name}/base/{projection}"] for name in ("topk", "flora"))
        assert np.abs(after - before).max() > 1e-4
        for name in PRESETS:
            whole = results[0][f"{name}/base/{projection}"]
            assert (whole == before).all() == (name != "flora")
            for rank, part in ((1, whole), (2, whole[:8]), (3, whole[8:]), (4, whole), (5, whole)):
                np.testing.assert_array_equal(results[rank][f"{name}/base/{projection}"], part)
