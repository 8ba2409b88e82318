"""Test an owner's server in one process: refusals, clipping, server optimisers, experts that no client used."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny
from ubsmoe_ds.aggregation import rules
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import MergeConfig

M, N = 3, 4  # shape of a LoRA unit's Delta W
RULES = ["fedavg", "activation", "median", "trimmed_mean", "zero_pad", "hetlora", "flexlora", "florist", "flora"]
FACTOR_RULES = RULES[4:]


def experiment(ranks: list[int], dmr: bool = False, **merge) -> Experiment:
    clients = [{"budget": 0.5, "lora_rank": rank} for rank in ranks]
    return tiny.experiment("unused", clients, merge=merge, dmr={"enabled": dmr}, lora={"rank": 3, "alpha": 6.0})


def units(experts: int = 2) -> list[Unit]:
    lora = [Unit(f"layers.0.experts.{e}.gate", "lora", expert=e, lora=(M, N)) for e in range(experts)]
    return [*lora, Unit("layers.0.router", "router", 5), Unit("layers.0.phi", "phi", 8)]


def usage(clients: int, used: float = 1.0) -> Usage:
    return Usage(torch.full((clients, 1, 8), used, dtype=torch.float64), torch.full((1, 8), 0.25))


def arrays(ranks: list[int], seed: int, listed: list[Unit]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=sum(unit.size(rank) for unit in listed)).astype(np.float32) for rank in ranks]


def new_server(exp: Experiment, listed: list[Unit], weights: list[float]) -> Server:
    """Return a server that owns all units, with u* = 0.25."""
    server = Server(exp, listed, weights)
    server.target = 0.25
    return server


def merged(exp: Experiment, listed: list[Unit], held: list, updates: list, use: Usage | None = None) -> tuple:
    """Merge one round with weights 1 : 3 : 5 ...; return (replies, server)."""
    weights = np.arange(1, 2 * len(updates), 2)
    server = new_server(exp, listed, (weights / weights.sum()).tolist())
    server.start(held)
    replies = server.merge([u.copy() for u in updates], use or usage(len(updates)), exp.lora_ranks)
    return replies, server


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_update_is_refused_and_the_rest_merged(rule, bad):
    """Client 1's unit 0 has a bad value: only the other clients' unit 0 is merged; replies for other units stay."""
    ranks, listed = [3, 3, 3], units()
    exp = experiment(ranks, rule=rule)
    held, updates = [np.zeros_like(a) for a in arrays(ranks, 0, listed)], arrays(ranks, 1, listed)
    whole, _ = merged(exp, listed, held, updates)
    broken = [u.copy() for u in updates]
    broken[1][2] = bad
    replies, server = merged(exp, listed, held, broken)
    assert [(client, unit.name) for client, unit in server.refused] == [(1, "layers.0.experts.0.gate")]
    size = len(replies[0]) - 13 if rule == "flora" else listed[0].size(3) * 2
    first = size // 2
    for reply, before in zip(replies, whole, strict=True):
        assert np.isfinite(reply).all()
        np.testing.assert_allclose(reply[first:], before[first:], atol=1e-6)
        assert np.abs(reply[:first] - before[:first]).max() > 1e-3
    if rule == "fedavg":  # the weights of the two other clients are 1 and 5
        expected = (updates[0][:first] + 5 * updates[2][:first]) / 6
        np.testing.assert_allclose(replies[0][:first], expected, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_unit_refused_of_all_clients_keeps_its_value(rule):
    """Both clients send NaN for unit 1 and for phi: their values stay; FLoRA merges nothing into the base."""
    ranks, listed = [3, 3], units()
    exp = experiment(ranks, dmr=True, rule=rule)
    held = arrays(ranks, 0, listed)
    held[1] = held[0].copy()
    if rule == "flora":
        held = [np.concatenate([np.zeros(42, np.float32), h[42:]]) for h in held]
    updates = arrays(ranks, 1, listed)
    for update in updates:
        update[21:42] = np.nan
        update[-1] = np.nan
    replies, server = merged(exp, listed, held, updates)
    assert {unit.name for _, unit in server.refused} == {"layers.0.experts.1.gate", "layers.0.phi"}
    for reply in replies:
        if rule == "flora":
            A, B = np.split(reply[: 2 * 42].reshape(2, -1), [6 * N], axis=1)
            product = B.reshape(2, M, 6) @ A.reshape(2, 6, N)
            assert (product[1] == 0).all() and np.abs(product[0]).max() > 0.1
            assert (reply[-8:] == 0).all()
            continue
        assert (reply[21:42] == 0).all() and (reply[-8:] == 0).all()
        assert np.abs(reply[:21]).max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_an_expert_that_no_client_used(rule):
    """Under `activation` it keeps its value, whatever was sent for it; every other rule merges the updates."""
    ranks, listed = [3, 3], units()
    held = [np.zeros_like(a) for a in arrays(ranks, 0, listed)]
    updates = arrays(ranks, 1, listed)
    use = usage(2)
    use.routed_CLE[:, :, 1] = 0
    replies, _ = merged(experiment(ranks, rule=rule), listed, held, updates, use)
    unused = replies[0][42:84] if rule == "flora" else replies[0][21:42]
    assert (unused == 0).all() == (rule == "activation")
    assert np.abs(replies[0][:21]).max() > 0.01


def test_weights_of_a_round_by_hand():
    """w = (1, 1, 2) / 4, K = 2, 4, 8 of 8 experts.

    All steps done: u* = (2 + 4 + 16) / 4 / 8. The last client did half: weights (1, 1, 1) / 3, u* = 14 / 3 / 8. If it
    also sent NaN, its weight stays for its finite units, but u* = (2 + 4) / 2 / 8, because it does not count for u.
    """
    clients = [{"budget": budget} for budget in (0.25, 0.5, 1.0)]
    exp = tiny.experiment("unused", clients, num_experts=8, k_max=8, lora={"rank": 3, "alpha": 6.0})
    server = Server(exp, units(), [0.25, 0.25, 0.5])
    assert server.target == pytest.approx(22 / 32)
    for nonfinite, target in (([False] * 3, 14 / 24), ([False, False, True], 6 / 16), ([True] * 3, 0.0)):
        server.weigh(range(3), [1.0, 1.0, 0.5], nonfinite)
        assert server.weight_C.tolist() == pytest.approx([1 / 3] * 3) and server.target == pytest.approx(target)


def test_phi_stays_if_no_clients_utilisation_counts():
    listed = [Unit("layers.0.phi", "phi", 8)]
    server = Server(experiment([3], dmr=True), listed, [1.0])
    server.start([np.ones(8, np.float32)])
    server.weigh([0], [1.0], [True])
    assert (server.merge([np.ones(8, np.float32)], usage(1), [3])[0] == 0).all()


def test_clip_norm_by_hand():
    """Client 0's router update (3, 4, 0, 0, 0) has norm 5 and is cut to 1; client 1's (0.6, 0.8, ...) stays."""
    listed = [Unit("layers.0.router", "router", 5)]
    updates = [np.array([3, 4, 0, 0, 0], np.float32), np.array([0.6, 0.8, 0, 0, 0], np.float32)]
    replies, _ = merged(experiment([3, 3], clip_norm=1.0), listed, [np.zeros(5, np.float32)] * 2, updates)
    np.testing.assert_allclose(replies[0], [0.6, 0.8, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [2.0, 2.0]),
        ("momentum", [0.5 * 2, 0.5 * (0.9 * 2 + 2)]),  # lr m: m = 2, then 3.8
        # m = 0.2, v = 0.04: 0.5 * 0.2 / 0.3; then m = 0.38, v = 0.0796: 0.5 * 0.38 / (0.282136 + 0.1)
        ("adam", [0.5 * 0.2 / 0.3, 0.5 * 0.38 / (0.0796**0.5 + 0.1)]),
    ],
)
def test_server_optimizer_by_hand(kind, expected):
    """In both of two rounds every client's update is 2; betas 0.9 and 0.99, lr 0.5, eps 0.1."""
    options = {"server_optimizer": kind, "server_lr": 0.5, "server_betas": (0.9, 0.99), "server_eps": 0.1}
    listed = [Unit("layers.0.router", "router", 1)]
    server = new_server(experiment([3, 3], **options), listed, [0.5, 0.5])
    server.start([np.zeros(1, np.float32)] * 2)
    steps = []
    for _ in range(2):
        steps.append(server.merge([np.full(1, 2, np.float32) for _ in range(2)], usage(2), [3, 3])[0].item())
    assert steps == pytest.approx(expected)


def test_moments_of_a_refused_unit_stay():
    """Round 2 is refused: nothing changes, and round 3 continues from round 1's moment: m = 0.9 * 2 + 2."""
    listed = [Unit("layers.0.router", "router", 1)]
    config = {"server_optimizer": "momentum", "server_betas": (0.9, 0.99)}
    server = new_server(experiment([3], **config), listed, [1.0])
    server.start([np.zeros(1, np.float32)])
    steps = [server.merge([np.array([v], np.float32)], usage(1), [3])[0].item() for v in (2.0, np.nan, 2.0)]
    assert steps == pytest.approx([2.0, 0.0, 3.8])


@pytest.mark.parametrize("payload", ["fp32", "bf16"])
@pytest.mark.parametrize("rule", ["flexlora", "zero_pad"])
def test_owner_and_client_agree_over_rounds(rule, payload):
    """The owner's record of a client equals the client's values after the replies, in a rounded payload too."""
    ranks, listed = [1, 3], units()
    exp = experiment(ranks, dmr=True, rule=rule, payload=payload)
    held = arrays(ranks, 0, listed)
    held[0][-8:] = held[1][-8:]
    server = new_server(exp, listed, [0.5, 0.5])
    server.start(held)
    for round_number in range(3):
        replies = server.merge(arrays(ranks, 1 + round_number, listed), usage(2), ranks)
        held = [h + torch.from_numpy(r).bfloat16().float().numpy() if payload == "bf16" else h + r
                for h, r in zip(held, replies, strict=True)]  # fmt: skip
        for client, rank in enumerate(ranks):
            np.testing.assert_array_equal(server._held[0][client].numpy(), held[client][: 2 * rank * (M + N)])
            np.testing.assert_array_equal(server._held[2][client].numpy(), held[client][-8:])


@pytest.mark.parametrize("rule", ["hetlora", "zero_pad"])
def test_a_pruned_client_keeps_its_first_lora_ranks(rule):
    """A client goes from LoRA rank 3 to 2: its reply has LoRA rank 2, as a difference to its first two LoRA ranks."""
    listed = units()[:2]
    exp = experiment([3, 3], rule=rule)
    held, updates = arrays([3, 3], 0, listed), arrays([3, 3], 1, listed)
    server = new_server(exp, listed, [0.5, 0.5])
    server.start(held)
    replies = server.merge([u.copy() for u in updates], usage(2), [2, 3])
    assert [len(reply) for reply in replies] == [2 * 2 * (M + N), 2 * 3 * (M + N)]
    first = held[0][:21]
    cut = np.concatenate([first[:12].reshape(3, N)[:2].ravel(), first[12:].reshape(M, 3)[:, :2].ravel()])
    whole = held[1][:21] + replies[1][:21]
    expected = np.concatenate([whole[:12].reshape(3, N)[:2].ravel(), whole[12:].reshape(M, 3)[:, :2].ravel()])
    np.testing.assert_allclose(cut + replies[0][:14], expected, atol=1e-5)
    assert server.lora_ranks == [3, 3], "the caller sets them once every rank has its reply"


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RULES), st.integers(0, 1000), st.integers(0, 4))
def test_results_do_not_depend_on_how_units_are_spread(rule, seed, cut):
    """Compare one owner of four units with two owners, the units split at any place."""
    ranks = [1, 3] if rule in FACTOR_RULES else [3, 3]
    listed = units()
    exp = experiment(ranks, rule=rule)
    held, updates = [np.zeros_like(a) for a in arrays(ranks, 0, listed)], arrays(ranks, seed, listed)
    whole, _ = merged(exp, listed, held, updates)
    parts: list[list[np.ndarray]] = [[], []]
    for where in (slice(0, cut), slice(cut, 4)):
        part = listed[where]
        bounds = [
            (sum(u.size(r) for u in listed[: where.start]), sum(u.size(r) for u in listed[: where.start] + part))
            for r in ranks
        ]
        part_held, part_updates = ([a[i:j] for a, (i, j) in zip(x, bounds, strict=True)] for x in (held, updates))
        for client, reply in enumerate(merged(exp, part, part_held, part_updates)[0]):
            parts[client].append(reply)
    for reply, pieces in zip(whole, parts, strict=True):
        np.testing.assert_allclose(np.concatenate(pieces), reply, atol=2e-5)


def test_betas_from_yaml_are_a_list():
    assert MergeConfig.model_validate({"server_betas": [0.5, 0.9]}).server_betas == (0.5, 0.9)


@pytest.mark.parametrize("options", [{}, {"rule": "activation"}, {"server_optimizer": "adam"}])
def test_summing_in_transit_equals_merging_at_the_owner(options):
    """Linear rules, two rounds: the sum of shares times updates against the stack of all updates."""
    ranks, listed = [3, 3, 3], units()
    exp = experiment(ranks, dmr=True, **options)
    held = arrays(ranks[:1], 0, listed) * 3
    weights = [0.2, 0.3, 0.5]
    owner, other = (new_server(exp, listed, weights) for _ in range(2))
    owner.start(held)
    other.start(held)
    use = usage(3)
    use.routed_CLE[:] = torch.rand(3, 1, 8, generator=torch.Generator().manual_seed(0))
    use.routed_CLE[:, :, 1] = 0
    sizes = torch.tensor([unit.size(3) for unit in listed])
    for round_number in range(2):
        updates = arrays(ranks, 1 + round_number, listed)
        share_CU = rules.shares(other.unit_weights(listed, use)).float()
        total = sum(torch.from_numpy(u) * share_CU[c].repeat_interleave(sizes) for c, u in enumerate(updates))
        replies = owner.merge(updates, use, ranks)
        np.testing.assert_allclose(other.merge_sum(total.numpy(), use), replies[0], atol=1e-6)
        assert (replies[0][21:42] == 0).all() == (options.get("rule") == "activation")


LINEAR = [{}, {"rule": "activation"}]
NOT_LINEAR = [{"rule": "median"}, {"clip_norm": 1.0}, {"rule": "flexlora"}]


@pytest.mark.parametrize("options", [*LINEAR, *NOT_LINEAR])
def test_which_rules_are_linear(options):
    server = new_server(experiment([3], **options), units(), [1.0])
    assert server.config.is_linear == (options in LINEAR)
