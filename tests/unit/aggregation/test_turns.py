"""Clients that take turns at one shared state: loading and sending their part of it, and its merge, by hand."""

import numpy as np
import pytest
import torch

from tests.support import reference, tiny
from ubsmoe_ds.aggregation import units
from ubsmoe_ds.aggregation.host_copies import to_device, to_host
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.config.experiment import Experiment

UNIT = [Unit("layers.0.experts.0.gate", "lora", expert=0, lora=(2, 2))]
USAGE = Usage(torch.ones(2, 1, 8, dtype=torch.float64), torch.full((1, 8), 0.25))
EYE = [[1.0, 0.0], [0.0, 1.0]]


def population(path: str, ranks: list[int], **sections) -> Experiment:
    clients = [{"budget": 0.5, "lora_rank": rank} for rank in ranks]
    return tiny.experiment(path, clients, groups=[{"count": 1}], **sections)


def flat(A: list, B: list) -> np.ndarray:
    return np.array([*np.ravel(A), *np.ravel(B)], dtype=np.float32)


def server_of(rule: str, **options) -> Server:
    """Clients 0 and 1 of LoRA rank 1 and 2 and weights 1 : 3; alpha / r of the shared state is 1; A = I, B = 0."""
    exp = population("unused", [1, 2], lora={"rank": 2, "alpha": 2.0}, merge={"rule": rule, **options})
    server = Server(exp, UNIT, [0.25, 0.75])
    server.start([flat(EYE, np.zeros((2, 2)))] * (rule != "flora") or [np.zeros(8, dtype=np.float32)])
    return server


def merged(server: Server, cohort: list[int], updates: list) -> np.ndarray:
    server.weigh(cohort, [1.0] * len(cohort), [False] * len(cohort))
    use = Usage(USAGE.routed_CLE[: len(cohort)], USAGE.utilisation_LE)
    replies = server.merge(updates, use, [server.lora_ranks[client] for client in cohort])
    assert len(replies) == 1  # one reply for all groups
    return replies[0]


# B of client 0 becomes 4 at its one rank, B of client 1 becomes 8 at its second: products diag(4, 0), diag(0, 8)
UPDATES = [flat(np.zeros((2, 2)), [[4, 0], [0, 0]]), flat(np.zeros((2, 2)), [[0, 0], [0, 8]])]
# rule -> (A, B) of the shared state: zero_pad weighs 1/4, 3/4; hetlora by norms 4 : 8
BY_HAND = {
    "zero_pad": ([[1, 0], [0, 0.75]], [[1, 0], [0, 6]]),
    "hetlora": ([[1, 0], [0, 2 / 3]], [[4 / 3, 0], [0, 16 / 3]]),
}


@pytest.mark.parametrize("rule", BY_HAND)
def test_factors_of_unequal_ranks_by_hand(rule):
    state = flat(EYE, np.zeros((2, 2))) + merged(server_of(rule), [0, 1], [u.copy() for u in UPDATES])
    np.testing.assert_allclose(state, flat(*BY_HAND[rule]), atol=1e-6)


@pytest.mark.parametrize(("rule", "product"), [("flexlora", [1, 6]), ("florist", [0, 6])])
def test_products_of_unequal_ranks_by_hand(rule, product):
    """The mean of the products is diag(1, 6); FLoRIST keeps the rank that holds 36 / 37 of the energy."""
    options = {"energy": 0.9} if rule == "florist" else {}
    state = flat(EYE, np.zeros((2, 2))) + merged(server_of(rule, **options), [0, 1], [u.copy() for u in UPDATES])
    A, B = state[:4].reshape(2, 2), state[4:].reshape(2, 2)
    np.testing.assert_allclose(B @ A, np.diag(product), atol=1e-5)
    np.testing.assert_allclose(np.abs(A), [[0, 1], [1, 0]], atol=1e-6)  # the strongest rank comes first


def test_a_stack_of_unequal_ranks_by_hand():
    """Under FLoRA whole adapters travel: A = I cut to the client's rank; the stack has rank 1 + 2."""
    updates = [flat([[1, 0], [0, 0]], [[4, 0], [0, 0]]), flat(EYE, [[0, 0], [0, 8]])]
    stack = merged(server_of("flora"), [0, 1], updates)
    A, B = stack[:6].reshape(3, 2), stack[6:].reshape(2, 3)
    np.testing.assert_allclose(B @ A, np.diag([1, 6]), atol=1e-6)


@pytest.mark.parametrize(("rule", "second"), [("zero_pad", 6.0), ("hetlora", 16 / 3), ("flexlora", 0.0)])
def test_ranks_that_no_client_of_the_round_has(rule, second):
    """Client 0 alone: its rank takes its value, with weight 1. The other rank stays; where the basis turns, only A."""
    server = server_of(rule)
    state = flat(EYE, np.zeros((2, 2))) + merged(server, [0, 1], [u.copy() for u in UPDATES])
    first = state.copy()
    assert list(server.weight_C) == [0.25, 0.75]
    state += merged(server, [0], [flat(np.zeros((2, 2)), [[2, 0], [0, 0]])])
    assert list(server.weight_C) == [1.0]
    A, B = state[:4].reshape(2, 2), state[4:].reshape(2, 2)
    np.testing.assert_allclose(A[1], first[2:4], atol=1e-6)
    np.testing.assert_allclose(B[:, 1], [0, second], atol=1e-6)
    own = first[4:].reshape(2, 2)[:, :1] + [[2], [0]]
    np.testing.assert_allclose(B[:, :1] @ A[:1], own @ first[:4].reshape(2, 2)[:1], atol=1e-5)


@pytest.mark.parametrize("rule", ["fedavg", "median"])
def test_weights_are_of_the_cohort(rule):
    """Of three clients of weights 1 : 2 : 5 the first and the last take part: 1/6 and 5/6."""
    exp = population("unused", [2, 2, 2], lora={"rank": 2, "alpha": 2.0}, merge={"rule": rule})
    server = Server(exp, [Unit("layers.0.router", "router", 2)], [1 / 8, 2 / 8, 5 / 8])
    server.start([np.zeros(2, dtype=np.float32)])
    reply = merged(server, [0, 2], [np.array([6, 0], dtype=np.float32), np.array([0, 12], dtype=np.float32)])
    np.testing.assert_allclose(reply, [1, 10] if rule == "fedavg" else [3, 6], atol=1e-6)
    server.weigh([0, 1, 2], [1.0, 0.5, 0.0], [False] * 3)  # half of client 1's work; client 2 sits out
    assert server.weight_C.tolist() == [0.5, 0.5, 0.0]


@pytest.fixture(params=[True, False], ids=["own", "others"])
def masters(request):
    """Masters that are the parameters, which are read and written at once, and others."""
    return reference.Masters(request.param)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("model") / "olmoe")


def test_a_turn_loads_a_part_and_sends_it_back(model_path, masters):
    """A client of rank 2 of 3: A is cut, B times 2/3, so alpha / r B A stays. What it adds comes back times 3/2."""
    model = reference.whole_model(population(model_path, [2]))
    store = UnitStore(model, masters, lora_rank=3)
    store.shared = torch.randn(len(store.shared), generator=torch.Generator().manual_seed(0))
    store.begin_turn(2, 3, 2 / 3, round_number=1)
    held = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert torch.count_nonzero(store.updates(2)) == 0
    store.load(3)
    for name, whole in model.named_parameters():
        if name.endswith("lora_A"):
            assert torch.equal(held[name][..., :2, :], whole[..., :2, :]) and not held[name][..., 2:, :].any()
        elif name.endswith("lora_B"):
            torch.testing.assert_close(held[name][..., :2], whole[..., :2] * 2 / 3)
            assert not held[name][..., 2:].any()
        elif name in held:
            assert torch.equal(held[name], whole)
    store.begin_turn(2, 3, 2 / 3, round_number=1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.data[..., :2] += 1
    sent = store.widened(store.updates(2), 2)
    assert len(sent) == len(store.shared)
    for block, part in store.parts(sent, 3):
        values = block.split(part, 3)
        for name, value in values.items():
            if name.endswith("lora_B"):
                torch.testing.assert_close(value[..., :2], torch.full_like(value[..., :2], 1.5), atol=1e-5, rtol=0)
                assert not value[..., 2].any()
            else:
                assert not value.any()


def test_a_pruned_client_keeps_its_scale(model_path, masters):
    """A client that began with rank 3 of 3 and has 1 left loads B as it is; its tail is that of what it loaded."""
    model = reference.whole_model(population(model_path, [3]))
    store = UnitStore(model, masters, lora_rank=3)
    store.shared = torch.ones_like(store.shared)
    store.begin_turn(1, 3, 1.0, round_number=1)
    for block, part in store.parts(store.loaded, 1):
        assert (part == 1).all() and len(part) == block.numel(1)


def test_adapters_of_a_stack_start_anew_each_turn(model_path, masters):
    """Under FLoRA the shared state is zero; a turn of round 2 begins with what round 1's merge drew for everybody."""
    model = reference.whole_model(population(model_path, [2]))
    store = UnitStore(model, masters, lora_rank=3, stacking=True)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("lora_A")}
    store.begin_turn(2, 3, 2 / 3, round_number=1)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_A"):
            assert torch.equal(parameter[..., :2, :], start[name][..., :2, :]) and start[name].any()
        elif name.endswith("lora_B"):
            assert not parameter.any()
    whole = store.updates(2)
    for block, part in store.parts(whole, 2):  # all of an adapter travels
        assert part.any() == (block.base is not None)
    store.begin_turn(2, 3, 2 / 3, round_number=2)
    assert not torch.equal(store.updates(2), whole)


def test_state_passes_between_host_and_device_in_one_copy(model_path, masters, monkeypatch):
    """A read is one copy of all units to the host, a write one to the device; on the CPU nothing is copied."""
    store = UnitStore(reference.whole_model(population(model_path, [3])), masters, lora_rank=3)
    copied = []
    for name, at in (("to_host", 0), ("to_device", 1)):
        monkeypatch.setattr(units, name, lambda flat, *_, at=at: copied.append((at, len(flat))) or flat.clone())
    whole = len(store.shared)
    change = torch.randn(whole, generator=torch.Generator().manual_seed(0))
    store.apply(change, 3, 3, round_number=1)
    torch.testing.assert_close(store.updates(3) + store.loaded, store.shared)
    assert copied == [(1, whole), (0, whole)]
    values = torch.arange(3.0)
    assert to_host(values) is values and to_device(values, torch.device("cpu")) is values
