"""The collector on whole models: against loops over tokens, and how good estimators are on upcycled experts."""

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, OlmoeForCausalLM

from tests.support import reference, tiny
from tests.support.conversion import convert
from tests.support.families import random_model
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import collate, encode
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.pseudo_gradient import Moments

FAMILIES = ["olmoe", "qwen3_moe", "deepseek_v2, grouped", "deepseek_v3", "dots1", "gpt_oss"]


@pytest.mark.parametrize(("family", "quantize"), [*((family, None) for family in FAMILIES), ("gpt_oss", "nf4")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_equals_the_loop_over_tokens(estimator, family, quantize):
    """Every LoRA factor of a model of each kind of router and of experts, with random phi and moments."""
    torch.manual_seed(0)
    model = convert(random_model(family), UBSMoESpec(GateConfig(k=2, candidates=4), quantize=quantize)).train()
    for layer in model.layers:
        layer.experts.moments = Moments(*torch.rand(3, 8, 12))
        layer.gate.phi.data.normal_(0, 0.5)
        for _, B in layer.experts.factors().values():
            B.data.normal_(0, 0.05)
    seen = reference.watch(model.layers)
    collector = PseudoGradientCollector(model.layers, estimator, rho=0.7).attach()
    ids = torch.randint(2, tiny.VOCAB, (2, 8))
    F.cross_entropy(model(ids, torch.ones_like(ids, dtype=torch.bool)).reshape(16, -1), ids.reshape(-1)).backward()
    additions = collector.reduce()
    assert len(additions) == len(model.layers) * 6
    truth = {}
    for layer, record in zip(model.layers, seen, strict=True):
        truth |= getattr(reference, estimator)(layer, record, rho=0.7)
    for parameter, ours in additions:
        assert truth[id(parameter)].abs().max() > 1e-4
        torch.testing.assert_close(ours, truth[id(parameter)], atol=1e-5, rtol=1e-4)


def collected(estimator: str, k: int, noise: float, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (pseudo-gradient, dense oracle by loops), flat, of each layer of an upcycled model on real rows.

    Every expert of the built-in model becomes a copy of the first plus `noise` times its spread, as when upcycled
    experts have diverged; the adapters are those of a client in mid-training (A and B differ between experts).
    """
    hf = OlmoeForCausalLM.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for block in hf.model.layers:
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            first = weight.data[:1].clone()
            weight.data.copy_(first + noise * first.std() * torch.randn(weight.shape, generator=generator))
    model = convert(hf, UBSMoESpec(GateConfig(k=k, candidates=16), lora_rank=4, lora_alpha=8.0, seed=seed)).train()
    for layer in model.layers:
        for _, B in layer.experts.factors().values():
            B.data.normal_(0, 0.01, generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    examples, _ = encode(synthetic.rows(1, seed), tokenizer, 64)
    tokens = collate(examples, 0)
    seen = reference.watch(model.layers)
    collectors = [PseudoGradientCollector([layer], estimator, rho=1.0).attach() for layer in model.layers]
    F.cross_entropy(model(tokens.input_ids, tokens.used, tokens.position_A), tokens.target_A).backward()
    pairs = []
    for layer, record, collector in zip(model.layers, seen, collectors, strict=True):
        truth = reference.dense_oracle(layer, record, rho=1.0)
        both = [(gradient, truth[id(parameter)]) for parameter, gradient in collector.reduce()]
        pairs.append(tuple(torch.cat([part.flatten() for part in side]) for side in zip(*both, strict=True)))
    return pairs


@pytest.mark.parametrize(("seed", "k"), [(0, 1), (1, 2), (0, 4)])
def test_token_weighted_points_along_the_dense_gradient_on_upcycled_experts(seed, k):
    """Cosine in every layer on copies with 30 % noise; 0.940 to 0.982 when measured."""
    for ours, dense in collected("token_weighted", k, 0.3, seed):
        assert F.cosine_similarity(ours, dense, dim=0) > 0.9


def test_collector_oracle_is_the_loops_oracle():
    for ours, dense in collected("dense_oracle", 1, 1.0, 0):
        torch.testing.assert_close(ours, dense, atol=1e-6, rtol=1e-3)


def test_token_weighted_is_exact_for_equal_experts():
    """With equal weights and adapters, inactive experts would have computed the same as the active ones."""
    hf = tiny.hf_model()
    for block in hf.model.layers:
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            weight.data.copy_(weight.data[:1].expand_as(weight))
    model = convert(hf, UBSMoESpec(GateConfig(k=2, candidates=8))).train()
    for layer in model.layers:
        for A, B in layer.experts.factors().values():
            A.data.copy_(A.data[:1].expand_as(A))
            B.data.copy_(torch.randn_like(B[:1]).mul(0.05).expand_as(B))
    seen = reference.watch(model.layers)
    collector = PseudoGradientCollector(model.layers, "token_weighted", rho=1.0).attach()
    ids = torch.randint(2, tiny.VOCAB, (2, 8))
    F.cross_entropy(model(ids, torch.ones_like(ids, dtype=torch.bool)).reshape(16, -1), ids.reshape(-1)).backward()
    additions = collector.reduce()
    truth = {}
    for layer, record in zip(model.layers, seen, strict=True):
        truth |= reference.dense_oracle(layer, record, rho=1.0)
    for parameter, ours in additions:
        assert truth[id(parameter)].abs().max() > 1e-4
        torch.testing.assert_close(ours, truth[id(parameter)], atol=1e-6, rtol=1e-3)


def test_evaluation_and_frozen_passes_collect_nothing():
    model = convert(copy.deepcopy(tiny.hf_model()), UBSMoESpec(GateConfig(k=2, candidates=8))).train()
    collector = PseudoGradientCollector(model.layers, "token_weighted", 1.0).attach()
    ids = torch.randint(2, tiny.VOCAB, (2, 6))
    with torch.no_grad():
        model(ids, torch.ones_like(ids, dtype=torch.bool))
    model.eval()(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
    assert collector.reduce() == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_steps_graph_is_freed(estimator):
    """The hook that reports a layer's gradients is part of the graph it reads, and must not keep it alive."""
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8))).train()
    for layer in model.layers:
        layer.experts.moments = Moments(*torch.ones(3, 8, 12))
    collector = PseudoGradientCollector(model.layers, estimator, 1.0).attach()
    ids = torch.randint(2, tiny.VOCAB, (2, 6))
    seen = []
    for _ in range(4):
        collector.reset()
        model(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
        collector.reset()
        seen.append(weakref.ref(model.layers[0].gate.routing.p_TE))
    gc.collect()
    assert [reference() is not None for reference in seen] == [False, False, False, True]  # the gate keeps its last
