"""The gate on tiny numbers worked by hand, and its contract with DeepSpeed's MOELayer."""

import math

import pytest
import torch
from deepspeed.moe.sharded_moe import MOELayer, TopKGate, topkgating
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds.moe.gate import GateConfig, GateCounts, UBSMoEGate
from ubsmoe_ds.moe.router import Router


def make_gate(k=2, experts=4, hidden=4, candidates=None, normalize=False, min_capacity=1, **options):
    config = GateConfig(k=k, candidates=candidates or experts, min_capacity=min_capacity, **options)
    gate = UBSMoEGate(hidden, experts, config, Router(normalize=normalize))
    if hidden == experts:
        gate.wg.weight.data.copy_(torch.eye(experts))  # the input's entries are the logits
    return gate.train()


def logits_of(p):
    return torch.tensor(p).log().unsqueeze(0)


def test_weights_are_the_softmax_itself():
    """p = (0.1, 0.2, 0.3, 0.4), K = 2: experts 3 and 2 with weights 0.4 and 0.3, not renormalised."""
    _, _, experts, index, _, weight, counts = make_gate()(logits_of([0.1, 0.2, 0.3, 0.4]))
    assert experts == 4 and index.tolist() == [[3], [2]] and counts.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(weight, torch.tensor([[0.4], [0.3]]))


def test_weights_normalised_if_the_model_does():
    """The same p: 0.4 / 0.7 and 0.3 / 0.7."""
    weight = make_gate(normalize=True)(logits_of([0.1, 0.2, 0.3, 0.4]))[5]
    torch.testing.assert_close(weight, torch.tensor([[4 / 7], [3 / 7]]))


def test_phi_moves_only_the_candidates():
    """s = ln(1, 2, 3, 4), N_p = 2: phi = ln 3 on experts 0 and 2 reaches 2 alone: odds (1, 2, 9, 4), sum 16."""
    gate = make_gate(candidates=2)
    gate.phi.data = torch.tensor([math.log(3), 0, math.log(3), 0])
    _, _, _, index, _, weight, _ = gate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).log())
    assert index.tolist() == [[2], [3]]
    torch.testing.assert_close(weight, torch.tensor([[9 / 16], [4 / 16]]))


def test_phi_gets_a_gradient_and_none_without_modulation():
    gate = make_gate(k=1)
    gate(logits_of([0.1, 0.2, 0.3, 0.4]))[5].sum().backward()
    # d p_3 / d phi_i = p_3 (1[i = 3] - p_i) with p_3 = 0.4
    torch.testing.assert_close(gate.phi.grad, torch.tensor([-0.04, -0.08, -0.12, 0.24]))
    assert not make_gate(phi_range=None).phi.requires_grad


def test_range_penalty_by_hand():
    """phi = (-1.5, 0, 1, 3) in [-1, 1]: 0.5^2 + 2^2 = 4.25, gradient 2 * overshoot."""
    gate = make_gate()
    gate.phi.data = torch.tensor([-1.5, 0.0, 1.0, 3.0])
    penalty = gate.range_penalty()
    penalty.backward()
    assert penalty.item() == pytest.approx(4.25)
    torch.testing.assert_close(gate.phi.grad, torch.tensor([-1.0, 0.0, 0.0, 4.0]))


def test_dropping_keeps_the_routes_of_largest_weight():
    """Three tokens want expert 0 with p = 0.5, 0.7, 0.6; C = ceil(3 / 2 * 1.0 * 1) = 2: the first is dropped."""
    gate = make_gate(k=1, experts=2, hidden=2, capacity_factor=1.0)
    x = torch.tensor([[0.5, 0.5 - 1e-3], [0.7, 0.3], [0.6, 0.4]]).log()
    _, capacity, _, index, location, weight, counts = gate(x)
    assert int(capacity) == 2 and index.tolist() == [[-1, 0, 0]] and location.tolist() == [[0, 0, 1]]
    assert counts.tolist() == [3, 0] and int(gate.dropped) == 1 and int(gate.tokens) == 3
    assert weight[0, 1].item() == pytest.approx(0.7)


@pytest.mark.parametrize("padding", [0, 1, 3, 20])
def test_padding_does_not_count_towards_the_capacity(padding):
    """Three tokens want expert 0, C = ceil(3 / 2) = 2, whatever the padding between them; slots are those of all."""
    gate = make_gate(k=1, experts=2, hidden=2, capacity_factor=1.0)
    used = torch.tensor([True, *[False] * padding, True, True])
    x = torch.tensor([[0.8, 0.2], *[[0.9, 0.1]] * padding, [0.7, 0.3], [0.6, 0.4]]).log()
    _, capacity, _, index, location, _, counts = gate(x, used)
    assert index[0, used].tolist() == [0, 0, -1] and (index[0, ~used] == -1).all()
    assert location[0, used].tolist()[:2] == [0, 1] and counts.tolist() == [3, 0] and int(gate.dropped) == 1
    # the buffers' size, which all ranks of an expert group must have: from the padded length, and without asking
    assert int(capacity) == math.ceil((3 + padding) / 2) and capacity.device.type == "cpu"
    assert gate.most_routes(len(used)) == min(len(used), 2 * int(capacity))


def test_min_capacity_and_no_dropping_in_evaluation():
    gate = make_gate(k=1, experts=2, hidden=2, capacity_factor=0.1, min_capacity=3)
    x = torch.tensor([[0.9, 0.1]] * 5).log()
    assert int(gate(x)[1]) == 3
    gate.eval()
    _, capacity, _, index, _, _, _ = gate(x)
    assert int(capacity) == 5 and (index >= 0).all()
    assert int(gate.tokens) == 10 and int(gate.dropped) == 2
    gate.reset_counts()
    assert int(gate.tokens) == int(gate.dropped) == int(gate.routed_E.sum()) == 0


def test_counts_of_all_gates_lie_in_one_table():
    """Two layers, E = 2, C = 2: three of the tokens want expert 0 in the first, one in the second; one route drops."""
    gates = [make_gate(k=1, experts=2, hidden=2, capacity_factor=1.0) for _ in range(2)]
    counts = GateCounts(gates)
    wants_0, wants_1 = [0.8, 0.2], [0.2, 0.8]
    gates[0](torch.tensor([wants_0] * 3 + [wants_1]).log())
    gates[1](torch.tensor([wants_0] + [wants_1] * 2).log())
    routed_LX, dropped = counts.read()
    assert routed_LX.tolist() == [[3, 1, 4], [1, 2, 3]] and dropped == 1
    counts.reset()
    assert counts.read()[0].sum() == 0 and routed_LX.sum() == 14 and int(gates[0].tokens) == 0  # what was read stays
    gates[0](torch.tensor([wants_1]).log())
    assert counts.read()[0].tolist() == [[0, 1, 1], [0, 0, 0]]


def test_load_balancing_loss_is_deepspeeds():
    torch.manual_seed(0)
    gate = make_gate(k=3, experts=6, hidden=5, phi_range=None)
    x = torch.randn(11, 5)
    logits = x @ gate.wg.weight.T
    expected = topkgating(logits, 3, 1.0, 1, drop_tokens=False)[0]
    torch.testing.assert_close(gate(x)[0], expected)


def test_unused_tokens_are_not_routed():
    gate = make_gate(k=1)
    x = torch.cat([logits_of([0.1, 0.2, 0.3, 0.4])] * 3)
    _, capacity, _, index, _, _, counts = gate(x, torch.tensor([True, False, True]))
    assert index.tolist() == [[3, -1, 3]] and counts.tolist() == [0, 0, 0, 2] and int(capacity) == 2


def test_all_tokens_unused_still_works():
    _, capacity, _, index, _, _, counts = make_gate()(torch.randn(3, 4), torch.zeros(3, dtype=torch.bool))
    assert int(capacity) == 1 and (index == -1).all() and counts.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_contract_with_deepspeed(dtype):
    """Seven values of these kinds, as MOELayer.forward unpacks them; a DeepSpeed that changes this fails here."""
    gate = make_gate(k=2)
    assert isinstance(gate, TopKGate)
    torch.manual_seed(0)
    stock = TopKGate(4, 4, k=4, drop_tokens=False)
    x = torch.randn(5, 4, dtype=dtype)
    for ours, theirs in zip(gate(x), stock(x, sparse_routes=True), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(ours, torch.Tensor) and ours.dim():
            assert ours.dtype == theirs.dtype and ours.dim() == theirs.dim()
    experts = torch.nn.Identity()
    layer = MOELayer(gate, experts, "ep_size_1", 1, 4)
    # identity experts: y = (sum of the weights of the token's routes) * x, summed in fp32
    y = layer(x, None)
    torch.testing.assert_close(y, (gate.routing.weight_KT.sum(0).unsqueeze(-1) * x).to(dtype))
    with pytest.raises(ValueError, match="sparse routes"):
        gate(x, sparse_routes=False)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    experts=st.integers(2, 9),
    data=st.data(),
    factor=st.one_of(st.none(), st.floats(0.2, 3.0)),
)
def test_slots_never_collide_and_routes_are_kept_or_counted(tokens, experts, data, factor):
    k = data.draw(st.integers(1, experts))
    used = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    torch.manual_seed(tokens * 100 + experts)
    gate = make_gate(k=k, experts=experts, hidden=3, capacity_factor=factor)
    _, capacity, _, index, location, _, counts = gate(torch.randn(tokens, 3), used)
    kept = index >= 0
    taken = list(zip(index[kept].tolist(), location[kept].tolist(), strict=True))
    assert len(set(taken)) == len(taken), "two routes share a slot"
    assert all(0 <= slot < int(capacity) for _, slot in taken)
    assert int(counts.sum()) == k * int(used.sum())
    kept_E = torch.bincount(index[kept].long(), minlength=experts)
    limit = k * tokens if factor is None else max(1, math.ceil(int(used.sum()) / experts * factor * k))
    assert kept_E.tolist() == counts.clamp(max=limit).tolist() and int(kept_E.max()) <= int(capacity)
    assert int(kept_E.sum()) <= gate.most_routes(tokens)
    assert int(gate.dropped) == int((counts - kept_E).sum())
    for column, active in zip(index.t(), used, strict=True):
        chosen = [e for e in column.tolist() if e >= 0]
        assert len(set(chosen)) == len(chosen) and (active or not chosen)


P = [0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("learned", [False, True])
def test_a_learned_scale_starts_at_one(learned):
    gate = make_gate(learned_scale=learned)
    _, _, _, index, _, weight, _ = gate(logits_of(P))
    assert index.flatten().tolist() == [3, 2] and (gate.scale is not None) == learned
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.4, 0.3]))


def test_learned_scale_multiplies_and_learns():
    """Scale 2: weights 0.8 and 0.6; the gradient of their sum is 0.7. With normalised weights it still acts."""
    gate = make_gate(learned_scale=True)
    gate.scale.data.fill_(2.0)
    weight = gate(logits_of(P))[5]
    torch.testing.assert_close(weight.flatten(), torch.tensor([0.8, 0.6]))
    weight.sum().backward()
    torch.testing.assert_close(gate.scale.grad, torch.tensor([0.7]))
    normal = make_gate(learned_scale=True, normalize=True)
    normal.scale.data.fill_(2.0)
    torch.testing.assert_close(normal(logits_of(P))[5].sum(), torch.tensor(2.0))


def test_selection_lets_phi_choose_but_not_weigh():
    """phi = ln 9 on expert 0 makes it the first choice; its weight stays softmax(s) = 0.1, not 0.5."""
    phi = torch.tensor([math.log(9), 0.0, 0.0, 0.0])
    by_mode = {}
    for modulate in ("weights", "selection"):
        gate = make_gate(modulate=modulate)
        gate.phi.data = phi.clone()
        _, _, _, index, _, weight, _ = gate(logits_of(P))
        assert index.flatten().tolist() == [0, 3]
        by_mode[modulate] = weight.flatten().tolist()
        assert gate.routing.p_TE[0, 0].item() == pytest.approx(0.5 if modulate == "weights" else 0.1)
    assert by_mode["weights"] == pytest.approx([0.9 / 1.8, 0.4 / 1.8])
    assert by_mode["selection"] == pytest.approx([0.1, 0.4])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0.1, 3.0))
def test_a_learned_scale_never_changes_the_choice(seed, k, scale):
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed))
    plain, scaled = (make_gate(k=k, experts=6, hidden=6, learned_scale=learned) for learned in (False, True))
    scaled.scale.data.fill_(scale)
    assert torch.equal(plain(logits)[3], scaled(logits)[3])
    ratio = scaled(logits)[5] / plain(logits)[5]
    torch.testing.assert_close(ratio, torch.full_like(ratio, scale))  # the same factor for every token


def test_one_normalised_weight_teaches_router_and_phi_nothing():
    """K = 1, weights summing to one: p / p = 1 whatever the router says. By autograd it gives noise, here zero."""
    gate = make_gate(k=1, experts=6, hidden=5, normalize=True)
    gate.wg.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(1))
    weight = gate(x)[5]
    assert (weight == 1).all()
    (weight * torch.randn(1, 50)).sum().backward()
    assert not gate.phi.grad.any() and not gate.wg.weight.grad.any()
    p_T1 = torch.rand(50, 1, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (p_T1 / p_T1.sum(-1, keepdim=True) * torch.randn(50, 1)).sum().backward()
    assert p_T1.grad.any()  # the noise


def test_a_sigmoid_router_by_hand():
    """Two groups of two, one kept; sigmoids 0.5 0.8 0.6 0.9; the correction +1 makes the first group rank first.

    Ranks: 0.5 + 1, 0.8 | 0.6, 0.9: sums 2.3 and 1.5. Weights 0.8 / 1.3 and 0.5 / 1.3, times 2.5; the choice is by
    0.5 + 1 first. l_aux: p = sigmoids / 2.8, E / K * (0.5 + 0.8) / 2.8.
    """
    rule = Router("sigmoid", corrected=True, groups=2, kept_groups=1, group_best=2, normalize=True, scaling=2.5)
    gate = UBSMoEGate(4, 4, GateConfig(k=2, candidates=2), rule)
    gate.wg.weight.data.copy_(torch.eye(4))
    gate.correction_E.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    x = torch.tensor([[0.5, 0.8, 0.6, 0.9]]).logit()
    l_aux, _, _, index, _, weight, _ = gate.train()(x)
    assert index.tolist() == [[0], [1]]
    torch.testing.assert_close(weight, torch.tensor([[2.5 * 0.5 / 1.3], [2.5 * 0.8 / 1.3]]))
    torch.testing.assert_close(l_aux, torch.tensor(4 / 2 * 1.3 / 2.8))
    torch.testing.assert_close(gate.routing.p_TE, torch.tensor([[0.5, 0.8, 0.6, 0.9]]) / 2.8)
    gate.phi.data = torch.tensor([0.0, 1.0, 5.0, 5.0])  # phi reaches the two candidates alone: experts 0 and 1
    assert gate(x)[3].tolist() == [[1], [0]] or gate(x)[3].tolist() == [[0], [1]]
    weight = gate(x)[5].flatten().sort().values
    moved = torch.tensor(0.8).logit().add(1).sigmoid()
    torch.testing.assert_close(weight, 2.5 * torch.stack([torch.tensor(0.5), moved]) / (0.5 + moved))
    weight = gate(x)[5]
    weight[0].sum().backward()
    assert gate.phi.grad[:2].all() and not gate.phi.grad[2:].any()


def test_phi_reaches_no_expert_of_a_group_that_is_not_kept():
    """N_p = 4 of two groups of two, one kept: only its two experts are candidates; see above."""
    rule = Router("sigmoid", corrected=True, groups=2, kept_groups=1, group_best=2)
    gate = UBSMoEGate(4, 4, GateConfig(k=2, candidates=4), rule)
    gate.correction_E.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    gate.phi.data = torch.tensor([0.25, 0.5, 5.0, 5.0])
    s = torch.tensor([[0.5, 0.8, 0.6, 0.9]]).logit()
    assert torch.equal(gate.modulated_logits(s) - s, (s + torch.tensor([0.25, 0.5, 0.0, 0.0])) - s)


def test_biases_stay_in_fp32_in_a_model_in_bf16():
    gate = UBSMoEGate(4, 4, GateConfig(k=2, candidates=2), Router(corrected=True), biased=True).bfloat16()
    assert gate.wg.weight.dtype == torch.bfloat16 and gate.correction_E.dtype == gate.bias_E.dtype == torch.float32


def test_with_all_experts_active_weights_are_p():
    """As the dense reference of fidelity has them, in groups that are not kept too: p times the scaling factor."""
    rule = Router("sigmoid", corrected=True, groups=2, kept_groups=1, group_best=2, normalize=True, scaling=2.5)
    gate = UBSMoEGate(4, 4, GateConfig(k=4, candidates=2), rule)
    _, _, _, index, _, weight, _ = gate.eval()(torch.randn(5, 4))
    ordered_TE = torch.zeros(5, 4).scatter_(1, index.t().long(), weight.t())
    torch.testing.assert_close(ordered_TE, 2.5 * gate.routing.p_TE)
    torch.testing.assert_close(ordered_TE.sum(1), torch.full((5,), 2.5))
