"""Adapters in PEFT's format: by hand, by PEFT itself on transformers' models, and there and back."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.test_model import FAMILIES, ids_and_mask, saved_family
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.models import peft_format
from ubsmoe_ds.models.causal_lm import UBSMoESpec, load

RANK, ALPHA = 2, 6.0


def trained(folder, attention=True):
    """A loaded model whose adapters, routers and phi are no longer those of its base, and its state in our names."""
    model = load(folder, UBSMoESpec(k=3, candidates=8, lora_rank=RANK, lora_alpha=ALPHA, lora_attention=attention))
    torch.manual_seed(3)
    state = {}
    for index, decoder in enumerate(model.decoders):
        if hasattr(decoder.mlp, "experts"):
            for name, pair in decoder.mlp.experts.factors().items():
                for factor, value in zip("AB", pair, strict=True):
                    state[f"layers.{index}.experts.{name}.lora_{factor}"] = value
            state[f"layers.{index}.router.weight"] = decoder.mlp.gate.wg.weight
        for name in peft_format.ATTENTION if attention else ():
            linear = getattr(decoder.self_attn, name)
            state |= {f"layers.{index}.attention.{name}.lora_{f}": getattr(linear, f"lora_{f}") for f in "AB"}
    for value in state.values():
        value.data.normal_(0, 0.2)
    return model.eval(), {name: value.detach().clone() for name, value in state.items()}


def save(folder, state, **changes):
    facts = {"k": "3"}
    peft_format.save(folder, state, **({"rank": RANK, "alpha": ALPHA, "base_model": "base", "facts": facts} | changes))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_our_logits(family, attention, tmp_path):
    hf = saved_family(family, tmp_path / "base")
    model, state = trained(tmp_path / "base", attention)
    save(tmp_path / "adapter", state)
    peft = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    ids, used = ids_and_mask()
    with torch.no_grad():
        ours, theirs = model(ids, used), peft(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - base).abs().max() > 0.1  # the adapter does something


def test_there_and_back_is_equal_to_the_bit(tmp_path):
    saved_family("qwen3_moe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    state["layers.0.phi"] = torch.randn(8)
    save(tmp_path / "adapter", state)
    back, rank, alpha = peft_format.read(tmp_path / "adapter", num_experts=8)
    assert (rank, alpha) == (RANK, ALPHA) and set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ubsmoe.safetensors",
    ]


def test_gate_and_up_become_one_adapter_by_hand():
    """E = 2, R = 1, D = 2, F = 1: A is the experts' rows, gate then up; B rank by rank, a diagonal each expert."""
    state = {
        "layers.0.experts.gate.lora_A": torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]]),
        "layers.0.experts.up.lora_A": torch.tensor([[[3.0, 4.0]], [[7.0, 8.0]]]),
        "layers.0.experts.gate.lora_B": torch.tensor([[[10.0]], [[30.0]]]),
        "layers.0.experts.up.lora_B": torch.tensor([[[20.0]], [[40.0]]]),
        "layers.0.experts.down.lora_A": torch.tensor([[[1.0]], [[2.0]]]),
        "layers.0.experts.down.lora_B": torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]]),
    }
    found = peft_format.to_peft(state)
    prefix = "base_model.model.model.layers.0.mlp.experts."
    assert found[prefix + "base_layer.lora_A.weight"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert found[prefix + "base_layer.lora_B.weight"].tolist() == [[10, 30, 0, 0], [0, 0, 20, 40]]
    assert found[prefix + "lora_A.weight"].tolist() == [[1], [2]]
    assert found[prefix + "lora_B.weight"].tolist() == [[3, 5], [4, 6]]


def test_adapters_that_peft_trained_come_in(tmp_path):
    """PEFT's own adapter of down and attention, saved by PEFT, gives its logits in our model."""
    hf = saved_family("olmoe", tmp_path / "base")
    lora = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], target_parameters=[peft_format.DOWN]
    )
    peft = get_peft_model(hf, lora).eval()
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    peft.save_pretrained(tmp_path / "adapter")
    state, rank, _ = peft_format.read(tmp_path / "adapter", num_experts=8)
    assert rank == RANK
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in state} == {
        "experts.down",
        "attention.q_proj",
        "attention.v_proj",
    }
    weights = dict(peft.named_parameters())
    inside = "base_model.model.model.layers.1.mlp.experts."
    A, B = (weights[f"{inside}lora_{factor}.default.weight"] for factor in "AB")
    delta_EDF = torch.einsum("ore,eri->eoi", B.view(16, RANK, 8), A.view(8, RANK, 12))
    ours = state["layers.1.experts.down.lora_B"] @ state["layers.1.experts.down.lora_A"]
    torch.testing.assert_close(ours, delta_EDF)


def test_foreign_and_damaged_adapters_are_named(tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    with pytest.raises(UserError, match=r"adapter: tensor 'base_model.model.lm_head.lora_A.weight' is none"):
        peft_format.from_peft({"base_model.model.lm_head.lora_A.weight": torch.zeros(1)}, 8)
    mixed = peft_format.to_peft(state)
    mixed["base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"].fill_(1.0)
    with pytest.raises(UserError, match="mixes gate and up"):
        peft_format.from_peft(mixed, 8)
    with pytest.raises(UserError, match="cannot be read"):
        peft_format.read(tmp_path / "nothing", 8)
    save(tmp_path / "adapter", state)
    weights = tmp_path / "adapter" / peft_format.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        peft_format.read(tmp_path / "adapter", 8)
