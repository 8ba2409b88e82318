"""The converted model against Hugging Face's own."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS, ids_and_mask, saved_family, with_k
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.causal_lm import LoraLinear
from ubsmoe_ds.models.conversion import UBSMoESpec, load
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
            ours, theirs = model(ids, used), with_k(hf, k)(ids).logits
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


@pytest.mark.parametrize("family", MODELS)
def test_every_family_equals_hugging_face_at_every_k(family, tmp_path):
    hf = saved_family(family, tmp_path)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=3, candidates=8))).eval()
    ids, used = ids_and_mask()
    for k in (3, 1, 2):
        model.set_active_experts(k)
        with torch.no_grad():
            ours, theirs = model(ids, used), with_k(hf, k)(ids).logits
        assert theirs.std() > 0.1
        assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("family", MODELS)
def test_continuations_of_one_beginning_do_not_see_each_other(family, tmp_path):
    """Beginning 5 6 7, continuations 8 9 and 3 4 in one row, against two rows of their own."""
    saved_family(family, tmp_path)
    model = load(tmp_path, UBSMoESpec(GateConfig(k=2, candidates=8))).eval()
    packed, apart = torch.tensor([[5, 6, 7, 8, 9, 3, 4]]), torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, 3, 4]])
    branch_BS = torch.tensor([[0, 0, 0, 1, 1, 2, 2]])
    with torch.no_grad():
        (together,) = model(packed, torch.ones_like(packed, dtype=torch.bool), None, branch_BS)
        first, second = model(apart, torch.ones_like(apart, dtype=torch.bool))
    torch.testing.assert_close(together[:5], first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together[5:], second[3:], rtol=1e-4, atol=1e-4)


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


def test_a_layer_gives_its_state_only_as_part_of_a_model():
    """DeepSpeed's `save_checkpoint` asks the layer alone, and would look for a module for each expert."""
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=4, candidates=8)))
    assert any("experts" in name for name in model.state_dict())
    with pytest.raises(UserError, match=r"save_checkpoint: .*use the checkpoints of launch/train\.py"):
        model.layers[0].state_dict()
