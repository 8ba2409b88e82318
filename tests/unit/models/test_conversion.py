"""Loading and converting: each rank reads its own experts, and what is damaged or unsupported is named."""

import json

import pytest
import torch

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS, saved_family, store, stored_tensors
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.models.weights import WeightFiles
from ubsmoe_ds.moe.gate import GateConfig


def test_every_family_has_a_model_here():
    """A new family is one entry of `FAMILIES` and one of `MODELS`; then all tests of families run with it."""
    assert {config.model_type for config in MODELS.values()} == set(FAMILIES)
    assert set(FAMILIES) <= set(MODELS)  # a family's plain model has its name


def test_conversion_refuses_uneven_experts_and_other_activations():
    with pytest.raises(UserError, match="expert_parallel: 3 does not divide"):
        convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8), expert_parallel=3))
    with pytest.raises(UserError, match="hidden_act 'gelu'"):
        convert(tiny.hf_model(hidden_act="gelu"), UBSMoESpec(GateConfig(k=2, candidates=8)))


@pytest.mark.parametrize("family", MODELS)
def test_every_rank_reads_its_experts_only(family, tmp_path, monkeypatch):
    saved_family(family, tmp_path)
    whole = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))
    read = []
    read_into = WeightFiles.read_into

    def noted(self, target, name, part=None):
        if ".experts." in name:
            single = name.split(".experts.")[1].split(".")[0]
            read.append(part[0].start if part else int(single))
            assert part is None or part[0].stop == part[0].start + 1
        read_into(self, target, name, part)

    monkeypatch.setattr(WeightFiles, "read_into", noted)
    for rank in range(4):
        read.clear()
        part = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8), expert_parallel=4, expert_rank=rank))
        assert set(read) == {2 * rank, 2 * rank + 1}
        for ours, all_ours in zip(part.layers, whole.layers, strict=True):
            for name, parameter in ours.experts.named_parameters():
                assert torch.equal(parameter, all_ours.experts.get_parameter(name)[2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_bf16_weights_are_kept_as_they_are_stored(family, tmp_path):
    hf = saved_family(family, tmp_path / "fp32")
    hf.bfloat16().save_pretrained(tmp_path / "bf16")
    model = load(tmp_path / "bf16", UBSMoESpec(GateConfig(k=2, candidates=8)), torch.bfloat16)
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    assert frozen == {torch.bfloat16}
    stored = next(layer.mlp for layer in hf.model.layers if hasattr(layer.mlp, "experts")).experts.down_proj
    assert torch.equal(model.layers[0].experts.base()["down"], stored)


def truncate(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def rename(folder):
    sorted(folder.glob("*.safetensors"))[1].rename(folder / "elsewhere.safetensors")


def drop_tensor(folder):
    tensors = stored_tensors(folder)
    del tensors["model.layers.1.mlp.experts.5.up_proj.weight"]
    store(folder, tensors)


def other_width(folder):
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 12', '"intermediate_size": 14'))


def pickled(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def set_config(folder, **values):
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))


def other_family(folder):
    set_config(folder, model_type="gpt2")


def link_to_nothing(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    shard.symlink_to(folder / "gone")


def refused_by_transformers(folder):
    set_config(folder, hidden_act=["silu"], hidden_size="wide", transformers_version="9.0")


DAMAGES = {
    truncate: r"00002-of-\d+\.safetensors' cannot be read \(for tensor 'model\.[a-z0-9_.]+'\): .*; it is damaged",
    link_to_nothing: r"00002-of-\d+\.safetensors' is missing; it should hold",
    refused_by_transformers: r"transformers \S+ refuses it, and 9\.0 wrote it \(.*\); correct what it names$",
    rename: r"model-00002-of-\d+\.safetensors' is missing; it should hold 'model\.",
    drop_tensor: r"lacks 1 tensors, first 'model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight'",
    other_width: r"'model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight' has the shape \[12, 16\], .* for \[14, 16\]",
    pickled: r"has neither .*; pytorch_model\.bin may run code when read",
    other_family: r"config.json: has model_type 'gpt2'; supported: olmoe, flex_olmo, mixtral, qwen2_moe, qwen3_moe, ",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_files_are_named(damage, tmp_path):
    saved_family("olmoe", tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=DAMAGES[damage]) as raised:
        load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"decoder_sparse_step": 4}, "none of its 3 layers has experts; see its decoder_sparse_step"),
        ({"mlp_only_layers": [0, 1, 2]}, "none of its 3 layers has experts"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, must be at least 1"),
    ],
)
def test_a_model_without_experts_is_refused(values, message, tmp_path):
    saved_family("qwen3_moe", tmp_path)
    set_config(tmp_path, **values)
    with pytest.raises(UserError, match=f"config.json: {message}"):
        load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_asks_for_router_logits_does_not_hinder_generation(family, tmp_path):
    """transformers would take them from blocks of its own."""
    saved_family(family, tmp_path)
    set_config(tmp_path, output_router_logits=True)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8))).eval()
    assert model.hf.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"config.json: cannot be read .*; name a model folder"):
        load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))
