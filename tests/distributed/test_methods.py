"""Test the presets: what each sets, that every key can be overridden, and that each runs end to end on six ranks."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from launch import compare
from tests.support.ranks import REPO, run_ranks
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS, with_preset

TINY = REPO / "ds_configs" / "tiny.yaml"
RANK_METHODS = ["hetlora", "hetlora_plain", "flexlora", "flora", "florist"]
# method: (DMR = Dynamic Modulated Routing, PG = pseudo-gradient, gate rescaling, load-balancing weight, merge rule)
EXPECTED = {
    "ub_smoe": (True, "linearised", "none", 0.0, "fedavg"),
    "topk": (False, "none", "none", 0.0, "fedavg"),
    "smoe_llb": (False, "none", "none", 0.01, "fedavg"),
    "a3smoe": (False, "none", "none", 0.0, "activation"),
    "flame": (False, "none", "learned", 0.0, "activation"),
    "hetlora": (False, "none", "none", 0.0, "hetlora"),
    "hetlora_plain": (False, "none", "none", 0.0, "zero_pad"),
    "flexlora": (False, "none", "none", 0.0, "flexlora"),
    "flora": (False, "none", "none", 0.0, "flora"),
    "florist": (False, "none", "none", 0.0, "florist"),
}


def test_every_method_has_its_row():
    assert set(EXPECTED) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_values_that_a_preset_sets(name):
    """A budget of 0.25 to 1 scales either K_max 8 or LoRA rank 8; the other is 8 on every client."""
    exp = load_experiment(TINY, [f"method={name}"])
    parts = (exp.dmr.enabled, exp.pseudo_gradient.estimator, exp.router.gate_rescale, exp.router.aux_loss)
    assert (*parts, exp.merge.rule) == EXPECTED[name]
    by_rank = name in RANK_METHODS
    assert [exp.active_experts(client) for client in exp.clients] == ([8, 8, 8, 8] if by_rank else [2, 4, 6, 8])
    assert exp.lora_ranks == ([2, 4, 6, 8] if by_rank else [8, 8, 8, 8])


def test_a_key_overrides_its_preset_and_leaves_the_rest():
    exp = load_experiment(TINY, ["method=flame", "merge.rule=median", "clients.1.lora_rank=8"])
    assert exp.merge.rule == "median" and exp.router.gate_rescale == "learned"
    assert with_preset({"method": "topk", "merge": {"rule": "median"}})["router"]["gate_rescale"] == "none"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=ubsmoe"], "method: 'ubsmoe' is not a method; use one of ub_smoe, topk"),
        (["method=flexlora", "merge.rule=fedavg"], "merge.rule: 'fedavg' needs equal LoRA ranks"),
        (["method=flora", "merge.server_optimizer=adam"], "merge.server_optimizer: 'adam' does not work with"),
        (["lora.prune_penalty=0.1"], "merge.rule: 'fedavg' needs equal LoRA ranks"),
        (["method=flora", "lora.prune_penalty=0.1"], "lora.prune_penalty: 0.1 does not work with merge.rule 'flora'"),
        (["clients.0.lora_rank=9", "merge.rule=zero_pad"], "clients: lora_rank 9 exceeds lora.rank 8"),
        (["merge.trim=0.5"], "merge.trim: 0.5"),
        (
            ["router.gate_rescale=power"],
            "router.gate_rescale: 'power' is not valid: Input should be 'none' or 'learned'",
        ),
        (["router.gamma=0.5"], "router.gamma: unknown key (value 0.5)"),
    ],
)
def test_bad_combinations_are_one_line(overrides, message):
    with pytest.raises(UserError) as error:
        load_experiment(TINY, overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("label", ABLATIONS)
def test_ablations_are_experiments(label):
    """The label names which of DMR and PG is off."""
    raw = with_preset(ABLATIONS[label])
    on = {
        "dmr": raw["dmr"]["enabled"],
        "pg": raw["pseudo_gradient"]["estimator"] != "none",
    }
    assert on == {"dmr": "no_dmr" not in label, "pg": "no_pg" not in label}
    assert load_experiment(TINY, compare.as_overrides(ABLATIONS[label])).method == "ub_smoe"


def test_clients_with_equal_models_share_a_view():
    """Clients of equal K hold the same model, unless they keep a part of it for themselves."""
    same = ["clients.1.budget=0.25"]
    assert load_experiment(TINY, same).views == ["k2", "k2", "k6", "k8"]
    names = ["phone", "laptop", "desktop", "server"]
    assert load_experiment(TINY, [*same, "method=flame"]).views == names
    assert load_experiment(TINY, [*same, "method=flexlora"]).views == names


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    overrides = ["train.rounds=3", "train.local_steps=6", "data.rows=800", "data.eval_rows=40", "evaluation.every=3"]
    overrides += ["lora.prune_gamma=0.6"]  # so that pruning shows in three rounds
    arguments = {"config": str(TINY), "overrides": overrides, "names": list(PRESETS), "folder": str(folder / "runs")}
    return folder / "runs", run_ranks(folder, 6, "tests.support.scenarios:methods", arguments, timeout=580)


@pytest.mark.slow
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
        state, rank, _ = peft_format.read(saved, num_experts=16)
        assert state["layers.1.experts.down.lora_A"].shape == (16, rank, 128)
        with safe_open(saved / peft_format.SIDECAR, framework="pt") as beside:
            assert beside.metadata()["k"] == str(k)


@pytest.mark.slow
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
