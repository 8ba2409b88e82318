"""Groups, counts of clients and sampling: what a config abbreviates, written out by hand, and what is refused."""

import pytest
from pydantic import ValidationError

from tests.support import tiny
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.population import written_out


def population(clients, **sections) -> Experiment:
    raw = {"name": "test", "model": {"path": "unused"}, "num_experts": 8, "k_max": 4, "deepspeed": tiny.deepspeed()}
    return Experiment.model_validate(raw | {"clients": clients} | sections)


def test_counts_are_written_out():
    found = written_out(
        {
            "clients": [
                {"name": "site", "budget": 1.0},
                {"count": 3, "budgets": [0.25, 0.5], "capacity_factor": 1.25, "groups": ["g0", "g1"]},
                {"count": 2, "name": "phone", "budget": 0.25},
            ],
            "groups": [{"ranks": 2, "count": 2}, {}, {"name": "last"}],
        }
    )
    common = {"capacity_factor": 1.25, "groups": ["g0", "g1"]}
    assert found["clients"] == [
        {"name": "site", "budget": 1.0},
        {"budget": 0.25, **common, "name": "c1"},
        {"budget": 0.5, **common, "name": "c2"},
        {"budget": 0.25, **common, "name": "c3"},
        {"name": "phone0", "budget": 0.25},
        {"name": "phone1", "budget": 0.25},
    ]
    assert found["groups"] == [
        {"ranks": 2, "name": "g0"},
        {"ranks": 2, "name": "g1"},
        {"name": "g2"},
        {"name": "last"},
    ]
    whole = {"clients": found["clients"], "groups": found["groups"]}
    assert written_out(whole) == whole  # a config that is read back means the same


def test_a_mapping_of_clients_is_a_population():
    exp = population({"count": 100, "budgets": [0.25, 0.5, 0.75, 1.0]}, groups=[{"count": 4}], sampling={"clients": 10})
    assert [client.name for client in exp.clients] == [f"c{n}" for n in range(100)]
    assert [exp.active_experts(client) for client in exp.clients[:5]] == [1, 2, 3, 4, 1]
    assert exp.world_size == 4 and exp.takes_turns and exp.train.optimizer_state == "reset"
    assert Experiment.model_validate(exp.model_dump()) == exp


def test_without_groups_nothing_changes():
    exp = population([{"name": "a", "budget": 0.5, "ranks": 2}, {"name": "b", "budget": 1.0}])
    assert not exp.takes_turns and exp.train.optimizer_state == "keep"  # as the preset says
    assert exp.world_size == 3 and list(exp.trainers) == exp.clients
    assert [exp.clients_for(group) for group in range(2)] == [[0], [1]] and exp.trained_by(0, 0) is exp.clients[0]


def test_groups_of_clients_by_hand():
    """c0 may use g1 alone; the others all. Each client has one group that counts its rows."""
    clients = [{"name": "c0", "budget": 0.5, "groups": ["g1"]}, {"count": 3, "budget": 1.0}]
    exp = population(clients, groups=[{"ranks": 2, "expert_parallel": 2}, {}])
    assert [exp.allowed_groups(client) for client in range(4)] == [[1], [0, 1], [0, 1], [0, 1]]
    assert exp.clients_for(0) == [1, 2, 3] and exp.clients_for(1) == [0, 1, 2, 3]
    assert exp.clients_of(0) == [2] and exp.clients_of(1) == [0, 1, 3]
    trained = exp.trained_by(1, 0)
    assert (trained.name, trained.ranks, trained.expert_parallel) == ("c1", 2, 2)


def test_what_deaths_leave_by_hand():
    """Without g1 nobody may train c0; the others keep their numbers. Clients that are sampled lose their own group."""
    clients = [{"name": "c0", "budget": 0.5, "groups": ["g1"]}, {"count": 3, "budget": 1.0}]
    left = population(clients, groups=[{"ranks": 2, "expert_parallel": 2}, {}, {}]).without([1])
    assert [group.name for group in left.trainers] == ["g0", "g2"] and left.world_size == 3
    assert [left.allowed_groups(client) for client in range(4)] == [[], [0, 1], [0, 1], [0, 1]]
    assert left.clients_left == [1, 2, 3] and left.clients_for(0) == [1, 2, 3]
    assert left.without([0]).clients_left == [1, 2, 3] and left.without([0, 1]).clients_left == []
    clients = [{"name": "a", "budget": 0.5}, {"name": "b", "budget": 1.0, "ranks": 2}, {"name": "c", "budget": 1.0}]
    sampled = population(clients, sampling={"clients": 2}).without([0])
    assert sampled.takes_turns and [sampled.allowed_groups(client) for client in range(3)] == [[], [0], [1]]
    assert population(clients, sampling={"clients": 2}).trained_by(0, 1).ranks == 2
    assert (sampled.trained_by(1, 0).name, sampled.trained_by(1, 0).ranks, sampled.world_size) == ("b", 2, 3)
    assert sampled.views == population(clients, sampling={"clients": 2}).views
    whole = population(clients).without([1])
    assert [client.name for client in whole.trainers] == ["a", "c"] and whole.clients_left == [0, 1]


def test_views_where_clients_take_turns():
    """Two LoRA ranks and two K: clients with both alike share a view; with self-pruning each has its own."""
    clients = [{"count": 4, "budgets": [0.5, 1.0], "lora_rank": [2, 2, 4, 4]}]
    merge = {"rule": "zero_pad"}
    exp = population(clients, groups=[{}], merge=merge, lora={"rank": 4})
    assert exp.views == ["k2-r2", "k4-r2", "k2-r4", "k4-r4"]
    assert population(clients, groups=[{}], merge=merge, lora={"rank": 4, "prune_penalty": 0.1}).views[0] == "c0"
    assert population([{"count": 2, "budget": 1.0}], groups=[{}]).views == ["k4", "k4"]


REFUSED = {
    "clients.0.count: 0 must be a whole number": ({"count": 0, "budget": 1.0}, {}),
    "clients.0.budgets: [] is empty": ({"count": 2, "budgets": []}, {}),
    "sampling.clients: 3 exceeds the 2 clients": ({"count": 2, "budget": 1.0}, {"sampling": {"clients": 3}}),
    "give the number of clients of a round, or fraction": ({"count": 2, "budget": 1.0}, {"sampling": {}}),
    "has ranks 3, not a multiple of its expert_parallel": (
        {"count": 2, "budget": 1.0},
        {"groups": [{"ranks": 3, "expert_parallel": 2}]},
    ),
    "has ranks, which belongs to a group": ({"count": 2, "budget": 1.0, "ranks": 2}, {"groups": [{}]}),
    "has groups 'g9', which is none": ({"count": 2, "budget": 1.0, "groups": ["g9"]}, {"groups": [{}]}),
    "has `groups`, but the config has none": ({"count": 2, "budget": 1.0, "groups": ["g0"]}, {}),
    "groups: no client may be trained by 'g1'": (
        {"count": 2, "budget": 1.0, "groups": ["g0"]},
        {"groups": [{"count": 2}]},
    ),
    "groups: name 'c1' is a client's too": ({"count": 2, "budget": 1.0}, {"groups": [{"name": "c1"}]}),
    "sampling.over_sample: 1.5 does not work with fault_tolerance 'shrink'": (
        {"count": 2, "budget": 1.0},
        {"sampling": {"clients": 1, "over_sample": 1.5}, "fault_tolerance": "shrink"},
    ),
    "train_batch_size: 8 is not a multiple of ranks 3": ({"count": 2, "budget": 1.0}, {"groups": [{"ranks": 3}]}),
    "gradient_accumulation_steps 1 2 differ": (
        {"count": 2, "budget": 1.0, "gradient_accumulation_steps": [1, 2]},
        {"groups": [{}], "deepspeed": tiny.deepspeed(zero=1)},
    ),
    "deepspeed.scheduler: does not work with `groups`": (
        {"count": 2, "budget": 1.0},
        {"groups": [{}], "deepspeed": tiny.deepspeed() | {"scheduler": {"type": "WarmupLR", "params": {}}}},
    ),
    "does not go with by: availability": (
        {"count": 2, "budget": 1.0},
        {"sampling": {"clients": 1, "by": "availability"}},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    clients, sections = REFUSED[message]
    with pytest.raises(ValidationError) as raised:
        population(clients, **sections)
    assert message in str(raised.value)


def test_a_client_of_a_site_is_trained_on_its_hosts_alone():
    """g0 is on a, g1 on a and b, g2 anywhere: who names a gets g0, who names both gets g0 and g1."""
    groups = [{"hosts": ["a"]}, {"hosts": ["a", "b"]}, {}]
    clients = [{"budget": 1.0, "hosts": ["a"]}, {"budget": 1.0, "hosts": ["b", "a"]}, {"budget": 1.0}]
    clients += [{"budget": 1.0, "hosts": ["a", "b"], "groups": ["g1", "g2"]}]
    exp = population([client | {"name": f"c{n}"} for n, client in enumerate(clients)], groups=groups)
    assert [exp.allowed_groups(client) for client in range(4)] == [[0], [0, 1], [0, 1, 2], [1]]
    with pytest.raises(ValidationError, match=r"'c0' has hosts \['b'\], but no group that may train it has `hosts`"):
        population([{"budget": 1.0, "hosts": ["b"], "name": "c0"}, {"budget": 1.0, "name": "c1"}], groups=groups)
