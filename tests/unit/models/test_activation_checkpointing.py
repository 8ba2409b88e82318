"""Layers computed again in backward: the same bits, everything counted once, and less memory."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import tiny
from tests.support.conversion import convert
from tests.support.families import random_model
from ubsmoe_ds.models.causal_lm import KEPT
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.moe.activations import SwiGLU
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.pseudo_gradient import Moments


def step(
    family: str, estimator: str, *, again: bool, attention: bool, quantize: str | None = None
) -> dict[str, torch.Tensor]:
    """Return all results of two micro-batches: gradients, pseudo-gradients, counts, sums of moments, losses."""
    torch.manual_seed(0)
    gate = GateConfig(k=2, candidates=4, capacity_factor=0.75, learned_scale=True)
    model = convert(random_model(family), UBSMoESpec(gate, lora_attention=attention, quantize=quantize)).train()
    for layer in model.layers:
        layer.experts.moments = Moments(*torch.rand(3, 8, 12))
        layer.experts.moment_every, layer.experts.moment_sums_EX = 2, torch.zeros(8, 37)
        layer.gate.phi.data.normal_(0, 0.5)
        for _, B in layer.experts.factors().values():
            B.data.normal_(0, 0.05)
    if again:
        model.checkpoint_activations()
    collector = PseudoGradientCollector(model.layers, estimator, 0.7, tokens_per_expert=3).attach()
    losses = []
    for _ in range(2):
        ids = torch.randint(2, tiny.VOCAB, (2, 8))
        used = torch.ones_like(ids, dtype=torch.bool)
        used[1, 6:] = False
        logits = model(ids, used)
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten()) + model.auxiliary_loss(0.1, 0.3)
        loss.backward()
        losses.append(loss.detach())
    pseudo = {id(p): value for p, value in collector.reduce()}
    results = {"losses": torch.stack(losses)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            results[name] = parameter.grad
            results |= {f"{name} PG": pseudo[id(parameter)]} if id(parameter) in pseudo else {}
    for n, layer in enumerate(model.layers):
        counts = {"routed": layer.gate.routed_E, "kept": layer.gate.kept_E, "tokens": layer.gate.tokens}
        results |= {f"{n} {name}": value for name, value in counts.items()}
        results[f"{n} moments"] = layer.experts.moment_sums_EX
        assert layer.experts.on_backward is None and not layer.gate.recomputing
    return results


CASES = [
    (family, attention, None)
    for family in ("olmoe", "qwen2_moe, every second", "deepseek_v3", "gpt_oss", "qwen3_next")
    for attention in (False, True)
]


@pytest.mark.parametrize(("family", "attention", "quantize"), [*CASES, ("gpt_oss", True, "nf4")])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_results_are_equal_to_the_bit(estimator, family, attention, quantize):
    options = {"attention": attention, "quantize": quantize}
    kept, again = (step(family, estimator, again=again, **options) for again in (False, True))
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name
        assert value.any() or "moments" in name or "lora_A" in name or value.ndim == 0, name


class Watched(SwiGLU):
    """Remembers, weakly, what it computed for each layer's experts."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def factor(self, gate_NF):
        factor_NF = super().factor(gate_NF)
        self.seen.append(weakref.ref(factor_NF))
        return factor_NF


def test_what_a_layer_computed_is_not_kept():
    """Three layers: silu(g) outlives no forward pass; backward computes it again, and once more with the layer."""
    for again in (False, True):
        model = convert(tiny.hf_model(num_hidden_layers=3), UBSMoESpec(GateConfig(k=4, candidates=8))).train()
        watched = Watched()
        for layer in model.layers:
            layer.experts.activation = watched
        if again:
            model.checkpoint_activations()
        ids = torch.randint(2, tiny.VOCAB, (4, 8))
        total = model(ids, torch.ones_like(ids, dtype=torch.bool)).sum()
        gc.collect()
        assert [one() for one in watched.seen] == [None] * 3
        total.backward()
        assert len(watched.seen) == (9 if again else 6)


class Counted(TorchDispatchMode):
    """Counts the operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.runs = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.runs[func] += 1
        return func(*args, **(kwargs or {}))


def test_results_that_are_kept_are_not_computed_again():
    """Of two layers attention and the experts' last product run twice in all; the other products of experts again."""
    runs = []
    for again in (False, True):
        model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=4, candidates=8))).train()
        if again:
            model.checkpoint_activations()
        ids = torch.randint(2, tiny.VOCAB, (4, 8))
        with Counted() as counted:
            model(ids, torch.ones_like(ids, dtype=torch.bool)).sum().backward()
        runs.append(counted.runs)
    for found in runs:
        assert [found[op] for op in KEPT if found[op]] == [2, 2]
    product = torch.ops.aten._grouped_mm.default
    assert runs[1][product] - runs[0][product] == 2 * 3  # A x, gate and up, A h of each layer
