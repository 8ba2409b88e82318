"""A model folder means here what it means to transformers: equal logits, or a refusal that names the tensor."""

import json
import re
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import INDEX, MODELS, ids_and_mask, saved_family, store, stored_tensors
from tests.unit.models.test_conversion import set_config
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES, SILU
from ubsmoe_ds.models.stored import is_tied, left_out
from ubsmoe_ds.moe.gate import GateConfig

SPEC = UBSMoESpec(GateConfig(k=3, candidates=8))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def theirs(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(ids_and_mask()[0]).logits


def check_equal(folder):
    """Return our model after comparing logits."""
    model = load(folder, SPEC).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(*ids_and_mask()), theirs(folder), atol=1e-5, rtol=1e-5)
    return model


def own_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].roll(1, 0)


def same_head(tensors):
    tensors[HEAD] = tensors[EMBEDDING].clone()


def head_alone(tensors):
    tensors[HEAD] = tensors.pop(EMBEDDING)


def bare_names(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def names_in_memory(tensors):
    for name in list(tensors):
        tensors[name.replace(".block_sparse_moe.", ".mlp.")] = tensors.pop(name)


def recomputed_buffer(tensors):
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(2)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "family, change, tied, another",
    [
        ("olmoe, tied", own_head, False, True),
        ("olmoe, tied", same_head, True, False),
        ("olmoe, tied", head_alone, True, False),
        ("olmoe, tied", bare_names, True, False),
        ("mixtral", names_in_memory, False, False),
        ("qwen3_moe", recomputed_buffer, False, False),
    ],
)
def test_tensors_mean_what_they_mean_to_transformers(family, change, tied, another, shards, tmp_path):
    """`another`: whether the change makes another model of it."""
    saved_family(family, tmp_path)
    before, tensors = theirs(tmp_path), stored_tensors(tmp_path)
    change(tensors)
    store(tmp_path, tensors, shards)
    assert is_tied(check_equal(tmp_path).hf) == tied
    assert ((theirs(tmp_path) - before).abs().max() > 0.1) == another


@pytest.mark.parametrize("family", MODELS)
def test_stacked_experts_are_read(family, tmp_path):
    """As `save_original_format=False` writes them; every rank reads its own."""
    saved_family(family, tmp_path, stacked=True)
    assert any(name.endswith(".experts.gate_up_proj") for name in stored_tensors(tmp_path))
    whole = check_equal(tmp_path)
    part = load(tmp_path, UBSMoESpec(GateConfig(k=3, candidates=8), expert_parallel=4, expert_rank=2))
    for layer, all_layer in zip(part.layers, whole.layers, strict=True):
        for name, value in layer.experts.base().items():
            assert torch.equal(value, all_layer.experts.base()[name][4:6])


def test_a_layer_may_be_stacked_in_part(tmp_path):
    saved_family("qwen3_moe", tmp_path / "single")
    saved_family("qwen3_moe", tmp_path / "stacked", stacked=True)
    tensors = {
        n: v for n, v in stored_tensors(tmp_path / "single").items() if ".0.mlp.experts." not in n or "down" in n
    }
    name = "model.layers.0.mlp.experts.gate_up_proj"
    store(tmp_path / "single", tensors | {name: stored_tensors(tmp_path / "stacked")[name]})
    check_equal(tmp_path / "single")


def single_beside_index(folder, other):
    shutil.copy(other / "model.safetensors", folder)


def index_of_less(folder, other):
    index = json.loads((folder / INDEX).read_text())
    for name in [name for name in index["weight_map"] if ".experts.5." in name]:
        del index["weight_map"][name]
    (folder / INDEX).write_text(json.dumps(index))


def index_of_more(folder, other):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.gone"] = min(index["weight_map"].values())
    (folder / INDEX).write_text(json.dumps(index))


def stale_shard(folder, other):
    shutil.copy(other / "model.safetensors", folder / "model-00004-of-00004.safetensors")


def tensors_twice(folder, other):
    """The index says that the first shard's are meant; transformers takes the last's."""
    shutil.copy(other / "model.safetensors", folder / "model-00004-of-00004.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.gone"] = "model-00004-of-00004.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def variant(folder, other):
    shutil.copy(other / "model.safetensors", folder / "model.fp16.safetensors")


@pytest.mark.parametrize(
    "change, another",
    [
        (single_beside_index, True),
        (index_of_less, False),
        (index_of_more, False),
        (stale_shard, False),
        (tensors_twice, True),
        (variant, False),
    ],
)
def test_of_several_files_those_of_transformers_are_read(change, another, tmp_path):
    """Beside a model in three shards is another in one file; `another`: whether it is the one that is meant."""
    saved_family("olmoe", tmp_path / "meant")
    before, tensors = theirs(tmp_path / "meant"), stored_tensors(tmp_path / "meant")
    store(tmp_path / "meant", tensors, 3)
    shutil.copytree(tmp_path / "meant", tmp_path / "other")
    store(tmp_path / "other", {name: 2 * value for name, value in tensors.items()})
    change(tmp_path / "meant", tmp_path / "other")
    check_equal(tmp_path / "meant")
    assert ((theirs(tmp_path / "meant") - before).abs().max() > 0.1) == another


def refusal(folder):
    with pytest.raises(UserError) as raised:
        load(folder, SPEC)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_every_tensor_is_missed_and_measured(family, stacked, tmp_path):
    """Leave out each tensor of the last layer and those outside, then give it another shape."""
    saved_family(family, tmp_path, stacked=stacked)
    tensors = stored_tensors(tmp_path)
    names = [name for name in tensors if not re.search(r"\.layers\.[01]\.|\.experts\.[1-6]\.", name)]
    assert len(names) > 10
    for name in names:
        left = {other: value for other, value in tensors.items() if other != name}
        store(tmp_path, left)
        named = name.replace(".experts.gate_up_proj", ".experts.").replace(".experts.down_proj", ".experts.")
        if stacked and family == "mixtral":
            named = named.replace(".mlp.", ".block_sparse_moe.")
        assert named in refusal(tmp_path)
        store(tmp_path, left | {name: tensors[name][:-1]})
        assert f"{name!r} has the shape" in refusal(tmp_path)


@pytest.mark.parametrize(
    "extra",
    [
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.gate.bias",
        "model.layers.0.mlp.experts.0.gate_proj.bias",
        "model.layers.0.mlp.experts.8.up_proj.weight",
        "model.layers.0.mlp.experts.gate_up_proj_bias",
        "model.layers.0.mlp.shared_experts.up_proj.weight",
        "model.layers.0.self_attn.sinks",
        "model.layers.3.input_layernorm.weight",
        "model.norm.bias",
        "lm_head.bias",
        "score.weight",
    ],
)
@pytest.mark.parametrize("stacked", [False, True])
def test_a_tensor_without_a_place_is_refused(extra, stacked, tmp_path):
    saved_family("qwen3_moe", tmp_path, stacked=stacked)
    store(tmp_path, stored_tensors(tmp_path) | {extra: torch.zeros(8)})
    assert f"tensor {extra!r} has no place in the model" in refusal(tmp_path)


FURTHER = {  # what the published files of these families hold beside the model, as far as names go
    "deepseek_v3": ["model.layers.3.eh_proj.weight", "model.layers.3.mlp.experts.0.up_proj.weight"],
    "glm4_moe": ["model.layers.3.embed_tokens.weight", "model.layers.3.mlp.gate.e_score_correction_bias"],
    "qwen3_next": ["mtp.fc.weight", "mtp.layers.0.mlp.experts.0.up_proj.weight"],
    "ernie4_5_moe": ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"],
}


@pytest.mark.parametrize("family", FURTHER)
def test_layers_that_predict_further_tokens_are_left_out_as_in_transformers(family, tmp_path):
    saved_family(family, tmp_path)
    store(tmp_path, stored_tensors(tmp_path) | {name: torch.zeros(8) for name in FURTHER[family]})
    set_config(tmp_path, num_nextn_predict_layers=1)
    check_equal(tmp_path)
    usual = sorted(name if name.startswith("model.") else f"model.{name}" for name in FURTHER[family])
    assert left_out(tmp_path) == usual


def test_layers_beyond_those_are_refused(tmp_path):
    saved_family("deepseek_v3", tmp_path)
    extra = "model.layers.4.eh_proj.weight"
    store(tmp_path, stored_tensors(tmp_path) | {extra: torch.zeros(8)})
    set_config(tmp_path, num_nextn_predict_layers=1)
    assert f"tensor {extra!r} has no place" in refusal(tmp_path)


def test_one_k_may_stand_once_a_layer(tmp_path):
    saved_family("hunyuan_v1_moe", tmp_path)
    set_config(tmp_path, moe_topk=[3, 3, 3])
    check_equal(tmp_path)
    set_config(tmp_path, moe_topk=[3, 2, 3])
    assert "moe_topk differs between layers ([3, 2, 3])" in refusal(tmp_path)


def test_single_experts_beside_stacked_ones_are_refused(tmp_path):
    saved_family("olmoe", tmp_path, stacked=True)
    extra = "model.layers.1.mlp.experts.2.down_proj.weight"
    store(tmp_path, stored_tensors(tmp_path) | {extra: torch.zeros(16, 12)})
    assert f"tensor {extra!r} has no place" in refusal(tmp_path)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    saved_family("olmoe", tmp_path)
    store(tmp_path, stored_tensors(tmp_path) | {"norm.weight": torch.ones(16)})
    assert "one tensor under two names, 'model.norm.weight' and 'norm.weight'" in refusal(tmp_path)


def test_what_changes_the_meaning_of_a_folder_is_refused(tmp_path):
    saved_family("mixtral", tmp_path)
    set_config(tmp_path, router_jitter_noise=0.1)
    assert "router_jitter_noise is 0.1" in refusal(tmp_path)
    set_config(tmp_path, router_jitter_noise=0.0, transformers_weights="other.safetensors")
    assert "transformers_weights is 'other.safetensors'" in refusal(tmp_path)
    set_config(tmp_path, transformers_weights=None)
    check_equal(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json: transformers would add this adapter" in refusal(tmp_path)


@pytest.mark.parametrize("name", SILU)
def test_names_of_one_activation_are_equal(name, tmp_path):
    saved_family("qwen2_moe", tmp_path)
    set_config(tmp_path, hidden_act=name)
    check_equal(tmp_path)


def test_the_names_of_silu_are_those_of_transformers():
    x = torch.linspace(-4, 4, 33)

    def is_silu(name):
        try:
            return torch.equal(ACT2FN[name](x), F.silu(x))
        except (ImportError, RuntimeError, TypeError):  # needs a device or arguments
            return False

    assert {name for name in ACT2FN if is_silu(name)} == set(SILU)


def add_module(block):
    block.norm = nn.Linear(2, 2)


def add_parameter(block):
    block.experts.norm = nn.Parameter(torch.zeros(2))


def add_buffer(block):
    block.gate.register_buffer("norm", torch.zeros(2))


def add_module_without_weights(block):
    block.gate.norm = nn.Identity()


@pytest.mark.parametrize("change", [add_module, add_parameter, add_buffer, add_module_without_weights])
def test_what_a_block_holds_beside_the_known_is_refused(change):
    hf = tiny.hf_model()
    change(hf.model.layers[1].mlp)
    with pytest.raises(UserError, match=r"a block of this model.* has '(gate\.|experts\.)?norm"):
        convert(hf, UBSMoESpec(GateConfig(k=2, candidates=8)))


def test_every_family_knows_its_shared_modules(monkeypatch):
    monkeypatch.setitem(vars(FAMILIES["qwen2_moe"]), "shared", ("shared_expert",))
    with pytest.raises(UserError, match="has 'shared_expert_gate'"):
        convert(AutoModelForCausalLM.from_config(MODELS["qwen2_moe"]), SPEC)
