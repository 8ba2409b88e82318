"""The converted model against Hugging Face's own."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.support import tiny
from tests.support.conversion import convert
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.causal_lm import LoraLinear
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.weights import WeightFiles
from ubsmoe_ds.moe.gate import GateConfig

SHAPES = {
    "olmoe_like": {},
    "wide_experts_grouped_query": {
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "normalised_many_experts": {
        "num_experts": 16,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
    },
}


def ids_and_mask(rows: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return torch.randint(2, tiny.VOCAB, (rows, length)), torch.ones(rows, length, dtype=torch.bool)


def hf_with_k(hf, k):
    changed = copy.deepcopy(hf)
    for layer in changed.model.layers:
        layer.mlp.gate.top_k = k
    return changed


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_face_at_every_k(shape, mode):
    hf = tiny.hf_model(**SHAPES[shape])
    k_max, experts = hf.config.num_experts_per_tok, hf.config.num_experts
    model = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=k_max, candidates=experts))).train(mode == "train")
    ids, used = ids_and_mask()
    for k in (k_max, 1, 2, 3):
        model.set_active_experts(k)
        with torch.no_grad():
            ours, theirs = model(ids, used), hf_with_k(hf, k)(ids).logits
        assert (ours - theirs).abs().max() < 1e-4
        assert theirs.std() > 0.1  # the comparison is about something


def test_padding_changes_nothing_and_is_not_routed():
    hf = tiny.hf_model()
    model = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=4, candidates=8))).train()
    ids, used = ids_and_mask(rows=2, length=9)
    used[1, 6:] = False
    with torch.no_grad():
        logits = model(ids, used)
        alone = hf(ids[1:, :6]).logits
    torch.testing.assert_close(logits[1:, :6], alone, atol=1e-5, rtol=0)
    for layer in model.layers:
        assert int(layer.gate.tokens) == 15
        assert int(layer.gate.routed_E.sum()) == 15 * 4


def test_answer_positions_select_the_same_logits():
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=4, candidates=8))).eval()
    ids, used = ids_and_mask(rows=2, length=5)
    positions = torch.tensor([1, 4, 8])
    with torch.no_grad():
        torch.testing.assert_close(model(ids, used, positions), model(ids, used).reshape(10, -1)[positions])


def test_expert_lora_equals_merged_weights():
    """W x + s B A x must be what Hugging Face computes with W + s B A as its weights."""
    hf = tiny.hf_model()
    model = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=4, candidates=8), lora_rank=3, lora_alpha=6.0)).eval()
    for block, layer in zip(hf.model.layers, model.layers, strict=True):
        for name, (A, B) in layer.experts.factors().items():
            torch.nn.init.normal_(B, std=0.2)
            delta = 2.0 * (B @ A).detach()
            experts, width = block.mlp.experts, hf.config.intermediate_size
            target = {
                "gate": experts.gate_up_proj.data[:, :width],
                "up": experts.gate_up_proj.data[:, width:],
                "down": experts.down_proj.data,
            }[name]
            target += delta
    ids, used = ids_and_mask()
    with torch.no_grad():
        assert (model(ids, used) - hf(ids).logits).abs().max() < 1e-4


def test_attention_lora_equals_peft():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5, bias=False)
    peft = get_peft_model(
        torch.nn.Sequential(copy.deepcopy(linear)), LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    )
    ours = LoraLinear(linear, 3, 3, 6.0, torch.Generator().manual_seed(0))
    weights = dict(peft.named_parameters())
    for key, factor in (("lora_A", ours.lora_A), ("lora_B", ours.lora_B)):
        torch.nn.init.normal_(factor)
        next(p for name, p in weights.items() if key in name).data.copy_(factor)
    x = torch.randn(4, 6)
    torch.testing.assert_close(ours(x), peft(x))


def test_only_adapters_phi_and_router_are_trainable():
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8, phi_range=None), router_trainable=False))
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {
        f"{projection}_lora_{factor}" for projection in ("gate", "up", "down") for factor in "AB"
    }
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8)))
    names = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad}
    assert {"phi", "weight"} < names and len(names) == 8


def test_expert_parallel_slices_are_the_whole_models_experts():
    hf = tiny.hf_model()
    whole = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=2, candidates=8))).layers[1].experts
    for rank in range(4):
        part = (
            convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=2, candidates=8), expert_parallel=4, expert_rank=rank))
            .layers[1]
            .experts
        )
        for name, parameter in part.named_parameters():
            torch.testing.assert_close(parameter, whole.get_parameter(name)[2 * rank : 2 * rank + 2], atol=0, rtol=0)
            assert parameter.allreduce is False and parameter.group_name == "ep_size_4"


def test_conversion_refuses_uneven_experts_and_other_activations():
    with pytest.raises(UserError, match="expert_parallel: 3 does not divide"):
        convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8), expert_parallel=3))
    with pytest.raises(UserError, match="hidden_act 'gelu'"):
        convert(tiny.hf_model(hidden_act="gelu"), UBSMoESpec(GateConfig(k=2, candidates=8)))


COMMON = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES = {
    "olmoe": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, norm_topk_prob=False),
    "olmoe, tied": OlmoeConfig(**COMMON, intermediate_size=12, num_experts=8, tie_word_embeddings=True),
    "olmoe, clipped and scaled": OlmoeConfig(
        **COMMON,
        intermediate_size=12,
        num_experts=8,
        clip_qkv=0.5,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0},
    ),
    # a key that is none of its family's, and that transformers does not heed there
    "mixtral": MixtralConfig(**COMMON, intermediate_size=12, num_local_experts=8, norm_topk_prob=False),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON, moe_intermediate_size=12, num_experts=8, intermediate_size=20, shared_expert_intermediate_size=24
    ),
    "qwen2_moe, every second": Qwen2MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        shared_expert_intermediate_size=24,
        norm_topk_prob=True,
        decoder_sparse_step=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        moe_intermediate_size=12,
        num_experts=8,
        intermediate_size=20,
        norm_topk_prob=True,
        head_dim=8,
        mlp_only_layers=[1],
    ),
}


def saved_family(name, folder, shard_size="20KB"):
    """A random model of the family and its checkpoint in several shards."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name])).eval()  # saving writes the dtype into it
    for parameter in hf.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
        else:  # norms about 1, biases about 0
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    hf.save_pretrained(folder, max_shard_size=shard_size)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return hf


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_hugging_face_at_every_k(family, tmp_path):
    hf = saved_family(family, tmp_path)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=3, candidates=8))).eval()
    ids, used = ids_and_mask()
    for k in (3, 1, 2):
        model.set_active_experts(k)
        for layer in hf.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate.top_k = k
        with torch.no_grad():
            ours, theirs = model(ids, used), hf(ids).logits
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_continuations_of_one_beginning_do_not_see_each_other(family, tmp_path):
    """Beginning 5 6 7, continuations 8 9 and 3 4 in one row, against two rows of their own."""
    saved_family(family, tmp_path)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8))).eval()
    packed, apart = torch.tensor([[5, 6, 7, 8, 9, 3, 4]]), torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 4]])
    branch_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    with torch.no_grad():
        (found,) = model(packed, torch.ones_like(packed, dtype=torch.bool), None, branch_BS)
        first, second = model(apart, torch.ones_like(apart, dtype=torch.bool))
    torch.testing.assert_close(found[:5], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[5:], second[3:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_reads_its_experts_only(family, tmp_path, monkeypatch):
    saved_family(family, tmp_path)
    whole = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))
    read = []
    read_into = WeightFiles.read_into

    def noted(self, target, name):
        read.append(name)
        read_into(self, target, name)

    monkeypatch.setattr(WeightFiles, "read_into", noted)
    for rank in range(4):
        read.clear()
        part = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8), expert_parallel=4, expert_rank=rank))
        assert {int(name.split(".experts.")[1].split(".")[0]) for name in read if ".experts." in name} == {
            2 * rank,
            2 * rank + 1,
        }
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
    index = folder / "model.safetensors.index.json"
    held = json.loads(index.read_text())
    del held["weight_map"]["model.layers.1.mlp.experts.5.up_proj.weight"]
    index.write_text(json.dumps(held))


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


DAMAGES = {
    truncate: r"model-00002-of-\d+\.safetensors' cannot be read \(for tensor 'model\.[a-z0-9_.]+'\): .*; copy it again",
    rename: r"model-00002-of-\d+\.safetensors' is missing; it should hold 'model\.",
    drop_tensor: r"lacks 1 tensors, first 'model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight'",
    other_width: r"'model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight' has the shape \[12, 16\], .* for \[14, 16\]",
    pickled: r"has neither .*; pytorch_model\.bin may run code when read",
    other_family: r"config.json: has model_type 'gpt2'; supported: olmoe, mixtral, qwen2_moe, qwen3_moe",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_named(damage, tmp_path):
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


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_config_that_asks_for_router_logits_does_not_hinder_generation(family, tmp_path):
    """transformers would take them from blocks of its own."""
    saved_family(family, tmp_path)
    set_config(tmp_path, output_router_logits=True)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8))).eval()
    assert model.hf.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] >= 4


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"config.json: cannot be read .*; name a model folder"):
        load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8)))


def test_gradient_equals_hugging_face():
    """The embedding's gradient, which has passed through every gate and expert."""
    hf = tiny.hf_model()
    model = convert(copy.deepcopy(hf), UBSMoESpec(GateConfig(k=4, candidates=8))).train()
    ids, used = ids_and_mask()
    target = torch.randint(0, tiny.VOCAB, (ids.numel(),))
    for network, run in ((model, lambda: model(ids, used)), (hf, lambda: hf(ids).logits)):
        embedding = (network.hf if network is model else network).model.embed_tokens.weight.requires_grad_()
        F.cross_entropy(run().reshape(ids.numel(), -1), target).backward()
        assert embedding.grad.abs().max() > 1e-3
    torch.testing.assert_close(
        model.hf.model.embed_tokens.weight.grad, hf.model.embed_tokens.weight.grad, atol=1e-5, rtol=1e-3
    )
