"""Cohorts and schedules against values worked out by hand, and the statistics of many draws."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.population import SamplingConfig
from ubsmoe_ds.planning.cohort import Cohorts
from ubsmoe_ds.planning.schedule import assign, loads, lower_bound


def population(count: int, sampling: dict | None, groups: list[dict] | None = None, **sections) -> Experiment:
    several = {"groups": groups or [{"count": 2}], "sampling": sampling}
    return tiny.experiment("unused", [{"budget": 0.5}] * count, **several, **sections)


def draws(exp: Experiment, rows: list[int], rounds: int) -> list[list[int]]:
    cohorts = Cohorts(exp, rows)
    return [cohorts.of_round(number) for number in range(1, rounds + 1)]


def test_uniform_cohorts_are_uniform_over_a_thousand_rounds():
    """Each of 20 clients is in a tenth of 10 in 1,000 rounds; pairs too. The seed is fixed, so the test is as well."""
    found = draws(population(20, {"clients": 4}), [1] * 20, 1000)
    assert all(len(set(cohort)) == 4 and cohort == sorted(cohort) for cohort in found)
    counts = Counter(client for cohort in found for client in cohort)
    # draws without replacement: the statistic is (n - k) / (n - 1) times a chi-square of n - 1
    statistic = sum((counts[client] - 200) ** 2 / 200 for client in range(20)) * 19 / 16
    assert 7.63 < statistic < 36.19  # 1 % and 99 % of chi-square with 19 degrees of freedom
    pairs = Counter((a, b) for cohort in found for a in cohort for b in cohort if a < b)
    assert len(pairs) == 190 and max(pairs.values()) < 2 * 1000 * 6 / 190


def test_cohorts_depend_on_seed_and_round_alone():
    first = draws(population(20, {"clients": 5}), [1] * 20, 6)
    other_groups = [{"ranks": 2, "expert_parallel": 2, "count": 3}]
    assert draws(population(20, {"clients": 5}, other_groups), [7] * 20, 6) == first
    assert draws(population(20, {"fraction": 0.25}), [1] * 20, 6) == first
    assert draws(population(20, {"clients": 5}, seed=1), [1] * 20, 6) != first
    assert len({tuple(cohort) for cohort in first}) > 1


def test_by_rows_draws_in_proportion_to_rows():
    """With one client a round, 3,000 rounds and rows 1 : 2 : 3 the counts are near 500, 1000, 1500."""
    found = Counter(cohort[0] for cohort in draws(population(3, {"clients": 1, "by": "by_rows"}), [10, 20, 30], 3000))
    statistic = sum((found[client] - expected) ** 2 / expected for client, expected in enumerate((500, 1000, 1500)))
    assert statistic < 9.21  # 99 % with two degrees of freedom


def test_round_robin_by_hand():
    found = draws(population(5, {"clients": 2, "by": "round_robin"}), [1] * 5, 5)
    assert found == [[0, 1], [2, 3], [0, 4], [1, 2], [3, 4]]


def test_availability(tmp_path):
    """c0 is there in rounds 1 and 3, c1 in 1; c2 always. Two are asked for: round 2 has one."""
    path = tmp_path / "there.json"
    path.write_text(json.dumps({"c0": [[1, 1], [3, 3]], "c1": [[1, 1]]}))
    sampling = {"clients": 2, "by": "availability", "availability": str(path)}
    exp = population(3, sampling, train={"rounds": 3})
    found = draws(exp, [1] * 3, 3)
    assert found[1:] == [[2], [0, 2]] and len(found[0]) == 2
    path.write_text(json.dumps({"c0": [[1, 1]], "c1": [[1, 1]], "c2": [[1, 2]]}))
    with pytest.raises(UserError, match=r"sampling\.availability: no client is there in round 3"):
        Cohorts(exp, [1] * 3)
    path.write_text(json.dumps({"c9": [[1, 1]]}))
    with pytest.raises(UserError, match="names 'c9', which is no client"):
        Cohorts(exp, [1] * 3)


def test_everybody_without_sampling():
    assert draws(population(3, None), [1] * 3, 2) == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("by", ["uniform", "by_rows", "round_robin"])
def test_cohorts_of_those_that_are_left(by):
    """Of six clients c1 and c4 are lost: a cohort has three of the other four, and five if five are asked for."""
    cohorts = Cohorts(population(6, {"clients": 3, "by": by}), [1, 2, 3, 4, 5, 6])
    cohorts.lose([1])
    cohorts.lose([4])
    found = [cohorts.of_round(number) for number in range(1, 9)]
    assert all(len(set(cohort)) == 3 and cohort == sorted(cohort) for cohort in found)
    assert {client for cohort in found for client in cohort} == {0, 2, 3, 5}
    everybody = Cohorts(population(6, {"clients": 5, "by": by}), [1] * 6)
    everybody.lose([1, 4])
    assert everybody.of_round(3) == [0, 2, 3, 5]


def test_round_robin_goes_on_with_those_that_are_left():
    """Two of c0, c2, c3, c4 a round; by hand."""
    cohorts = Cohorts(population(5, {"clients": 2, "by": "round_robin"}), [1] * 5)
    cohorts.lose([1])
    assert [cohorts.of_round(number) for number in (2, 3, 4)] == [[3, 4], [0, 2], [3, 4]]


def test_schedule_by_hand():
    """5, 4, 3, 3 on two equal groups: 5 | 4, then 3 to the one with 4, then 3 to the one with 5."""
    costs = {client: {0: cost, 1: cost} for client, cost in {7: 3.0, 2: 5.0, 4: 3.0, 1: 4.0}.items()}
    turns = assign(costs, 2)
    assert turns == [[2, 7], [1, 4]]
    assert loads(costs, turns) == [8.0, 7.0] and lower_bound(costs, 2) == 7.5


def test_a_client_goes_where_it_is_done_soonest_and_only_where_it_may():
    """Group 1 is faster: two clients are done there in 8, before one on group 0; c2 may only use group 0."""
    costs = {0: {0: 9.0, 1: 4.0}, 1: {0: 9.0, 1: 4.0}, 2: {0: 2.0}}
    assert assign(costs, 2) == [[2], [0, 1]]
    assert assign({}, 3) == [[], [], []]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=12), st.integers(1, 4))
def test_a_schedule_is_within_grahams_bound_of_the_best(costs, groups):
    """LPT's makespan is at most 4/3 - 1/(3 m) times the best, which is at least the lower bound times ... of LPT."""
    table = {client: dict.fromkeys(range(groups), cost) for client, cost in enumerate(costs)}
    turns = assign(table, groups)
    assert sorted(client for clients in turns for client in clients) == list(range(len(costs)))
    longest = max(loads(table, turns))
    assert longest >= lower_bound(table, groups) * (1 - 1e-12)
    assert longest <= sum(costs) / groups + max(costs) * (groups - 1) / groups + 1e-9


def test_ten_clients_of_four_budgets_leave_four_groups_little_idle():
    """Costs in the proportion of the built-in model's FLOPs; over 200 cohorts of 10 of 100 clients, groups idle."""
    exp = population(100, {"clients": 10})
    flops = [36.5, 57.6, 78.8, 100.0]
    idle, over = [], []
    for cohort in draws(exp, [1] * 100, 200):
        costs = {client: dict.fromkeys(range(4), flops[client % 4]) for client in cohort}
        busy = loads(costs, assign(costs, 4))
        idle.append(1 - sum(busy) / (4 * max(busy)))
        over.append(max(busy) / lower_bound(costs, 4))
    assert np.mean(idle) < 0.15 and np.mean(over) < 1.18


def test_more_clients_are_drawn_than_merged():
    """1.1 times 10 are 11, not 12; never more than there are."""
    for size, factor, drawn in [(10, 1.1, 11), (10, 1.3, 13), (10, 1.01, 11), (10, 9.0, 20), (3, 1.0, 3)]:
        sampling = SamplingConfig(clients=size, over_sample=factor)
        assert (sampling.size(20), sampling.drawn(20)) == (size, drawn)
