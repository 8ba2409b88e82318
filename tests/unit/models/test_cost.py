"""FLOPs and parameters against torch's own counts of a plain loop, which does the products that are needed."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe
from transformers.models.qwen3_next import modeling_qwen3_next

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import MODELS
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.models.cost import ModelShape, flops_per_token, step_flops, trainable_parameters
from ubsmoe_ds.models.hf_config import model_shape
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.layer import UBSMoELayer

ROWS, LENGTH, RANK = 2, 7, 3
ANSWERS = torch.tensor([3, 4, 9])


def plain_experts(layer: UBSMoELayer, x, used_token, _seen):
    """Run the experts one by one, for autograd: the block's own products are padded and stacked."""
    x_TD = x.reshape(-1, x.shape[-1])
    weight_KT = layer.gate(x_TD, used_token)[5]
    index_KT, experts = layer.gate.routing.index_KT, layer.experts
    base, factors, y_TD = experts.base(), experts.factors(), torch.zeros_like(x_TD)
    for e in range(experts.num_experts):

        def project(name, value, e=e):
            A, B = (factor[e] for factor in factors[name])
            return F.linear(value, base[name][e]) + experts.scaling * F.linear(F.linear(value, A), B)

        route_N, token_N = (index_KT == e).nonzero(as_tuple=True)
        x_ND = x_TD[token_N]
        y_ND = project("down", experts.activation(project("gate", x_ND), project("up", x_ND)))
        y_TD = y_TD.index_add(0, token_N, weight_KT[route_N, token_N].unsqueeze(1) * y_ND)
    return y_TD.view_as(x)


def without_recurrence(query, key, value, g, beta, **_):
    """Return something of the values' shape that depends on everything, without products."""
    return value * (query.sum() + key.sum() + g.sum() + beta.sum()), None


def counted(name: str, k: int, *, router: bool, attention: bool, again: bool) -> tuple[int, int, ModelShape]:
    """Return torch's FLOPs of (a forward pass alone, a training step) of a model of this family, and its sizes."""
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(copy.deepcopy(MODELS[name]), attn_implementation="eager")
    shape = model_shape(hf.config, lora_rank=RANK, lora_attention=attention)
    spec = UBSMoESpec(GateConfig(k, 8), lora_rank=RANK, lora_attention=attention, router_trainable=router)
    model = convert(hf, spec).train()
    if again:
        model.checkpoint_activations()
    assert trainable_parameters(shape, router) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    ids = torch.randint(2, tiny.VOCAB, (ROWS, LENGTH))
    run = partial(model, ids, torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        run()
    with FlopCounterMode(display=False) as step:
        F.cross_entropy(run(ANSWERS), torch.tensor([5, 6, 7])).backward()
    return forward.get_total_flops(), step.get_total_flops(), shape


@pytest.mark.parametrize(
    ("name", "k", "router", "attention"),
    [
        ("olmoe", 1, False, False),
        ("olmoe", 3, True, False),
        ("olmoe", 3, False, True),
        ("olmoe", 1, True, True),
        ("qwen2_moe, every second", 3, True, False),  # its first layer is dense, and it has a shared expert
        ("qwen2_moe, every second", 1, False, True),
        ("qwen3_moe", 1, False, False),  # its second layer is dense
        ("qwen3_moe", 3, True, True),
        ("flex_olmo", 3, True, True),
        ("mixtral", 3, True, True),
        ("granitemoe", 3, True, True),
        ("granitemoeshared", 3, True, False),
        ("deepseek_v2", 3, True, True),  # latent attention, its first layer is dense
        ("deepseek_v2", 1, False, False),
        ("deepseek_v3", 3, True, True),
        ("deepseek_v3", 3, True, False),
        ("glm4_moe", 3, True, False),
        ("dots1", 3, True, True),
        ("ernie4_5_moe", 3, True, True),
        ("hunyuan_v1_moe", 3, True, False),
        ("minimax_m2", 3, True, True),
        ("gpt_oss", 3, True, True),
        ("qwen3_next", 3, True, True),  # its first layer is dense and a recurrence
        ("qwen3_next", 3, True, False),
        ("qwen3_5_moe_text", 3, True, True),
    ],
)
@pytest.mark.parametrize("again", [False, True], ids=["kept", "again"])
def test_flops_are_those_that_torch_counts(name, k, router, attention, again, monkeypatch):
    """To the unit; a recurrence itself is left out, which torch runs in chunks and we count token by token."""
    for module in (modeling_qwen3_next, modeling_qwen3_5_moe):
        monkeypatch.setattr(module, "causal_conv1d_fn", lambda x, *_, **__: x)
        monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", without_recurrence)
    monkeypatch.setattr(UBSMoELayer, "_forward_on_one_rank", plain_experts)
    forward, step, shape = counted(name, k, router=router, attention=attention, again=again)
    if shape.recurrence is not None:
        shape = replace(shape, recurrence=replace(shape.recurrence, per_token=0.0))
    tokens = ROWS * LENGTH
    assert tokens * flops_per_token(shape, k, LENGTH) == forward
    # nothing of the plain loop and of eager attention is kept from the first pass
    shape = replace(shape, fused_attention=False)
    assert step_flops(shape, k, tokens, LENGTH, len(ANSWERS), router=router, again=again, spread=True) == step


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_kept_is_not_computed_again(adapted):
    """Of three layers the first is dense: without LoRA on attention nothing of it is computed again anyway.

    Scores and sums of 2 heads of 4 over 7 tokens: 2 * 7 * (8 + 8) = 224 FLOPs a token and layer. Down of 3 experts with
    LoRA rank 2: 2 * 16 * (12 + 2) = 448 a route.
    """
    shape = ModelShape(3, 16, 12, 8, 2, 2, 4, 61, lora_rank=2, lora_attention=adapted)
    shape = replace(shape, dense_layers=1, leading_dense=1, dense_width=20)
    flops = partial(step_flops, k=3, tokens=10, context=7, answers=3, router=True, again=True)
    nothing = flops(replace(shape, fused_attention=False), spread=True)
    assert nothing - flops(shape, spread=True) == 10 * (3 if adapted else 2) * 224
    assert flops(shape, spread=True) - flops(shape) == 10 * 2 * 3 * 448
    kept = flops(shape, again=False)
    assert flops(replace(shape, fused_attention=False), again=False, spread=True) == kept < flops(shape)


@pytest.mark.parametrize("k", [1, 8])
def test_forward_flops_are_those_of_transformers(k):
    hf = tiny.hf_model(num_experts_per_tok=k, num_key_value_heads=1, vocab_size=97)
    hf.set_experts_implementation("eager")
    hf.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(torch.randint(2, 97, (1, LENGTH)))
    assert LENGTH * flops_per_token(model_shape(hf.config), k, LENGTH) == counter.get_total_flops()


def test_lowest_budget_halves_the_flops_of_olmoe():
    """OLMoE-1B-7B at K = 2 of 8: the paper reports 45 % fewer FLOPs."""
    olmoe = ModelShape(16, 2048, 1024, 64, 16, 16, 128, 50304, lora_rank=8)
    poor, rich = (step_flops(olmoe, k, 16 * 512, 512, 16 * 8, router=True) for k in (2, 8))
    assert 0.45 < poor / rich < 0.55


@pytest.mark.parametrize("attention", [False, True])
def test_trainable_parameters_are_counted(attention):
    spec = UBSMoESpec(GateConfig(k=2, candidates=8), lora_rank=3, lora_attention=attention)
    hf = tiny.hf_model(num_key_value_heads=1)
    shape = model_shape(hf.config, lora_rank=3, lora_attention=attention)
    model = convert(hf, spec)
    assert trainable_parameters(shape, router=True) == sum(p.numel() for p in model.parameters() if p.requires_grad)
