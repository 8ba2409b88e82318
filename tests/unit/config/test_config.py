"""The experiment file: derived values, and one clear line for every mistake."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.sections import ClientConfig


def load(*overrides):
    return load_experiment("ds_configs/tiny.yaml", overrides)


def test_the_demo_is_valid_and_complete():
    exp = load()
    assert exp.world_size == 6 and exp.num_experts == 16 and exp.k_max == 8 and exp.candidates == 16
    assert [exp.active_experts(client) for client in exp.clients] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], [0.08 * 14 / 16, 0.08 * 12 / 16, 0.08 * 10 / 16, 0.08 * 8 / 16]),
        (["pseudo_gradient.scale=1"], [14 / 16, 12 / 16, 10 / 16, 8 / 16]),
        (["pseudo_gradient.scale=0.5"], [7 / 16, 6 / 16, 5 / 16, 4 / 16]),
        (["pseudo_gradient.scale=0.25", "pseudo_gradient.rho=2"], [0.5, 0.5, 0.5, 0.5]),
    ],
)
def test_the_weight_of_pg_by_hand(keys, expected):
    """scale * (1 - K / 16) at K = 2, 4, 6, 8, the preset's scale being 0.08; scale * 2 for the constant rho 2."""
    exp = load(*keys)
    assert [exp.rho(client) for client in exp.clients] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("budget", "k_max", "expected"),
    [(0.25, 8, 2), (0.5, 8, 4), (1.0, 8, 8), (0.1, 8, 1), (0.3, 10, 3), (0.7, 10, 7), (0.29, 100, 29), (0.99, 8, 7)],
)
def test_active_experts_by_hand(budget, k_max, expected):
    """floor(K_max * beta), at least 1; 0.29 * 100 is 28.999... in binary and still means 29."""
    raw = tiny.experiment("unused", [{"budget": budget}]).model_dump() | {"num_experts": 128, "k_max": k_max}
    exp = Experiment.model_validate(raw)
    assert exp.active_experts(exp.clients[0]) == expected


@settings(max_examples=80, deadline=None)
@given(st.floats(0.001, 1.0), st.integers(1, 64))
def test_active_experts_rule(budget, k_max):
    raw = tiny.experiment("unused", [{"budget": budget}]).model_dump() | {"num_experts": 64, "k_max": k_max}
    exp = Experiment.model_validate(raw)
    k = exp.active_experts(exp.clients[0])
    assert 1 <= k <= k_max and (k <= k_max * budget + 1e-6 or k == 1) and k > k_max * budget - 1


def test_rslora_scales_by_the_root_of_each_clients_rank():
    """alpha 16: 16 / 4 and 16 / 2 at LoRA ranks 16 and 4; without it 1 and 4. Budgets scale LoRA ranks here."""
    ranks = ["lora.rank=16", "method=hetlora", "lora.alpha=16"]
    for rslora, expected in (("true", [4.0, 8.0]), ("false", [1.0, 4.0])):
        exp = load(*ranks, f"lora.rslora={rslora}")
        assert [exp.lora_alpha(rank) / rank for rank in (16, 4)] == pytest.approx(expected)


def test_overrides_reach_every_depth():
    exp = load("train.rounds=3", "clients.1.budget=0.75", "deepspeed.zero_optimization.stage=2", "dmr.enabled=false")
    assert exp.train.rounds == 3 and exp.clients[1].budget == 0.75
    assert exp.deepspeed.zero_stage == 2 and not exp.dmr.enabled


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ([], [10, 10, 10]),
        (["clients.1.local_steps=3"], [10, 3, 10]),
        (["train.local_steps=null", "train.local_epochs=1"], [3, 7, 1]),
        (["train.local_steps=null", "train.local_epochs=2", "clients.1.local_steps=5"], [5, 5, 1]),
        (["train.local_steps=null", "train.local_epochs=2", "clients.0.train_batch_size=8"], [10, 13, 1]),
        (["train.local_steps=null", "train.local_epochs=0.1"], [1, 1, 1]),
    ],
)
def test_local_steps_by_hand(keys, expected):
    """Batches of 16; clients of 40, 100 and 3 rows: a pass is 2.5, 6.25 and 0.19 steps, rounded up."""
    exp = load(*keys)
    rows = zip(exp.clients[:3], (40, 100, 3), strict=True)
    assert [exp.local_steps(client, count) for client, count in rows] == expected


def test_a_part_of_a_pass_is_not_rounded_up_for_its_binary_digits():
    """0.07 of 1,600 rows is 7 batches of 16, although 0.07 * 1600 / 16 is a little more in binary."""
    exp = load("train.local_steps=null", "train.local_epochs=0.07")
    assert 0.07 * 1600 / 16 > 7 and exp.local_steps(exp.clients[0], 1600) == 7


def test_a_client_has_its_own_batch_and_learning_rate():
    exp = load("clients.1.train_batch_size=8", "clients.1.gradient_accumulation_steps=2", "clients.1.lr=0.5")
    first, second = (exp.settings(client) for client in exp.clients[:2])
    assert first == exp.deepspeed
    assert (second.train_batch_size, second.gradient_accumulation_steps) == (8, 2)
    params = exp.deepspeed.optimizer["params"]
    assert second.optimizer == {"type": exp.deepspeed.optimizer["type"], "params": params | {"lr": 0.5}}
    assert params["lr"] != 0.5, "the others' section stays as it is"


WRONG = {
    "unknown key": (["train.epochs=3"], "train.epochs: unknown key (value 3)"),
    "more survivors than clients": (["min_clients=9"], "min_clients: 9 exceeds the 4 clients"),
    "unknown section": (["optimiser.lr=1"], "optimiser: unknown key"),
    "unknown client key": (["clients.0.k=2"], "clients.0.k: unknown key"),
    "budget 0": (["clients.0.budget=0"], "clients.0.budget: 0 is not valid: Input should be greater than 0"),
    "budget 1.5": (
        ["clients.2.budget=1.5"],
        "clients.2.budget: 1.5 is not valid: Input should be less than or equal to 1",
    ),
    "budget nan": (["clients.2.budget=.nan"], "clients.2.budget: nan is not valid"),
    "text for a number": (["train.rounds=many"], "train.rounds: 'many' is not valid"),
    "experts not divisible": (
        ["clients.3.ranks=3", "clients.3.expert_parallel=3", "deepspeed.train_batch_size=24"],
        "clients.3.expert_parallel: 3 does not divide the model's 16 experts",
    ),
    "ranks not whole groups": (
        ["clients.2.ranks=3", "deepspeed.train_batch_size=24"],
        "ranks 3, not a multiple of its expert_parallel 2",
    ),
    "zero 3": (["deepspeed.zero_optimization.stage=3"], "deepspeed.zero_optimization: stage 3 is not one of 0, 1, 2"),
    "typo in the json": (["deepspeed.gradient_cliping=1.0"], "deepspeed.gradient_cliping: unknown key"),
    "no optimiser": (["deepspeed.optimizer={}"], "deepspeed.optimizer: type None must name an optimiser"),
    "offload": (
        ["deepspeed.zero_optimization={stage: 1, offload_optimizer: {device: cpu}}"],
        "offload_optimizer is not supp",
    ),
    "another json": (["deepspeed=none.json"], "none.json: cannot be read"),
    "fp16": (["deepspeed.fp16.enabled=true"], "deepspeed.fp16: enabled true is not supported"),
    "k_max above experts": (["model.k_max=17"], "model.k_max: 17 exceeds the model's 16 experts"),
    "candidates below k_max": (
        ["dmr.candidates=7"],
        "dmr.candidates: 7 (N_p) must lie between K_max 8 and the 16 experts",
    ),
    "candidates above experts": (["dmr.candidates=17"], "dmr.candidates: 17 (N_p) must lie between"),
    "phi range": (["dmr.phi_min=2.0"], "dmr: phi_min 2.0 must be below phi_max 1.0"),
    "same name twice": (["clients.1.name=phone"], "clients: name 'phone' appears more than once"),
    "path in a name": (["name=../x"], "name: '../x' is not valid"),
    "a client's batch does not split": (
        ["clients.2.train_batch_size=6", "clients.2.gradient_accumulation_steps=2"],
        "clients.2.train_batch_size: 6 is not a multiple of ranks 2 x gradient_accumulation_steps 2 of client",
    ),
    "steps and epochs": (
        ["train.local_epochs=1"],
        "train.local_epochs: 1 excludes local_steps, which is 10; leave one of them out, or set it to null",
    ),
    "neither steps nor epochs": (["train.local_steps=null"], "train.local_steps: null needs local_epochs"),
    "only warm-up": (
        ["train.rounds=3", "train.warmup_rounds=3"],
        "train.warmup_rounds: 3 leaves none of 3 rounds for the full learning rate",
    ),
    "two schedules": (
        ["train.lr_schedule=cosine", "deepspeed.scheduler={type: WarmupLR, params: {}}"],
        "train.lr_schedule: 'cosine' does not go with deepspeed.scheduler (WarmupLR)",
    ),
    "warm-up beside a scheduler": (
        ["train.warmup_rounds=1", "deepspeed.scheduler={type: WarmupLR, params: {}}"],
        "train.warmup_rounds: 1 does not go with deepspeed.scheduler (WarmupLR)",
    ),
    "a client's rate beside a scheduler": (
        ["clients.1.lr=0.1", "deepspeed.scheduler={type: WarmupLR, params: {}}"],
        "clients.1.lr: 0.1 does not go with deepspeed.scheduler (WarmupLR)",
    ),
    "a schedule that has no effect": (
        ["train.lr_schedule=linear", "deepspeed.optimizer={type: Rprop}"],
        "train.lr_schedule: 'linear' does not go with the optimizer Rprop",
    ),
    "batch does not split": (["deepspeed.train_batch_size=15"], "train_batch_size: 15 is not a multiple of ranks 2 x"),
    "estimator": (
        ["pseudo_gradient.estimator=magic"],
        "pseudo_gradient.estimator: 'magic' is no estimator; use one of",
    ),
    "rho": (["pseudo_gradient.rho=dense"], "pseudo_gradient.rho"),
    "scale 0": (["pseudo_gradient.scale=0"], "pseudo_gradient.scale: 0 is not valid"),
    "source": (["data.source=csv:x"], "data.source: 'csv:x' is not valid"),
    "no equals sign": (["train.rounds"], "override 'train.rounds': must read key.sub=value"),
    "no such client": (["clients.9.budget=1"], "override 'clients.9.budget=1'"),
    "into a number": (["seed.x=1"], "override 'seed.x=1'"),
    "derived key": (["num_experts=4"], "num_experts: is read from the model's folder"),
    "no such model": (["model.path=/nowhere"], "/nowhere/config.json: cannot be read"),
    "not built in": (["model.path=builtin:big"], "model.path: 'builtin:big' is not built in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_settings_get_one_line(name):
    overrides, expected = WRONG[name]
    with pytest.raises(UserError) as caught:
        load(*overrides)
    message = str(caught.value)
    assert expected in message, message
    assert "\n" not in message


def test_files_that_are_not_experiments(tmp_path):
    for text, expected in (
        ("[1, 2]", "must hold key: value pairs"),
        ("a: [", "is not valid YAML"),
        ("!!python/object:os.x {}", "is not valid YAML"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        with pytest.raises(UserError, match="bad.yaml") as caught:
            load_experiment(path)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be read"):
        load_experiment(tmp_path / "missing.yaml")


def test_the_ready_made_configs_are_valid(tmp_path):
    """OLMoE-1B-7B's config is loaded with a local folder in place of the hub."""
    facts = {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    exp = load_experiment("ds_configs/olmoe_1b_7b.yaml", [f"model.path={tmp_path}"])
    assert exp.world_size == 8 and [exp.active_experts(client) for client in exp.clients] == [2, 4, 6, 8]
    assert exp.deepspeed.use_bf16 and exp.candidates == 16 and exp.train.save_every == 5
    other = load_experiment("ds_configs/teleqna.yaml")
    assert other.data.partition == "by_task" and other.world_size == 4


def test_other_model_families_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="model_type 'llama'; supported: olmoe, flex_olmo, mixtral"):
        load(f"model.path={tmp_path}")


def test_models_without_experts_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmoe"}))
    with pytest.raises(UserError, match="num_experts is None, must be a number from 1 to"):
        load(f"model.path={tmp_path}")


def test_deepspeed_json_is_beside_the_yaml(tmp_path):
    raw = yaml.safe_load(Path("ds_configs/tiny.yaml").read_text())
    (tmp_path / "exp.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(UserError, match="tiny.json: cannot be read"):
        load_experiment(tmp_path / "exp.yaml")


def test_settings_cannot_change_after_loading():
    client = ClientConfig(name="a", budget=0.5)
    with pytest.raises(ValueError, match="frozen"):
        client.budget = 1.0
