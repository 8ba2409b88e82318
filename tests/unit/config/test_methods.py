"""Presets: what each sets, and that every part can be overridden."""

import pytest

from tests.support.ranks import REPO
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS, with_preset
from ubsmoe_ds.studies.comparison_jobs import as_overrides

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
        (["method=flora", "model.quantize=nf4"], "model.quantize: 'nf4' does not work with merge.rule 'flora', which"),
        (["model.quantize=fp4"], "model.quantize: 'fp4' is not valid: Input should be 'nf4' or 'int8'"),
        (["clients.0.lora_rank=9", "merge.rule=zero_pad"], "clients: lora_rank 9 exceeds lora.rank 8"),
        (
            ["method=flora", "train.scaffold=true"],
            "train.scaffold: true does not work with merge.rule 'flora', whose adapters start anew each round",
        ),
        (
            ["method=florist", "train.scaffold=true"],
            "train.scaffold: true does not work with merge.rule 'florist', whose factors change their basis",
        ),
        (
            ["method=hetlora", "train.scaffold=true"],
            "train.scaffold: true does not work with merge.rule 'hetlora', for clients of unequal LoRA ranks",
        ),
        (["fault_tolerance=shrink", "train.scaffold=true"], "train.scaffold: true does not work with fault_tolerance"),
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
    assert load_experiment(TINY, as_overrides(ABLATIONS[label])).method == "ub_smoe"


def test_clients_with_equal_models_share_a_view():
    """Clients of equal K hold the same model, unless they keep a part of it for themselves."""
    same = ["clients.1.budget=0.25"]
    assert load_experiment(TINY, same).views == ["k2", "k2", "k6", "k8"]
    names = ["phone", "laptop", "desktop", "server"]
    assert load_experiment(TINY, [*same, "method=flame"]).views == names
    assert load_experiment(TINY, [*same, "method=flexlora"]).views == names
