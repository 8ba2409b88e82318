"""Declare groups, populations of clients, and the sampling of cohorts; write out what a config abbreviates by `count`.

A client is who takes part; a group is a DeepSpeed world that trains one client after the other. Imports no torch.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ubsmoe_ds.config.messages import BelowKeyError, one_of
from ubsmoe_ds.config.sections import ClientConfig, Folder, Fraction, Name, PositiveInt, Section

MOST_CLIENTS = 100_000
OF_GROUPS = ("ranks", "expert_parallel")  # keys of a client that belong to its group, where there are groups
PLURALS = {"budgets": "budget"}
LISTS = ("hosts", "groups")  # keys whose own value is a list


class GroupConfig(Section):
    """A DeepSpeed world that trains clients in turn; `count: N` makes N. Without `groups` each client has its own."""

    name: Name = Field(description="name in messages; `g0`, `g1`, ... by default")
    ranks: PositiveInt = Field(1, description="its processes, each with one device")
    expert_parallel: PositiveInt = Field(1, description="ranks that share the experts; divides `ranks`")
    hosts: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="hosts that its ranks must be on; null: any"
    )

    @model_validator(mode="after")
    def _whole_expert_groups(self) -> GroupConfig:
        if self.ranks % self.expert_parallel:
            raise ValueError(
                f"group {self.name!r} has ranks {self.ranks}, not a multiple of its expert_parallel "
                f"{self.expert_parallel}; every expert group needs all its ranks"
            )
        return self


class SamplingConfig(Section):
    """Which clients take part in a round: the cohort. It depends on seed and round alone. Without `sampling` all do."""

    clients: PositiveInt | None = Field(None, description="clients of a round; or give `fraction`")
    fraction: Fraction | None = Field(None, description="part of all clients, rounded, at least one")
    over_sample: Annotated[float, Field(ge=1)] = Field(
        1.0,
        description="draw this many times as many clients, and merge the first that finish (arXiv 1902.01046 has 1.3); "
        "who that is depends on the machines, so such a run cannot be repeated",
    )
    by: Literal["uniform", "by_rows", "round_robin", "availability"] = Field(
        "uniform",
        description="by_rows: likelier in proportion to training rows; round_robin: in the config's order; "
        "availability: uniform among those that `availability` lists for the round",
    )
    availability: Folder | None = Field(
        None, description='JSON file: for each client the rounds that it is there, `{"c0": [[1, 5], [9, 9]]}`'
    )

    @model_validator(mode="after")
    def _one_size(self) -> SamplingConfig:
        if (self.clients is None) == (self.fraction is None):
            raise BelowKeyError(
                "clients: give the number of clients of a round, or fraction: a part of all; one of them"
            )
        if (self.by == "availability") != (self.availability is not None):
            raise BelowKeyError(
                f"availability: {self.availability!r} does not go with by: {self.by}; give both or neither"
            )
        return self

    def size(self, population: int) -> int:
        """Return the clients that a round merges."""
        if self.clients is not None:
            return self.clients
        assert self.fraction is not None  # `_one_size` asks for it
        return max(1, round(self.fraction * population))

    def drawn(self, population: int) -> int:
        """Return the clients that are drawn for a round: a cohort, or more with `over_sample`."""
        # the small term undoes binary rounding: 1.1 times 10 clients are 11
        return min(population, math.ceil(self.size(population) * self.over_sample - 1e-9))


Trainer = ClientConfig | GroupConfig  # what a DeepSpeed world is made for: a group, or a client that has its own


def may_train(group: GroupConfig, client: ClientConfig) -> bool:
    """Return whether a group may train a client: one of its `groups`, and on none but its `hosts`."""
    named = client.groups is None or group.name in client.groups
    return named and (client.hosts is None or (group.hosts is not None and set(group.hosts) <= set(client.hosts)))


def kind_of(trainer: Trainer) -> str:
    """Return what messages call it: "group", or "client" where each client has its own group."""
    return "group" if isinstance(trainer, GroupConfig) else "client"


def written_out(raw: dict[str, Any]) -> dict[str, Any]:
    """Return an experiment's raw config with every entry of `clients` and `groups` that has a `count` written out.

    Raises:
        ValueError: for an entry that cannot be written out.
    """
    changed = dict(raw)
    if isinstance(raw.get("clients"), dict):
        changed["clients"] = [raw["clients"]]
    for key, prefix in (("clients", "c"), ("groups", "g")):
        if isinstance(changed.get(key), list):
            changed[key] = _written_out(changed[key], key, prefix)
    return changed


def _written_out(entries: list[Any], key: str, prefix: str) -> list[Any]:
    """Return the entries, each that has a count as so many, with names where they lack one."""
    whole: list[Any] = []
    for place, entry in enumerate(entries):
        if not isinstance(entry, dict) or (key == "clients" and "count" not in entry):
            whole.append(entry)
            continue
        count = entry.get("count", 1)
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_CLIENTS:
            raise ValueError(f"{key}.{place}.count: {count!r} must be a whole number from 1 to {MOST_CLIENTS}")
        common = {name: value for name, value in entry.items() if name != "count"}
        first = sum(isinstance(other, dict) for other in whole) if "name" not in common else 0
        stem = common.get("name", prefix)
        numbered = "count" in entry or "name" not in common
        for number in range(count):
            own = {
                PLURALS.get(part, part): _dealt(str(part), value, number, f"{key}.{place}")
                for part, value in common.items()
            }
            whole.append(own | ({"name": f"{stem}{first + number}"} if numbered else {}))
    return whole


def _dealt(name: str, value: Any, number: int, key: str) -> Any:
    """Return the value that a list deals to one of many in turn; any other value is everybody's."""
    if not isinstance(value, list) or name in LISTS:
        return value
    if not value:
        raise ValueError(f"{key}.{name}: [] is empty; give at least one value")
    return value[number % len(value)]


def group_problems(groups: list[GroupConfig] | None, clients: list[ClientConfig], experts: int) -> list[str]:
    """Check that groups can train the clients; return one line for each problem: key, value, remedy."""
    if groups is None:
        named = next((client.name for client in clients if client.groups is not None), None)
        return [] if named is None else [f"clients: {named!r} has `groups`, but the config has none; leave it out"]
    problems, names = [], [group.name for group in groups]
    if len(set(names)) < len(names):
        problems.append(f"groups: name {next(n for n in names if names.count(n) > 1)!r} appears more than once")
    for number, group in enumerate(groups):
        if experts % group.expert_parallel:
            parallel = group.expert_parallel
            problems.append(
                f"groups.{number}.expert_parallel: {parallel} does not divide the model's {experts} experts"
            )
    for client in clients:
        own = [key for key in OF_GROUPS if getattr(client, key) != 1]
        if own:
            problems.append(f"clients: {client.name!r} has {own[0]}, which belongs to a group; move it to `groups`")
        for name in client.groups or []:
            if name not in names:
                problems.append(f"clients: {client.name!r} has groups {name!r}, which is none; {one_of(name, names)}")
        if client.hosts is not None and not any(may_train(group, client) for group in groups):
            problems.append(
                f"clients: {client.name!r} has hosts {client.hosts}, but no group that may train it has `hosts` among "
                "them; give a group these"
            )
    for group in groups:
        if not any(may_train(group, client) for client in clients):
            problems.append(f"groups: no client may be trained by {group.name!r}; remove it")
    both = next((client.name for client in clients if client.name in names), None)
    if both is not None:
        problems.append(f"groups: name {both!r} is a client's too; rename one of them")
    return problems
