"""Files that claim more than any model or run has are refused before they cost time or memory."""

import json
import struct
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from ubsmoe_ds.adapters.peft_config import read_settings
from ubsmoe_ds.base import files, plain_yaml, tensor_files
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.tensor_files import open_tensors
from ubsmoe_ds.models.families import read_bounded, read_facts
from ubsmoe_ds.models.weights import INDEX, WeightFiles

MIXTURE = {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 4}


@given(start=st.binary(max_size=8), rest=st.binary(max_size=64))
def test_a_header_is_opened_or_refused_whatever_size_it_claims(start, rest, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(start + rest)
    (size,) = struct.unpack("<Q", (start + rest)[:8].ljust(8, b"\0"))
    with pytest.raises(SafetensorError) as caught:
        open_tensors(path)
    assert (f"its header has {size} bytes" in str(caught.value)) == (size > tensor_files.MOST_HEADER)


def test_a_header_of_too_many_tensors_is_not_parsed(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file({f"t{number}": torch.ones(1) for number in range(4)}, path)
    assert len(list(open_tensors(path).keys())) == 4
    monkeypatch.setattr(tensor_files, "MOST_TENSORS", 3)
    monkeypatch.setattr(tensor_files, "safe_open", None)
    with pytest.raises(UserError, match="model.safetensors.*it holds more than 3 tensors"):
        WeightFiles(tmp_path)


def test_an_index_of_too_many_tensors_or_shards_is_refused(tmp_path, monkeypatch):
    shards = {f"t{number}": f"{number}.safetensors" for number in range(4)}
    for number, shard in enumerate(shards.values()):
        save_file({f"t{number}": torch.ones(1)}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shards}))
    assert len(WeightFiles(tmp_path).names) == 4
    for name, message in (("MOST_TENSORS", "names more than 3 tensors"), ("MOST_SHARDS", "names more than 3 files")):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(f"ubsmoe_ds.models.weights.{name}", 3)
            WeightFiles(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 30_000_000}, "num_hidden_layers is 30000000, must be a whole number from 1 to 1024"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None, must be"),
        ({"num_labels": 20_000_000}, "num_labels is 20000000, must be a whole number from 1 to 65536"),
        (
            {"num_hidden_layers": 1000, "num_experts": 66},
            "num_experts is 66 and num_hidden_layers 1000, more than 65536",
        ),
        ({"mlp_only_layers": [0] * 1025}, "mlp_only_layers lists 1025 layers"),
        ({"more": "x" * 2**20}, "more than 1048576 bytes"),
    ],
)
def test_sizes_of_a_models_config_are_bounded(change, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTURE))
    read_facts(tmp_path)
    path.write_text(json.dumps(MIXTURE | change))
    with pytest.raises(UserError, match=message):
        read_facts(tmp_path)


def test_patterns_of_an_adapter_are_bounded(tmp_path):
    path, config = tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    for count, message in ((1024, None), (1025, "rank_pattern has 1025 patterns, must be at most 1024")):
        path.write_text(json.dumps(config | {"rank_pattern": {f"m{number}": 1 for number in range(count)}}))
        with pytest.raises(UserError, match=message) if message else nullcontext():
            read_settings(path)


@given(value=st.one_of(st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False)))
def test_only_whole_numbers_within_bounds_are_layers(value, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": value}))
    if type(value) is int and 1 <= value <= 1024:
        assert read_bounded(folder) == {"num_hidden_layers": value}
    else:
        with pytest.raises(UserError, match="num_hidden_layers is"):
            read_bounded(folder)


@pytest.mark.parametrize("text", ["[" + "1," * 2**20 + "1]", "[" + "[]," * 2**19 + "[]]", "[" + "{}," * 2**19 + "{}]"])
def test_json_of_too_many_values_is_not_parsed(text, monkeypatch):
    monkeypatch.setattr(files.json, "loads", None)
    with pytest.raises(ValueError, match="more than 1048576 values"):
        files.parse_json(text)


@pytest.mark.parametrize(
    "text", ["[" + "1," * 20_000 + "1]", "- 1\n" * 20_000, "a: &a 1\nb: [" + "*a," * 20_000 + "1]"]
)
def test_yaml_of_too_many_values_is_left_unread(text, monkeypatch):
    composed = []
    compose = plain_yaml.yaml.SafeLoader.compose_node
    monkeypatch.setattr(plain_yaml.yaml.SafeLoader, "compose_node", lambda *args: composed.append(1) or compose(*args))
    with pytest.raises(ValueError, match="more than 15000 values"):
        plain_yaml.parse_yaml(text)
    assert len(composed) == plain_yaml.MOST_WRITTEN


def test_yaml_that_is_too_deep_is_left_unread():
    """The loader looks ahead at every open bracket: thousands of them take it many seconds."""
    deep = "[" * plain_yaml.DEEPEST
    with pytest.raises(ValueError, match="nested too deeply"):
        plain_yaml.parse_yaml(f"{deep}[]{']' * plain_yaml.DEEPEST}")
    assert plain_yaml.parse_yaml(f"{'[' * 90}{']' * 90}")
