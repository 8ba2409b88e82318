"""Pseudo-gradients: estimators by hand and against loops, and what they are worth on upcycled experts."""

import copy
import gc
import weakref
from typing import get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, OlmoeForCausalLM

from tests.support import reference, tiny
from tests.support.conversion import convert
from ubsmoe_ds.config.sections import PseudoGradientConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import collate, encode
from ubsmoe_ds.models.conversion import UBSMoESpec
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.experts import StackedExperts
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.pseudo_gradient import (
    ESTIMATORS,
    PROJECTIONS,
    Experts,
    ExpertTokens,
    GradientSums,
    Moments,
    TokenMixture,
    dense_oracle,
    draw_tokens,
    expert_mean,
    inactive_weight,
    linearised,
    moment_values,
    token_weighted,
)


def test_the_config_names_every_estimator():
    """It may not import torch, so its list of names is its own."""
    names = get_args(PseudoGradientConfig.model_fields["estimator"].annotation)
    assert names == ("none", *ESTIMATORS)
    for estimator in ESTIMATORS.values():
        assert (estimator.from_tokens is None) != (estimator.from_sums is None)


def test_inactive_weight_by_hand():
    """rho 0.5, p = (0.1, 0.2, 0.3, 0.4), experts 2 and 3 active: (0.05, 0.1, 0, 0); p is not renormalised."""
    active = torch.tensor([[False, False, True, True]])
    weight = inactive_weight(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), active, 0.5)
    torch.testing.assert_close(weight, torch.tensor([[0.05, 0.1, 0.0, 0.0]]))


def test_expert_mean_by_hand():
    """Masses (0.2, 0, 0.6) over 0.5, gradients summing to 3: (1.2, 0, 3.6); nothing active gives zero, not NaN."""
    total = {name: (torch.full((1, 1), 3.0), torch.full((1, 1), 3.0)) for name in PROJECTIONS}
    found = expert_mean(GradientSums(torch.tensor([0.2, 0.0, 0.6]), torch.tensor(0.5), total))
    torch.testing.assert_close(found["up"][0].flatten(), torch.tensor([1.2, 0.0, 3.6]))
    nothing = expert_mean(GradientSums(torch.zeros(3), torch.tensor(0.0), total))
    assert all((g == 0).all() for pair in nothing.values() for g in pair)


def test_token_weighted_by_hand():
    """All sizes 1, one token, s = 2, c = 0.5, x = 3, delta = 5; A = 7, B = 11 everywhere; mixture (2, 17, 19).

    down: dB = 2 * 0.5 * 5 * (7 * 2) = 70, dA = 2 * 0.5 * (11 * 5) * 2 = 110
    gate: dB = 2 * 0.5 * 17 * (7 * 3) = 357, dA = 2 * 0.5 * (11 * 17) * 3 = 561; up with 19: 399 and 627.
    """
    one = torch.ones(1, 1)
    lora = {name: (torch.full((1, 1, 1), 7.0), torch.full((1, 1, 1), 11.0)) for name in PROJECTIONS}
    mixture = TokenMixture(2 * one, 17 * one, 19 * one)
    tokens = draw_tokens(3 * one, 5 * one, 0.5 * one, mixture, None)
    found = token_weighted(tokens, Experts(lora, 2.0, {}))
    values = {name: tuple(g.item() for g in pair) for name, pair in found.items()}
    assert values == {"down": (110.0, 70.0), "gate": (561.0, 357.0), "up": (627.0, 399.0)}


def test_linearised_by_hand():
    """All sizes 1, one token, s = 2, c = 0.5, x = 3, delta = 5; A = 7, B = 11, W_down = 13; moments (2, 17, 19).

    down: dB = 2 * 0.5 * 5 * (7 * 2) = 70, dA = 2 * 0.5 * (11 * 5) * 2 = 110
    gate: dB = 2 * 0.5 * 17 * (13 * 5) * (7 * 3) = 23205, dA = 2 * 0.5 * (13 * 17 * 11) * 5 * 3 = 36465
    up, with 19 for 17: 25935 and 40755.
    """
    one = torch.ones(1, 1)
    lora = {name: (torch.full((1, 1, 1), 7.0), torch.full((1, 1, 1), 11.0)) for name in PROJECTIONS}
    moments, base = Moments(2 * one, 17 * one, 19 * one), {"down": torch.full((1, 1, 1), 13.0)}
    tokens = draw_tokens(3 * one, 5 * one, 0.5 * one, None, None)
    found = linearised(tokens, Experts(lora, 2.0, base, moments))
    values = {name: tuple(g.item() for g in pair) for name, pair in found.items()}
    assert values == {"down": (110.0, 70.0), "gate": (36465.0, 23205.0), "up": (40755.0, 25935.0)}


def test_moment_values_are_the_derivatives():
    g, u = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    hidden, by_gate, by_up = moment_values(g, u)
    expected = [reference.slopes(a, b) for a, b in zip(g, u, strict=True)]
    for ours, theirs in zip((hidden, by_gate, by_up), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize("every", [1, 4])
def test_moments_are_sums_over_rows(every):
    """Two experts, two ranks, five slots: 5 and 2 tokens for the first, 0 and 4 for the second; against a loop.

    A sample of a quarter of the rows, 5 of 20 at a time, comes to a quarter of the sums in the mean.
    """
    generator = torch.Generator().manual_seed(0)
    base = {"gate": torch.randn(2, 4, 3, generator=generator), "up": torch.randn(2, 4, 3, generator=generator)}
    base["down"] = torch.randn(2, 3, 4, generator=generator)
    experts = StackedExperts(
        (2, 4, 3),
        torch.float32,
        rank=2,
        full_rank=2,
        alpha=2.0,
        group_name="ep_size_1",
        generator=generator,
        num_experts=2,
        first=0,
    )
    for name, place in experts.base().items():
        place.copy_(base[name])
    slots = torch.zeros(2, 2, 5, 3)
    expected = torch.zeros(2, 13)
    for (rank, expert), filled in {(0, 0): 5, (1, 0): 2, (0, 1): 0, (1, 1): 4}.items():
        slots[rank, expert, :filled] = torch.randn(filled, 3, generator=generator)
        for x in slots[rank, expert, :filled]:
            found = reference.slopes(base["gate"][expert] @ x, base["up"][expert] @ x)
            expected[expert] += torch.cat([*found, torch.ones(1)])
    assert expected[:, -1].tolist() == [7, 4]
    experts.start_moments(every)
    torch.manual_seed(0)
    times = 1 if every == 1 else 2000
    for _ in range(times):
        experts(slots)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if every == 1 else {"atol": 0.05 * expected.abs().max(), "rtol": 0.0}
    torch.testing.assert_close(every * experts.moment_sums_EX / times, expected, **tolerance)
    before = experts.moment_sums_EX.clone()
    experts.eval()(slots)
    torch.testing.assert_close(experts.moment_sums_EX, before)


def test_an_expert_without_moments_gets_nothing():
    lora = {n: (torch.randn(2, 1, 3), torch.randn(2, 3, 1)) for n in PROJECTIONS}
    zero = Moments(*torch.zeros(3, 2, 3))
    experts = Experts(lora, 1.0, {"down": torch.randn(2, 3, 3)}, zero)
    tokens = ExpertTokens(*torch.randn(2, 2, 4, 3))
    assert all((g == 0).all() for pair in linearised(tokens, experts).values() for g in pair)


def test_draws_by_hand():
    """||delta|| = 0, 3, 4; c = 1, 0.5, 1 for the first expert, 0, 1, 0 for the second, 0 for the third.

    Masses are 0, 1.5, 4 and 0, 3, 0: a drawn gradient is as long as their sum over the draws, 5.5 / 2 and 3 / 2.
    """
    torch.manual_seed(0)
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    delta = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    c = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [1.0, 0.0, 0.0]])
    twice = 0
    for _ in range(200):
        tokens = draw_tokens(x, delta, c, None, 2)
        assert tokens.x_END.shape == tokens.delta_END.shape == (3, 2, 2)
        torch.testing.assert_close(tokens.delta_END.norm(dim=2), torch.tensor([[2.75] * 2, [1.5] * 2, [0.0] * 2]))
        assert tokens.x_END[1, :, 0].tolist() == [2.0, 2.0]
        for x_D, delta_D in zip(tokens.x_END[0], tokens.delta_END[0], strict=True):
            assert torch.equal(delta_D != 0, delta[int(x_D[0]) - 1] != 0)  # the gradient is the token's own
        twice += int((tokens.x_END[0, :, 0] == 2).sum())
    assert 80 < twice < 140  # 400 * 1.5 / 5.5 = 109


def test_sums_over_drawn_tokens_are_unbiased():
    """The mean over many draws of 4 of 16 tokens comes to the sum over all, of every part."""
    torch.manual_seed(0)
    delta = torch.randn(16, 3) * torch.logspace(-1, 1, 16).unsqueeze(1)
    x, c, mixture = torch.randn(16, 3), torch.rand(16, 2), TokenMixture(*torch.randn(3, 16, 3))

    def products(tokens):
        pairs = [(tokens.x_END, tokens.delta_END), (tokens.hidden_ENF, tokens.delta_END)]
        pairs += [(tokens.x_END, tokens.gate_ENF), (tokens.x_END, tokens.up_ENF)]
        return torch.stack([a.mT @ b for a, b in pairs])

    exact = products(draw_tokens(x, delta, c, mixture, None))
    loops = [torch.einsum("td,tf,te->edf", x, other, c) for other in (delta, mixture.gate_TF)]
    torch.testing.assert_close(exact[[0, 2]], torch.stack(loops))
    draws = torch.stack([products(draw_tokens(x, delta, c, mixture, 4)) for _ in range(4000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 4000**0.5)  # in standard errors
    assert float(error.max()) < 4.5
    assert float(draws.std(0).min()) > 0


def test_a_gradient_that_is_not_finite_does_not_end_the_draw():
    """The real gradient has it too, and the step is skipped for it."""
    delta = torch.tensor([[1.0], [float("nan")]])
    assert draw_tokens(torch.ones(2, 1), delta, torch.ones(2, 1), None, 3).delta_END.isfinite().all()
    assert draw_tokens(torch.ones(2, 1), delta, torch.ones(2, 1), None, None).delta_END.isnan().any()


def test_linearised_equals_the_loop_over_tokens():
    """Of the tiny model's layers, every LoRA factor, with random moments: within 1e-5."""
    model = convert(tiny.hf_model(), UBSMoESpec(GateConfig(k=2, candidates=8))).train()
    for layer in model.layers:
        layer.experts.moments = Moments(*torch.rand(3, 8, 12))
        for _, B in layer.experts.factors().values():
            B.data.normal_(0, 0.05)
    seen = reference.watch(model.layers)
    collector = PseudoGradientCollector(model.layers, "linearised", rho=0.7).attach()
    ids = torch.randint(2, tiny.VOCAB, (2, 8))
    F.cross_entropy(model(ids, torch.ones_like(ids, dtype=torch.bool)).reshape(16, -1), ids.reshape(-1)).backward()
    found = collector.reduce()
    assert len(found) == 2 * 6
    truth = {}
    for layer, record in zip(model.layers, seen, strict=True):
        truth |= reference.linearised(layer, record, rho=0.7)
    for parameter, ours in found:
        assert truth[id(parameter)].abs().max() > 1e-4
        torch.testing.assert_close(ours, truth[id(parameter)], atol=1e-5, rtol=1e-4)


def test_dense_oracle_completes_the_dense_gradient():
    """K = 1 plus the oracle with rho = 1 is autograd's gradient of running every expert with its softmax weight."""
    torch.manual_seed(0)
    tokens, width, hidden, experts, rank, scaling = 5, 4, 3, 4, 2, 0.5
    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    base = {name: torch.randn(experts, *size) for name, size in sizes.items()}
    lora = {
        name: (torch.randn(experts, rank, i).requires_grad_(), torch.randn(experts, o, rank).requires_grad_())
        for name, (o, i) in sizes.items()
    }
    x, delta = torch.randn(tokens, width), torch.randn(tokens, width)
    p = torch.randn(tokens, experts).softmax(-1)
    active = F.one_hot(p.argmax(-1), experts).bool()

    def loss(c_TE: torch.Tensor) -> torch.Tensor:
        """sum_t delta_t . sum_e c_te expert_e(x_t), token by token and expert by expert."""
        total = torch.zeros(())
        for t in range(tokens):
            for e in range(experts):
                w = {name: base[name][e] + scaling * B[e] @ A[e] for name, (A, B) in lora.items()}
                h = w["gate"] @ x[t]
                total = total + c_TE[t, e] * (delta[t] @ (w["down"] @ (h * torch.sigmoid(h) * (w["up"] @ x[t]))))
        return total

    factors = [factor for name in PROJECTIONS for factor in lora[name]]
    dense, at_k1 = (torch.autograd.grad(loss(c), factors) for c in (p, p * active))
    drawn = draw_tokens(x, delta, inactive_weight(p, active, 1.0), None, None)
    found = dense_oracle(drawn, Experts(lora, scaling, base))
    rest = [gradient for name in PROJECTIONS for gradient in found[name]]
    for whole, one, other in zip(dense, at_k1, rest, strict=True):
        torch.testing.assert_close(one + other, whole, atol=1e-4, rtol=1e-4)


def collected(estimator: str, k: int, noise: float, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(pseudo-gradient, dense oracle by loops) of each layer of an upcycled model on real rows, flat, all experts.

    Every expert of the built-in model becomes a copy of the first plus `noise` times its spread, as when upcycled
    experts have gone apart; the adapters are those of a client in mid-training (A and B differ between experts).
    """
    hf = OlmoeForCausalLM.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for block in hf.model.layers:
        for weight in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            one = weight.data[:1].clone()
            weight.data.copy_(one + noise * one.std() * torch.randn(weight.shape, generator=generator))
    model = convert(hf, UBSMoESpec(GateConfig(k=k, candidates=16), lora_rank=4, lora_alpha=8.0, seed=seed)).train()
    for layer in model.layers:
        for _, B in layer.experts.factors().values():
            B.data.normal_(0, 0.01, generator=generator)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    examples, _ = encode(synthetic.rows(2, seed), tokenizer, 64)
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


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_token_weighted_points_along_the_dense_gradient_on_upcycled_experts(seed, k):
    """Cosine in every layer on copies with 30 % noise; 0.948 to 0.975 when measured."""
    for ours, dense in collected("token_weighted", k, 0.3, seed):
        assert F.cosine_similarity(ours, dense, dim=0) > 0.9


def test_collector_oracle_is_the_loops_oracle():
    for ours, dense in collected("dense_oracle", 1, 1.0, 0):
        torch.testing.assert_close(ours, dense, atol=1e-6, rtol=1e-3)


def test_token_weighted_is_exact_for_equal_experts():
    """Copies without noise and with equal adapters: what the active experts saw is what the others would have seen."""
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
    found = collector.reduce()
    truth = {}
    for layer, record in zip(model.layers, seen, strict=True):
        truth |= reference.dense_oracle(layer, record, rho=1.0)
    for parameter, ours in found:
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
    """The hook that reports a layer's gradients hangs on the graph it reads: it must not keep it alive."""
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
