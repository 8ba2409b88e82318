"""Test properties that every merge rule has for any clients, and that no rule forms an m x n product.

Shapes: C clients, N elements, U units of one shape, m x n a unit's Delta W, R LoRA rank.
"""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.factors import delta, random_factors, unit_of
from ubsmoe_ds.aggregation import rules
from ubsmoe_ds.aggregation.rules import Factors

FACTOR_RULES = {
    "zero_pad": rules.zero_pad,
    "hetlora": rules.hetlora,
    "flora": rules.flora,
    "flexlora": rules.flexlora,
    "florist": partial(rules.florist, energy=1.0),
    "florist_cut": partial(rules.florist, energy=0.9),
}


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)), 0)
        return result


@pytest.mark.parametrize("name", FACTOR_RULES)
def test_rules_never_form_the_product(name):
    side = 3000
    clients = [random_factors(2, side, side, rank, torch.Generator().manual_seed(rank)) for rank in (2, 4)]
    with LargestTensor() as largest:
        merged = FACTOR_RULES[name](clients, torch.ones(2, 2))
        rules.delta_norm(merged)
    assert largest.numel < side * side / 10
    with largest:
        delta(merged)
    assert largest.numel == 2 * side * side, "the recorder must see a product"


def activation(update_CN, weight_CN):
    """Run `fedavg` with activation weights; the use of an expert is made up from the update."""
    used_CN = update_CN.sigmoid()
    return rules.fedavg(update_CN, weight_CN * rules.activation_weight(torch.ones(len(used_CN)), used_CN, 0.5))


def on_products(rule):
    """Apply an elementwise rule to the clients' Delta W, each unit with its weight."""

    def merged(clients, weight_CU):
        update_CUmn = torch.stack([delta(f) for f in clients])
        weight_CN = weight_CU[:, :, None, None].expand(update_CUmn.shape).flatten(1)
        return rule(update_CUmn.flatten(1), weight_CN).view(update_CUmn.shape[1:])

    return merged


RULES = {  # name: (clients, weight_CU) -> Delta W of the result, [U, m, n]
    "fedavg": on_products(rules.fedavg),
    "activation": on_products(activation),
    "coordinate_median": on_products(rules.coordinate_median),
    "trimmed_mean": on_products(partial(rules.trimmed_mean, trim=0.25)),
} | {name: lambda clients, weight_CU, rule=rule: delta(rule(clients, weight_CU)) for name, rule in FACTOR_RULES.items()}

every_rule = pytest.mark.parametrize("name", RULES)
properties = settings(max_examples=40, deadline=None)
assert_near = partial(assert_close, atol=1e-4, rtol=1e-3)


@st.composite
def clients_and_weights(draw):
    """Draw one to five clients of LoRA ranks 1 to 4; about a quarter of the weights are zero."""
    units, m, n = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    weight_CU = torch.rand(len(ranks), units, generator=generator) * 10 + 0.01
    weight_CU *= torch.rand(len(ranks), units, generator=generator) > 0.25
    return [random_factors(units, m, n, rank, generator) for rank in ranks], weight_CU


@every_rule
@properties
@given(clients_and_weights(), st.randoms(use_true_random=False), st.floats(0.01, 100))
def test_order_and_scale_do_not_matter(name, drawn, random, scale):
    clients, weight_CU = drawn
    order = random.sample(range(len(clients)), len(clients))
    shuffled = RULES[name]([clients[c] for c in order], weight_CU[order] * scale)
    assert_near(shuffled, RULES[name](clients, weight_CU))


@every_rule
@properties
@given(clients_and_weights(), st.integers(1, 5))
def test_equal_clients_give_that_client(name, drawn, count):
    """A single client is returned as it is, unless the rule cuts it; where all weights are zero the result is zero."""
    (client, *_), weight_CU = drawn
    merged = RULES[name]([client] * count, weight_CU[:1] * torch.arange(1, count + 1).unsqueeze(1))
    expected = RULES[name]([client], torch.ones_like(weight_CU[:1])) if name == "florist_cut" else delta(client)
    assert_near(merged, expected * (weight_CU[0] > 0)[:, None, None])


@every_rule
@properties
@given(clients_and_weights())
def test_a_client_of_weight_zero_does_not_count(name, drawn):
    clients, weight_CU = drawn
    others = RULES[name](clients, weight_CU)
    idle = rules.resize(Factors(*(100 * part for part in clients[0])), 5)
    assert_near(RULES[name]([*clients, idle], torch.cat([weight_CU, torch.zeros_like(weight_CU[:1])])), others)


@every_rule
@properties
@given(clients_and_weights())
def test_units_are_independent(name, drawn):
    """Merging all units at once equals merging each alone, so it does not matter which rank owns which unit."""
    clients, weight_CU = drawn
    separate = [
        RULES[name]([unit_of(f, unit) for f in clients], weight_CU[:, unit : unit + 1])
        for unit in range(weight_CU.shape[1])
    ]
    assert_near(RULES[name](clients, weight_CU), torch.cat(separate))


@properties
@given(clients_and_weights(), st.integers(1, 6))
def test_resize_gives_the_rank(drawn, rank):
    factors = drawn[0][0]
    resized = rules.resize(factors, rank)
    assert resized.A_URn.shape[1] == resized.B_UmR.shape[2] == rank
    assert (torch.linalg.matrix_rank(delta(resized).double(), rtol=1e-4) <= rank).all()
    assert_near(delta(resized), factors.B_UmR[:, :, :rank] @ factors.A_URn[:, :rank])


updates_and_weights = st.integers(1, 5).flatmap(
    lambda c: st.tuples(
        st.lists(st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=c, max_size=c),
        st.lists(st.floats(0.01, 100), min_size=c, max_size=c),
    )
)


@settings(max_examples=100, deadline=None)
@given(updates_and_weights, st.floats(0.01, 100), st.randoms())
def test_fedavg_of_any_updates(drawn, scale, random):
    """Order and scale of the weights do not matter; one client, or equal clients, give that client's update."""
    rows, weights = (torch.tensor(part, dtype=torch.float32) for part in drawn)
    weights = weights.unsqueeze(1)
    merged = rules.fedavg(rows, weights)
    order = list(range(len(rows)))
    random.shuffle(order)
    torch.testing.assert_close(rules.fedavg(rows[order], weights[order]), merged, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rules.fedavg(rows, weights * scale), merged, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(rules.fedavg(rows[:1], weights[:1]), rows[0])
    torch.testing.assert_close(
        rules.fedavg(rows[:1].expand(3, -1), torch.tensor([[1.0], [2.0], [3.0]])), rows[0], atol=1e-4, rtol=1e-5
    )
