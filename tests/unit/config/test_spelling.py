"""How settings may be written: numbers, paths and sections; and that every slip gets a line that helps."""

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.plain_yaml import parse_yaml
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.messages import keys_of
from ubsmoe_ds.models.hub import remedy_for

TINY = "ds_configs/tiny.yaml"
NINES = "9" * 5000


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        load_experiment(TINY, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-4", 1e-4), ("1E5", 1e5), ("-2e+3", -2000.0), (".5", 0.5), ("1.", 1.0), ("1.5e3", 1500.0)),
        *(("0", 0), ("-3", -3), ("+4", 4), ("1_000", 1000), ("0x1F", 31), ("true", True), ("yes", True), ("~", None)),
        *(("010", "010"), ("1:30", "1:30"), ("190:20:30.15", "190:20:30.15"), ("2026-01-31", "2026-01-31")),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    assert parse_yaml(text) == value and type(parse_yaml(text)) is type(value)


def test_a_number_with_an_exponent_is_a_number_everywhere():
    exp = load_experiment(TINY, ["lora.alpha=1e1", "deepspeed.optimizer.params.lr=1e-4", "dmr.eps=1e-6"])
    assert exp.lora.alpha == 10.0 and exp.deepspeed.optimizer["params"]["lr"] == 1e-4 and exp.dmr.eps == 1e-6


def test_home_and_variables_are_replaced_in_every_path(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("STORE", str(tmp_path))
    keys = ["output=~/runs", "data.source=jsonl:~/train.jsonl", "data.eval_source=jsonl:${STORE}/dev.jsonl"]
    exp = load_experiment(TINY, [*keys, *(f"clients.{n}.source=jsonl:$STORE/{n}.jsonl" for n in range(4))])
    assert str(exp.run_dir) == "/home/me/runs/tiny"
    assert exp.data.source == "jsonl:/home/me/train.jsonl" and exp.data.eval_source == f"jsonl:{tmp_path}/dev.jsonl"
    assert exp.clients[3].source == f"jsonl:{tmp_path}/3.jsonl"
    assert f"{tmp_path}/moe/config.json" in refusal("model.path=$STORE/moe")
    assert "/home/me/ds.json: cannot be read" in refusal("deepspeed=~/ds.json")
    assert load_experiment(TINY, ["output=./~x/a~b"]).output == "./~x/a~b"


HELP = {
    "dmr=true": "dmr: True is not valid: it is a section; write dmr.enabled=true",
    "deepspeed.bf16=true": "deepspeed.bf16: True is not valid: it is a section; write deepspeed.bf16.enabled=true",
    "deepspeed.zero_optimization=1": "deepspeed.zero_optimization: 1 is not valid: it must hold key: value pairs",
    "train=5": "train: 5 is not valid: it is a section, which holds rounds, local_steps",
    "clients.0=phone": "clients.0: 'phone' is not valid: it is a section, which holds name, budget",
    "data.source=train.txt": "data.source: 'train.txt' is not valid: write ./train.txt for a folder of rows",
    "data.source=org/rows": "hub:org/rows for a data set of the hub",
    "data.eval_source=s3://dev.jsonl": "data.eval_source: 's3://dev.jsonl' is not valid: write the path of a file",
    "clients.0.source=org/a": "clients.0.source: 'org/a' is not valid: write ./org/a for a folder of rows, hub:org/a",
    "data.format=chatml": "data.format: 'chatml' is not a format; use one of auto, cloze, messages,",
    "model.path=Qwen/Qwen3-30B-A3B": "is no folder here; write hub:Qwen/Qwen3-30B-A3B if it is a model of the",
    "output=$NOT_SET_HERE/x": "output: '$NOT_SET_HERE/x' names the variable NOT_SET_HERE, which is not set",
    "output=~nobody-here/x": "output: '~nobody-here/x' names a home folder that is not known",
    "train.round=3": "train.round: unknown key (value 3); see docs/configuration.md; did you mean 'rounds'?",
    "clients.0.nam=a": "did you mean 'name'?",
    "clinets=[]": "clinets: unknown key (value []); see docs/configuration.md; did you mean 'clients'?",
    "deepspeed.optimiser=x": "did you mean 'optimizer'?",
    "rounds=3": "did you mean 'train.rounds'?",
    "bf16=true": "bf16: unknown key (value True); see docs/configuration.md; did you mean 'deepspeed.bf16'?",
    "budget=1": "did you mean 'clients.0.budget'?",
    "method=UBSMOE": "did you mean 'ub_smoe'?",
    "merge.rule=fed_avg": "did you mean 'fedavg'?",
    "pseudo_gradient.estimator=linearized": "did you mean 'linearised'?",
    "data.partition=dirichlet_": "did you mean 'dirichlet'?",
    "train.optimizer_state=resett": "did you mean 'reset'?",
    "name=no": "name: False is not valid: Input should be a valid string; write it in quotes (YAML reads yes, no,",
    "name=5": "write it in quotes",
    "name=a b": "name: 'a b' is not valid: it may hold letters, digits",
    "overwrite='true'": "write true or false",
    "train.rounds=1e3": "train.rounds: 1000.0 is not valid: Input should be a valid integer; write 1000",
    "train.rounds=010": "train.rounds: '010' is not valid: Input should be a valid integer; write digits",
    "lora.rank=auto": "lora.rank: 'auto' is not valid: only Hugging Face's Trainer fills in 'auto'",
    f"train.rounds={NINES}": "the value is not valid YAML",
    "seed=1:2.5:" + NINES: "seed: '1:2.5:999",
    "clients.0.ranks=99999999999": "clients.0.ranks: 99999999999 is not valid: Input should be less than 2147483648",
    f"clients.{NINES}.ranks=1": "does not lead to a setting of this experiment",
    "seed=!!bool 3": "the value is not valid YAML",
    "seed=!!timestamp x": "the value is not valid YAML",
    "seed=!!float '1:1:" + NINES + "'": "seed: inf is not valid: it must be a finite number",
}


@pytest.mark.parametrize("override", HELP, ids=lambda text: text[:40])
def test_a_slip_gets_a_line_that_helps(override):
    assert HELP[override] in refusal(override)


def test_offline_is_not_a_wrong_name(monkeypatch):
    error = LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert remedy_for(error).startswith("HF_HUB_OFFLINE is set")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "check the network" in remedy_for(error)
    assert remedy_for(ValueError("Repo id must be in the form")) == "check the name"


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.from_regex(r"[-+]?[0-9:._eExX]{1,8}", fullmatch=True),
    st.sampled_from(["auto", "~", "~/x", "$HOME/x", "${", "jsonl:", "org/name", NINES, "!!int x", "0x", "&a [*a]"]),
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
keys = st.sampled_from([key for key in keys_of(Experiment) if key != "model.path"]) | st.text(max_size=12)


def ends_well(*overrides):
    try:
        load_experiment(TINY, overrides)
    except UserError as error:
        return str(error).isprintable() and str(error) != ""
    return True


@settings(max_examples=75, deadline=None)
@given(keys, values)
def test_any_value_at_any_key_is_an_experiment_or_one_line(key, value):
    assert ends_well(f"{key}={yaml.safe_dump(value, default_flow_style=True)}")


@settings(max_examples=75, deadline=None)
@given(keys, scalars.map(str) | st.text(max_size=30))
def test_any_text_at_any_key_is_an_experiment_or_one_line(key, text):
    assert ends_well(f"{key}={text}")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60) | values.map(yaml.safe_dump))
def test_any_text_is_yaml_or_a_plain_error(text):
    try:
        parse_yaml(text)
    except (ValueError, yaml.YAMLError) as error:
        assert str(error)
