"""Memory of groups that train clients in turn, and which groups suit a number of devices, on tiny numbers."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.cost import ModelShape
from ubsmoe_ds.planning.group_plan import plan_group, shapes
from ubsmoe_ds.planning.group_report import as_config, check_groups_fit, group_table, needed, shape_table, that_fit
from ubsmoe_ds.planning.inputs import PlanInput, RowLengths, rank_setup
from ubsmoe_ds.planning.memory_model import memory_by_phase
from ubsmoe_ds.planning.plan import step_bytes
from ubsmoe_ds.planning.rank_setup import trained_elements

SHAPE = ModelShape(
    layers=2, hidden=16, expert_width=12, num_experts=8, heads=2, kv_heads=2, head_dim=8, vocab=61, lora_rank=3
)
LENGTHS = RowLengths(
    length=20,
    answers=4.0,
    mean_length=10.0,
    mean_answers=2.0,
    eval_length=20,
    eval_answers=4.0,
    eval_mean_length=12.0,
    eval_rows=16,
    rows=24,
)


def population(clients: list[dict], groups: list[dict] | None = None, **sections) -> PlanInput:
    """Return a plan's input on the CPU; every client has the same rows, and a batch is 8 of them."""
    exp = tiny.experiment("unused", clients, groups=groups or [{}], **sections)
    return PlanInput(exp, SHAPE, [LENGTHS] * len(clients), on_cpu=True)


def shown(table) -> str:
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return text.getvalue()


def test_shapes_by_hand():
    """Three equal clients of work W on four devices, whose batch of 8 rows three ranks cannot divide.

    4 ranks: three turns of W / 4, nobody idles. 2 ranks: the first group has two turns of W / 2, the second one: W, and
    3/4 of the devices' time is used. 1 rank: W on three devices of four; a fourth group would have nobody. The experts
    of a group may be divided too. The fewer bytes a step sends the better.
    """
    found = shapes(population([{"budget": 0.5}] * 3), [4], rounds=2, flops_per_byte=0)
    work = found[-1].time
    assert [(s.ranks, s.groups) for s in found] == [(4, 1)] * 3 + [(1, 3)] + [(2, 2)] * 2
    assert [s.time / work for s in found] == pytest.approx([0.75] * 3 + [1.0] * 3)
    assert [s.idle for s in found] == pytest.approx([0.0] * 3 + [0.25] * 3)
    assert {s.expert_parallel for s in found[:3]} == {1, 2, 4} and found[3].plan.step_bytes == 0
    assert [s.plan.turns for s in found] == [3, 3, 3, 1, 2, 2]
    sent = [s.plan.step_bytes for s in found]
    assert sent[:3] == sorted(sent[:3]) and sent[4] <= sent[5]
    assert found == shapes(population([{"budget": 0.5}] * 3, [{"count": 2}]), [4], 2, 0), "groups do not count"


def test_bytes_inside_a_group_take_time_too():
    """Two equal clients on two devices. One rank each: W. A pair: twice W / 2 and its bytes, so it is never better.

    The time of its 10 steps a turn is told by the bytes of a step. Without a word, CPUs do 20 FLOPs a byte.
    """
    inputs = population([{"budget": 0.5}] * 2)
    alone, pair = shapes(inputs, [2], rounds=1, flops_per_byte=5.0)[:2]
    assert (alone.ranks, alone.groups, pair.ranks, pair.groups) == (1, 2, 2, 1) and alone.idle == 0
    assert pair.time == pytest.approx(alone.time + 2 * 10 * 5.0 * pair.plan.step_bytes)
    assert shapes(inputs, [2], rounds=1) == shapes(inputs, [2], 1, 20.0)
    assert shapes(replace(inputs, on_cpu=False), [2], rounds=1)[1].time > pair.time


def test_a_group_is_on_one_host():
    """On two hosts of two devices there is no group of four; on hosts of three and one, one pair and no second."""
    clients = [{"budget": 0.5}] * 4
    assert {(s.ranks, s.groups) for s in shapes(population(clients), [2, 2], 1)} == {(1, 4), (2, 2)}
    assert {(s.ranks, s.groups) for s in shapes(population(clients), [3, 1], 1)} == {(1, 4), (2, 1)}


def test_the_cohort_counts_and_not_the_population():
    """Of 10 clients one takes part in a round: only larger groups make rounds shorter."""
    found = shapes(population([{"budget": 1.0}] * 10, sampling={"clients": 1}), [4], rounds=5, flops_per_byte=0)
    assert [(s.ranks, s.groups) for s in found] == [(4, 1)] * 3 + [(2, 1)] * 2 + [(1, 1)]
    assert [s.time / found[0].time for s in found] == pytest.approx([1] * 3 + [2] * 2 + [4])
    assert [s.idle for s in found] == pytest.approx([0] * 3 + [0.5] * 2 + [0.75])


@pytest.mark.parametrize(("rule", "kept"), [("fedavg", 3), ("hetlora", 5)])
def test_a_group_keeps_two_turns_and_a_sum_or_all_of_them(rule, kept):
    """The largest phase of five turns against one; the owners' part is that of a cohort of three, or of one group."""
    inputs = population([{"budget": budget} for budget in (0.25, 0.5, 1.0)], merge={"rule": rule})
    setups = [rank_setup(inputs, 2, 0, turns) for turns in (1, 5)]
    assert [setup.kept_updates for setup in setups] == [1, kept]
    assert setups[0].clients == (1 if rule == "fedavg" else 3)
    one, five = (memory_by_phase(setup) for setup in setups)
    more = 4 * trained_elements(setups[0]).total * (kept - 1)
    assert five["train"] - one["train"] == five["merge"] - one["merge"] == more


def test_a_group_needs_what_the_hungriest_of_its_clients_needs():
    """g0 trains c0 alone, of the smaller K, but evaluates every K; g1 trains all, c1 with the largest K."""
    clients = [{"budget": 0.25, "groups": ["g0", "g1"]}, {"budget": 1.0, "groups": ["g1"]}]
    inputs = population(clients, [{}, {"ranks": 2, "expert_parallel": 2}])
    first, second = (plan_group(inputs, group, [[[0], [1]]]) for group in (0, 1))
    c0, c1 = (rank_setup(inputs, client, group) for client, group in ((0, 0), (1, 1)))
    assert first.phases["train"] == memory_by_phase(c0)["train"]
    assert first.phases["evaluate"] == memory_by_phase(replace(c0, k=4))["evaluate"] > memory_by_phase(c0)["evaluate"]
    assert (first.client, second.client) == (0, 1) and second.phases["train"] == memory_by_phase(c1)["train"]
    assert (c1.ranks, c1.expert_parallel, c1.world) == (2, 2, 3)
    assert second.step_bytes == step_bytes(c1) > first.step_bytes == 0


def test_groups_hold_the_full_lora_rank_and_a_reply_of_the_largest_stack():
    clients = [{"budget": 0.25, "lora_rank": rank} for rank in (1, 2, 3)]
    inputs = population(clients, sampling={"clients": 2}, merge={"rule": "flora"})
    setup = rank_setup(inputs, 0, 0)
    assert setup.shape.lora_rank == 3 and setup.reply_rank == 3 + 2 and setup.clients == 2
    assert rank_setup(population(clients, merge={"rule": "hetlora"}), 0, 0).reply_rank == 3


def test_what_does_not_fit_is_refused_with_what_does():
    inputs = population([{"budget": 0.5}] * 3)
    plans, found = [plan_group(inputs, 0, [[[0, 1, 2]]])], shapes(inputs, [4], rounds=1)
    sizes = sorted(needed(shape.plan) for shape in found)
    assert needed(plans[0]) > sizes[0] and that_fit(found, None) == found
    memory = (needed(plans[0]) + sizes[0]) / 2
    fitting = that_fit(found, memory)
    assert fitting == [shape for shape in found if needed(shape.plan) <= memory] and 0 < len(fitting) < len(found)
    with pytest.raises(UserError, match=r"groups: 'g0' needs .* GB a rank .* there are .* GB; groups=\[\{ranks: "):
        check_groups_fit(inputs, plans, memory, fitting[0])
    with pytest.raises(UserError, match="--devices says which groups fit"):
        check_groups_fit(inputs, plans, memory, None)
    check_groups_fit(inputs, plans, needed(plans[0]), None)
    with pytest.raises(UserError, match=r"--device-memory: no shape of groups fits in 0\.1 GB; the least, of "):
        that_fit(found, 0.1e9)
    with pytest.raises(UserError, match="no number of ranks divides the clients' batches"):
        that_fit([], None)


def test_tables_show_alike_groups_once_and_times_over_the_best():
    inputs = population([{"budget": 0.5}] * 3, [{"count": 4}, {"name": "pair", "ranks": 2}])
    rounds = [[[0], [1], [2], [], []]]
    plans = [plan_group(inputs, group, rounds) for group in range(5)]
    text = shown(group_table(inputs, plans, memory=1e9))
    assert text.count("yes") == 3 and "g0 g1 g2" in text and "pair" in text
    found = shapes(inputs, [4], rounds=1)
    text = shown(shape_table(found, 4, 1))
    assert "groups for 4 devices, by the schedules of 1 round" in text and "1.00" in text
    assert as_config(found[0]) == "groups=[{ranks: 1, count: 3}]"
    (pair,) = (shape for shape in found if (shape.ranks, shape.expert_parallel) == (2, 2))
    assert as_config(pair) == "groups=[{ranks: 2, expert_parallel: 2, count: 2}]"
