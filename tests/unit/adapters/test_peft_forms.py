"""Every form in which PEFT saves LoRA: read with PEFT's own logits, or refused by naming the form."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.support.families import MODELS, ids_and_mask, saved_family
from tests.unit.adapters.test_peft_format import ALPHA, RANK, save, trained
from ubsmoe_ds.adapters import peft_format
from ubsmoe_ds.adapters.adapter import load_trained, read_adapter
from ubsmoe_ds.adapters.merged import write_merged
from ubsmoe_ds.adapters.peft_tensors import expert_weights
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.families import FAMILIES

ATTENTION = ["q_proj", "v_proj"]
GATE_UP, DOWN = expert_weights(FAMILIES["olmoe"])
FORMS = {
    "gate and up": {"target_parameters": [GATE_UP]},
    "down": {"target_parameters": [DOWN]},
    "short names": {"target_parameters": ["gate_up_proj", "down_proj"]},
    "one layer's weight": {"target_parameters": ["model.layers.2.mlp.experts.down_proj"]},
    "attention": {"target_modules": ATTENTION},
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 2]},
    "router": {"target_modules": ATTENTION, "modules_to_save": ["mlp.gate"]},
    "rsLoRA": {"target_modules": ATTENTION, "target_parameters": [GATE_UP, DOWN], "use_rslora": True},
    "odd rank": {"target_parameters": [GATE_UP], "r": 3},
    "ranks": {
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {"q_proj": 5, "mlp.experts.down_proj": 3},
    },
    "scalings": {
        "target_modules": ATTENTION,
        "target_parameters": [GATE_UP, DOWN],
        "rank_pattern": {r"layers\.1\..*v_proj": 4, "gate_up_proj": 1},
        "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 7, "v_proj": 2, "down_proj": 9.5},
        "use_rslora": True,
    },
    "modules of the experts": {"target_modules": ["gate_proj", "up_proj", "down_proj", "q_proj"]},
}


def randomised(folder, hf, **settings):
    """Save PEFT's own adapter with random factors, and return the model with it."""
    peft = get_peft_model(hf, LoraConfig(**({"r": RANK, "lora_alpha": ALPHA, "target_modules": []} | settings))).eval()
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data.normal_(0, 0.2)
    peft.save_pretrained(folder)
    return peft


def check_logits(folder, base, theirs, at_least=0.01):
    """Compare the loaded adapter with PEFT's model to 1e-5, and with the base, from which it must differ."""
    ids, used = ids_and_mask()
    with torch.no_grad():
        ours, theirs = load_trained(read_adapter(folder, str(base)))(ids, used), theirs(input_ids=ids).logits
        without = AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())
    assert (ours - without).abs().max() > at_least


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("form", FORMS)
def test_what_peft_saves_is_read_with_its_logits(form, family, tmp_path):
    hf = saved_family(family, tmp_path / "base")
    settings = FORMS[form]
    if family == "mixtral" and form.startswith("modules of"):
        settings = {"target_modules": ["w1", "w2", "w3", "q_proj"]}
    peft = randomised(tmp_path / "adapter", hf, **settings)
    check_logits(tmp_path / "adapter", tmp_path / "base", peft)


@pytest.mark.parametrize("family", MODELS)
def test_what_peft_saves_of_every_family_is_read_with_its_logits(family, tmp_path):
    hf = saved_family(family, tmp_path / "base")
    peft = randomised(tmp_path / "adapter", hf, **FORMS["short names"])
    check_logits(tmp_path / "adapter", tmp_path / "base", peft)


@pytest.mark.parametrize("form", ["gate and up", "scalings"])
def test_what_peft_saves_is_merged_with_its_logits(form, tmp_path):
    hf = saved_family("olmoe", tmp_path / "base")
    peft = randomised(tmp_path / "adapter", hf, **FORMS[form])
    adapter = read_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    write_merged(tmp_path / "base", adapter.state, adapter.scaling, tmp_path / "out", whole=False)
    ids, _ = ids_and_mask()
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(ids).logits
        theirs = peft(input_ids=ids).logits
    assert (merged - theirs).abs().max() <= 1e-5 * max(1.0, theirs.abs().max())


def save_single(folder, block, projections, experts=8, **settings):
    """Save an adapter in which each expert has modules of its own, as PEFT did for transformers 4."""
    torch.manual_seed(2)
    tensors = {}
    for layer in range(3):
        for expert in range(experts):
            for name, (inputs, outputs) in zip(projections, [(16, 12), (16, 12), (12, 16)], strict=True):
                prefix = f"base_model.model.model.layers.{layer}.{block}.experts.{expert}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(RANK, inputs)
                tensors[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(outputs, RANK)
    folder.mkdir()
    save_file(tensors, folder / peft_format.WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA}
    config |= {"base_model_name_or_path": "base", "target_modules": list(projections), "inference_mode": True}
    (folder / peft_format.CONFIG).write_text(json.dumps(config | settings))


@pytest.mark.parametrize(
    "family, block, projections",
    [("olmoe", "mlp", ("gate_proj", "up_proj", "down_proj")), ("mixtral", "block_sparse_moe", ("w1", "w3", "w2"))],
)
def test_adapters_of_single_experts_are_read(family, block, projections, tmp_path):
    hf = saved_family(family, tmp_path / "base")
    save_single(tmp_path / "adapter", block, projections)
    check_logits(tmp_path / "adapter", tmp_path / "base", PeftModel.from_pretrained(hf, tmp_path / "adapter").eval())


@pytest.mark.parametrize(
    "settings, experts, message",
    [
        ({"use_rslora": True}, 8, "is an adapter of one expert with rsLoRA or a pattern"),
        ({"alpha_pattern": {"up_proj": 3}}, 8, "is an adapter of one expert with rsLoRA or a pattern"),
        ({}, 7, "of 'layers.0.experts.down' expert 7 is missing; the model has 8 experts"),
        ({}, 9, "of 'layers.0.experts.down' expert 8 has no place; the model has 8 experts"),
        ({"r": 3}, 8, r"lora_A.weight' has the shape \[2, 12\], its config says rank 3"),
    ],
)
def test_adapters_of_single_experts_that_mean_something_else_are_refused(settings, experts, message, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    save_single(tmp_path / "adapter", "mlp", ("gate_proj", "up_proj", "down_proj"), experts, **settings)
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter", str(tmp_path / "base"))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"target_modules": ATTENTION, "use_dora": True}, "use_dora is True, which is not supported"),
        ({"target_modules": ATTENTION, "bias": "all"}, "bias is 'all', must be 'none'"),
        ({"target_modules": ATTENTION, "lora_bias": True}, "lora_bias is True, which is not supported"),
        ({"target_modules": ATTENTION, "init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"target_modules": ATTENTION, "trainable_token_indices": [1, 2]}, "trainable_token_indices is "),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight' is no LoRA; needed is LoRA on experts"),
        (
            {"target_modules": ["lm_head"]},
            r"lm_head.base_layer.weight' is no LoRA; needed is LoRA on experts \(target_p",
        ),
        (
            {"target_modules": "all-linear"},
            r"LoRA on 'model.layers.\d.mlp.gate'; needed is .* modules_to_save mlp.gate",
        ),
        ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, "lm_head.weight' is no LoRA; needed is"),
        ({"target_parameters": ["mlp.gate.weight"]}, r"LoRA on 'model.layers.\d.mlp.gate'; needed is .* modules_to_s"),
    ],
)
def test_other_forms_of_peft_are_refused_by_name(settings, message, tmp_path):
    randomised(tmp_path / "adapter", saved_family("olmoe", tmp_path / "base"), **settings)
    with pytest.raises(UserError, match=message) as raised:
        read_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', must be 'LORA'"),
        ({"target_parameters": None}, f"target_parameters names none of {GATE_UP} and {DOWN}"),
        ({"target_parameters": [GATE_UP, DOWN]}, "one adapter of 'model.layers.0.mlp.experts', but target_parameters"),
        ({"target_parameters": "down_proj"}, "target_parameters is 'down_proj', must be a list of names"),
        ({"rank_pattern": {"(a+)+b": 2}}, r"rank_pattern has the pattern '\(a\+\)\+b'; write names of modules"),
        ({"alpha_pattern": {"down_proj": "2"}}, "alpha_pattern of 'down_proj' is '2', must be a number above 0"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000000"),
        ({"lora_alpha": 0}, "lora_alpha is 0, must be a number above 0"),
        ({"r": 10**9}, "r is 1000000000, must be a whole number from 1 to 65536"),
    ],
)
def test_a_config_that_does_not_fit_the_tensors_is_refused(change, message, tmp_path):
    randomised(tmp_path / "adapter", saved_family("olmoe", tmp_path / "base"), target_parameters=[DOWN])
    path = tmp_path / "adapter" / peft_format.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "adapter", str(tmp_path / "base"))


def test_pickled_adapters_are_refused_by_name(tmp_path):
    hf = saved_family("olmoe", tmp_path / "base")
    peft = get_peft_model(hf, LoraConfig(target_modules=ATTENTION))
    peft.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    with pytest.raises(UserError, match=r"adapter_model.bin may run code when read: save it as safetensors"):
        read_adapter(tmp_path / "adapter", str(tmp_path / "base"))


@pytest.mark.parametrize("kept", [("down",), ("gate", "up"), ("attention",), ("gate", "up", "down")])
def test_an_adapter_of_some_parts_is_written_whole(kept, tmp_path):
    """Nothing is dropped: PEFT computes our logits, and reading gives the same tensors back."""
    hf = saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    state = {name: value for name, value in state.items() if set(name.split(".")) & set(kept)}
    save(tmp_path / "adapter", state, base_model=str(tmp_path / "base"))
    check_logits(tmp_path / "adapter", tmp_path / "base", PeftModel.from_pretrained(hf, tmp_path / "adapter").eval())
    back = read_adapter(tmp_path / "adapter").state
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "left_out, message",
    [
        ("layers.0.experts.up.", "PEFT has gate and up only together"),
        (".experts.up.", "PEFT has gate and up only together"),
        ("layers.1.experts.down.", "the same of experts in all layers"),
        ("layers.1.experts.down.lora_B", "tensor 'layers.1.experts.down.lora_A' has no counterpart"),
    ],
)
def test_what_peft_has_no_form_for_is_not_written(left_out, message, tmp_path):
    saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    state = {name: value for name, value in state.items() if left_out not in name}
    with pytest.raises(UserError, match=message):
        save(tmp_path / "adapter", state)
    with pytest.raises(UserError, match="tensor 'layers.0.experts.up.weight' has no form in PEFT"):
        save(tmp_path / "adapter", {"layers.0.experts.up.weight": torch.zeros(8, 12, 16)})
    assert not (tmp_path / "adapter").exists()


def test_gate_and_up_that_peft_trained_on_are_read(tmp_path):
    """PEFT trains our joined adapter as one, so gate and up mix; it is then an adapter of twice the rank for both."""
    hf = saved_family("olmoe", tmp_path / "base")
    _, state = trained(tmp_path / "base")
    save(tmp_path / "adapter", state, base_model=str(tmp_path / "base"))
    path = tmp_path / "adapter" / peft_format.WEIGHTS
    tensors = load_file(path)
    name = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
    tensors[name] += 0.1 * torch.randn(tensors[name].shape)
    save_file(tensors, path)
    (tmp_path / "adapter" / peft_format.SIDECAR).unlink()
    check_logits(tmp_path / "adapter", tmp_path / "base", PeftModel.from_pretrained(hf, tmp_path / "adapter").eval())
