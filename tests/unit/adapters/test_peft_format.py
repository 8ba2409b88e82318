"""Adapters in PEFT's format: by hand, by PEFT itself on transformers' models, and as a round trip."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.families import MODELS, ids_and_mask, saved_family
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
from ubsmoe_ds.adapters.peft_tensors import expert_weights, to_peft
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.models.families import FAMILIES
from ubsmoe_ds.moe.gate import GateConfig

RANK, ALPHA = 2, 6.0


def trained(folder, attention=True):
    """Return a loaded model with random adapters and routers, and these in our names."""
    model = load(
        folder, UBSMoESpec(GateConfig(k=3, candidates=8), lora_rank=RANK, lora_alpha=ALPHA, lora_attention=attention)
    )
    torch.manual_seed(3)
    live = {name: value for name, value in model.named_state().items() if name.endswith((".lora_A", ".lora_B"))}
    live |= {name: value for name, value in model.named_state().items() if name.endswith(".router.weight")}
    for value in live.values():
        value.data.normal_(0, 0.2)
    live |= model.router_biases()
    return model.eval(), {name: value.detach().clone() for name, value in live.items()}


def read(folder):
    return peft_format.read(folder, FAMILIES["olmoe"], num_experts=8)


def save(folder, state, **changes):
    values = {"lora_rank": RANK, "alpha": ALPHA, "base_model": "base", "facts": {"k": "3"}, "family": FAMILIES["olmoe"]}
    peft_format.save(folder, state, **(values | changes))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_peft_computes_our_logits(family, attention, tmp_path):
    """And our reader gets back what was written, to the bit."""
    hf = saved_family(family, tmp_path / "base")
    model, state = trained(tmp_path / "base", attention)
    line = FAMILIES[hf.config.model_type]
    save(tmp_path / "adapter", state, family=line)
    peft = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    ids, used = ids_and_mask()
    with torch.no_grad():
        ours, theirs = model(ids, used), peft(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - base).abs().max() > 0.1  # the adapter does something
    back, rank, scaling = peft_format.read(tmp_path / "adapter", line, num_experts=8)
    outside = {n for n in state if n.endswith(".correction") and "correction" not in line.router.saved}
    assert (rank, scaling) == (RANK, ALPHA / RANK) and set(back) == set(state) - outside
    assert all(torch.equal(back[name], state[name]) for name in back)


def test_peft_computes_our_logits_with_rslora(tmp_path):
    """alpha 5 over sqrt(2): the same numbers as alpha 5 sqrt(2) over 2, in PEFT and after a round trip."""
    hf = saved_family("qwen3_moe", tmp_path / "base")
    spec = {"lora_rank": RANK, "lora_alpha": 5 * RANK**0.5, "lora_attention": True}
    model = load(tmp_path / "base", UBSMoESpec(GateConfig(k=3, candidates=8), **spec)).eval()
    _, state = trained(tmp_path / "base")
    for name, value in state.items():
        model.named_state()[name].data.copy_(value)
    save(tmp_path / "adapter", state, alpha=5.0, rslora=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["use_rslora"] is True
    peft = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    ids, used = ids_and_mask()
    with torch.no_grad():
        assert (model(ids, used) - peft(input_ids=ids).logits).abs().max() < 1e-4
    back, rank, scaling = read(tmp_path / "adapter")
    assert rank == RANK and scaling == pytest.approx(5 / RANK**0.5)
    for name, value in state.items():
        torch.testing.assert_close(back[name], value, rtol=1e-6, atol=0)


def test_a_round_trip_is_equal_to_the_bit(tmp_path):
    saved_family("qwen3_moe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    state["layers.0.phi"] = torch.randn(8)
    save(tmp_path / "adapter", state)
    back, rank, scaling = read(tmp_path / "adapter")
    assert (rank, scaling) == (RANK, ALPHA / RANK) and set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "ubsmoe.safetensors",
    ]


def test_the_files_of_two_adapters_do_not_pass_for_one(tmp_path):
    """As a process leaves them that is killed while it gives new files their names; older versions wrote no digest."""
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    folder, base = tmp_path / "adapter", str(tmp_path / "base")
    for scale in (1.0, 2.0):
        both = {name: value * scale for name, value in state.items()} | {"layers.0.phi": torch.full((8,), scale)}
        save(tmp_path / f"{scale:g}", both, base_model=base)
    shutil.copytree(tmp_path / "1", folder)
    assert read_adapter(folder).state["layers.0.phi"][0] == 1
    shutil.copy(tmp_path / "2" / peft_format.WEIGHTS, folder)
    with pytest.raises(UserError, match="model.safetensors' is not the file that .*/ubsmoe.safetensors' was saved"):
        read_adapter(folder)
    (folder / peft_format.WEIGHTS).unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors' cannot be read"):
        read_adapter(folder)
    shutil.copy(tmp_path / "2" / peft_format.WEIGHTS, folder)
    sidecar = folder / peft_format.SIDECAR
    save_file(load_file(sidecar), sidecar, metadata={"k": "3", "base_model": base})
    assert read_adapter(folder).state["layers.0.phi"][0] == 1


def test_the_weights_are_named_before_the_file_that_has_their_digest(tmp_path, monkeypatch):
    """So that whatever a killed process leaves of two adapters is noticed."""
    saved_family("olmoe", tmp_path / "base")
    named, really = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, target: (named.append(target.name), really(path, target))[1])
    save(tmp_path / "adapter", trained(tmp_path / "base")[1])
    assert (named[0], named[-1]) == (peft_format.WEIGHTS, peft_format.SIDECAR)


def test_gate_and_up_become_one_adapter_by_hand():
    """E = 2, R = 1, D = 2, F = 1: A stacks the experts, gate then up in each; B stacks them for each rank."""
    state = {
        "layers.0.experts.gate.lora_A": torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]]),
        "layers.0.experts.up.lora_A": torch.tensor([[[3.0, 4.0]], [[7.0, 8.0]]]),
        "layers.0.experts.gate.lora_B": torch.tensor([[[10.0]], [[30.0]]]),
        "layers.0.experts.up.lora_B": torch.tensor([[[20.0]], [[40.0]]]),
        "layers.0.experts.down.lora_A": torch.tensor([[[1.0]], [[2.0]]]),
        "layers.0.experts.down.lora_B": torch.tensor([[[3.0], [4.0]], [[5.0], [6.0]]]),
    }
    tensors = to_peft(state, FAMILIES["olmoe"])
    prefix = "base_model.model.model.layers.0.mlp.experts."
    assert tensors[prefix + "base_layer.lora_A.weight"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert tensors[prefix + "base_layer.lora_B.weight"].tolist() == [[10, 30, 0, 0], [0, 0, 20, 40]]
    assert tensors[prefix + "lora_A.weight"].tolist() == [[1], [2]]
    assert tensors[prefix + "lora_B.weight"].tolist() == [[3, 5], [4, 6]]


def test_adapters_that_peft_trained_are_read(tmp_path):
    """PEFT's own adapter, whose gate and up share an A, gives the same logits in our model."""
    hf = saved_family("olmoe", tmp_path / "base")
    lora = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "v_proj"],
        target_parameters=list(expert_weights(FAMILIES["olmoe"])),
    )
    peft = get_peft_model(hf, lora).eval()
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    peft.save_pretrained(tmp_path / "adapter")
    state, rank, _ = read(tmp_path / "adapter")
    assert rank == RANK
    assert {name.split(".", 2)[2].rsplit(".", 1)[0] for name in state} == {
        "experts.gate",
        "experts.up",
        "experts.down",
        "attention.q_proj",
        "attention.v_proj",
    }
    model = load_trained(read_adapter(tmp_path / "adapter", str(tmp_path / "base")))
    ids, used = ids_and_mask()
    with torch.no_grad():
        assert (model(ids, used) - peft(input_ids=ids).logits).abs().max() < 1e-4
        assert (
            model(ids, used) - AutoModelForCausalLM.from_pretrained(tmp_path / "base")(ids).logits
        ).abs().max() > 0.1
    weights = dict(peft.named_parameters())
    inside = "base_model.model.model.layers.1.mlp.experts."
    A, B = (weights[f"{inside}lora_{factor}.default.weight"] for factor in "AB")
    delta_EDF = torch.einsum("ore,eri->eoi", B.view(16, RANK, 8), A.view(8, RANK, 12))
    ours = state["layers.1.experts.down.lora_B"] @ state["layers.1.experts.down.lora_A"]
    torch.testing.assert_close(ours, delta_EDF)


def test_foreign_and_damaged_adapters_are_named(tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "nothing")
    save(tmp_path / "adapter", state)
    weights = tmp_path / "adapter" / peft_format.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "adapter")


@pytest.mark.parametrize("attention", [False, True])
def test_adapters_run_on_weights_in_bf16(attention, tmp_path):
    """Adapters stay in fp32; the logits are those of fp32 up to the precision of bf16."""
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base", attention)
    save(tmp_path / "adapter", state, base_model=str(tmp_path / "base"))
    adapter = read_adapter(tmp_path / "adapter")
    ids, used = ids_and_mask()
    with torch.no_grad():
        exact, rounded = (load_trained(adapter, dtype)(ids, used) for dtype in (torch.float32, torch.bfloat16))
    assert 0 < (exact - rounded).abs().mean() < 0.1 * exact.std()


@pytest.mark.parametrize(
    "key, value", [("init_lora_weights", "pissa"), ("init_lora_weights", "olora"), ("alora_invocation_tokens", [1, 2])]
)
def test_adapters_that_change_more_than_lora_does_are_refused(key, value, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    save(tmp_path / "adapter", state)
    path = tmp_path / "adapter" / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"adapter_config.json', {key} is "):
        read(tmp_path / "adapter")


def test_a_base_that_is_no_folder_is_named_with_the_option(tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    save(tmp_path / "adapter", state, base_model="allenai/OLMoE-1B-7B-0924")
    sidecar = tmp_path / "adapter" / peft_format.SIDECAR
    save_file(load_file(sidecar), sidecar, metadata={"k": "2", "base_model": "/gone"})
    with pytest.raises(UserError, match="adapter' was trained on '/gone', which is no folder here; use --base FOLDER"):
        read_adapter(tmp_path / "adapter")
    sidecar.unlink()
    with pytest.raises(
        UserError, match="'allenai/OLMoE-1B-7B-0924', which is no folder here; use --base FOLDER, or --base hub:"
    ):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "fact, message",
    [
        (
            {"gate_rescale": "power", "gamma": "0.5"},
            "gate_rescale 'power', which is no longer supported; only none",
        ),
        ({"gate_rescale": "sum_to_one"}, "gate_rescale 'sum_to_one', which is no longer supported"),
        ({"gate_rescale": "ratio"}, "gate_rescale 'ratio', which is no longer supported"),
        ({"modulate": "both"}, "modulate 'both', must be weights or selection"),
    ],
)
def test_an_adapter_with_an_unknown_gate_is_refused(fact, message, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    save(tmp_path / "adapter", state, base_model=str(tmp_path / "base"), facts={"k": "3"} | fact)
    with pytest.raises(UserError, match=f"adapter: its ubsmoe.safetensors says {message}") as raised:
        read_adapter(tmp_path / "adapter")
    assert "\n" not in str(raised.value)
