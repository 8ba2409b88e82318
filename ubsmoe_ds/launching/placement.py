"""Decide which host the ranks of each client, or group, run on. Names and numbers only: no MPI, no torch.

A client's ranks share a host where the numbers allow it. Where they do not, the clients that lose least are split
first: into whole expert-parallel groups, whose all-to-alls then stay inside a host, and last into single ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.population import Trainer, kind_of

MOST_TRIES = 1000  # choices of a host before a way of splitting counts as impossible
WHOLE, GROUPS, RANKS = range(3)  # how far a client is split


class _Piece(NamedTuple):
    """Ranks of a client that stay on one host; a `loose` piece is any number of ranks that may be on several hosts."""

    client: int
    size: int
    hosts: tuple[str, ...]  # hosts that it may be on
    loose: bool = False


def place(clients: Sequence[Trainer], slots: Mapping[str, int]) -> list[list[str]]:
    """Choose a host for each rank of each client.

    Args:
        clients: or groups; their `ranks`, `expert_parallel` and `hosts` are read.
        slots: name of a host -> number of ranks that it has room for.

    Returns:
        For each client the host name of each of its ranks; ranks on one host, and ranks of one expert-parallel group,
        are consecutive.

    Raises:
        UserError: for too few slots, and for a client pinned to hosts that do not exist or have too few slots.
    """
    _check_room(clients, slots)
    allowed = [_allowed(client, slots) for client in clients]
    fits = [_fits(client.ranks, hosts, slots) for client, hosts in zip(clients, allowed, strict=True)]
    split = [WHOLE if whole else GROUPS for whole in fits]
    # clients without expert parallelism and with few ranks lose least by a split
    order = sorted(range(len(clients)), key=lambda c: (clients[c].expert_parallel, clients[c].ranks))
    # first nobody beyond what does not fit whole, then one client more at a time, into groups and at last into ranks
    for c, depth in [(order[0], WHOLE), *((c, depth) for depth in (GROUPS, RANKS) for c in order)]:
        split[c] = max(split[c], depth)
        pieces = [p for n, client in enumerate(clients) for p in _pieces(n, client, split[n], allowed[n], slots)]
        placed = _pack(pieces, slots)
        if placed is not None:
            return _by_client(placed, len(clients), list(slots))
    pinned = ", ".join(
        f"{client.name!r} {client.ranks} on {' '.join(client.hosts)}" for client in clients if client.hosts
    )
    raise UserError(
        f"{kind_of(clients[0])}s: no way was found to put them where their `hosts` say ({pinned}); give these more "
        "slots"
    )


def _check_room(clients: Sequence[Trainer], slots: Mapping[str, int]) -> None:
    """Raise UserError if all hosts together have too few slots."""
    needed, given = sum(client.ranks for client in clients), sum(slots.values())
    if needed > given:
        each = ", ".join(f"{host} {count}" for host, count in slots.items())
        kind = kind_of(clients[0])
        raise UserError(
            f"{kind}s: need {needed} ranks, the hosts have {given} slots ({each}): {needed - given} too few; add hosts "
            f"or slots, or lower the {kind}s' ranks"
        )


def _allowed(client: Trainer, slots: Mapping[str, int]) -> tuple[str, ...]:
    """Return the hosts that a client may be on."""
    if client.hosts is None:
        return tuple(slots)
    allowed = tuple(dict.fromkeys(_named(name, client, slots) for name in client.hosts))
    room = sum(slots[host] for host in allowed)
    if room < client.ranks:
        raise UserError(
            f"{kind_of(client)}s: {client.name!r} needs {client.ranks} ranks, its hosts {' '.join(client.hosts)} have "
            f"{room} slots; add slots or hosts, or lower its ranks"
        )
    return allowed


def _named(name: str, client: Trainer, slots: Mapping[str, int]) -> str:
    """Resolve a name to exactly one host; ambiguity is an error, because the client's data may exist only there."""
    equal = [host for host in slots if host.partition("#")[0] == name]  # gpu1#2 is a second host named gpu1
    matches = equal or [host for host in slots if _may_be(name, host.partition("#")[0])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"{kind_of(client)}s: {client.name!r} has hosts {name!r}, which may be any of {', '.join(matches)}; write "
            "a name that only one of them has"
        )
    raise UserError(
        f"{kind_of(client)}s: {client.name!r} has hosts {name!r}, which is not among those of this job "
        f"({', '.join(slots)}); correct it, or start the job on that host too"
    )


def _may_be(name: str, host: str) -> bool:
    """Return whether two names differ only in that one of them leaves out the domain."""
    short, dotted = sorted((name, host), key=len)
    return "." not in short and dotted.startswith(f"{short}.") and not dotted.replace(".", "").isdigit()


def _fits(size: int, hosts: Sequence[str], slots: Mapping[str, int]) -> bool:
    """Return whether one of the hosts has room for `size` ranks."""
    return any(slots[host] >= size for host in hosts)


def _pieces(number: int, client: Trainer, split: int, hosts: tuple[str, ...], slots: Mapping[str, int]) -> list[_Piece]:
    """Return a client's pieces when it is split as far as `split` says."""
    group = client.expert_parallel
    if split == WHOLE:
        return [_Piece(number, client.ranks, hosts)]
    if split == GROUPS and group > 1 and _fits(group, hosts, slots):
        return [_Piece(number, group, hosts)] * (client.ranks // group)
    if len(hosts) < len(slots):  # other clients may need these hosts, so it matters how many ranks each gets
        return [_Piece(number, 1, hosts)] * client.ranks
    return [_Piece(number, client.ranks, hosts, loose=True)]


def _pack(pieces: Sequence[_Piece], slots: Mapping[str, int]) -> list[tuple[_Piece, list[str]]] | None:
    """Search hosts for each piece: those with the least choice come first, loose ones fill up. None: there is none."""
    order = sorted(pieces, key=lambda piece: (len(piece.hosts), piece.loose, -piece.size))
    free = dict(slots)
    placed: list[tuple[_Piece, list[str]]] = []
    interchangeable = all(len(piece.hosts) == len(slots) for piece in pieces)
    left = [_choices(order[0], free, placed, interchangeable)]  # untried choices of each placed piece and of the next
    for _ in range(MOST_TRIES + len(order)):
        hosts = next(left[-1], None)
        while hosts is None:  # no choice is left for this piece: move the one before it
            left.pop()
            if not left:
                return None
            _move(free, placed.pop()[1], 1)
            hosts = next(left[-1], None)
        _move(free, hosts, -1)
        placed.append((order[len(placed)], hosts))
        if len(placed) == len(order):
            return placed
        left.append(_choices(order[len(placed)], free, placed, interchangeable))
    return None


def _move(free: dict[str, int], hosts: Sequence[str], sign: int) -> None:
    """Take one slot of each host (sign -1), or give it back (1)."""
    for host in hosts:
        free[host] += sign


def _choices(
    piece: _Piece, free: Mapping[str, int], placed: Sequence[tuple[_Piece, list[str]]], interchangeable: bool
) -> Iterator[list[str]]:
    """Yield ways to place a piece: hosts that its client is on already come first, then the fullest with room for it.

    Of hosts that differ only in their names one is tried.
    """
    if piece.loose:
        hosts = sorted(piece.hosts, key=lambda host: -free[host])
        filled = [host for host in hosts for _ in range(free[host])][: piece.size]
        if len(filled) == piece.size:
            yield filled
        return
    mine = {host for other, hosts in placed if other.client == piece.client for host in hosts}
    seen = set()
    for host in sorted(piece.hosts, key=lambda host: (host not in mine, free[host])):
        kind = (host in mine, free[host], "" if interchangeable else host)
        if free[host] >= piece.size and kind not in seen:
            seen.add(kind)
            yield [host] * piece.size


def _by_client(placed: Sequence[tuple[_Piece, list[str]]], clients: int, hosts: Sequence[str]) -> list[list[str]]:
    """Return the host of each rank of each client; a client's ranks follow the order of `hosts`."""
    places: list[list[str]] = [[] for _ in range(clients)]
    for piece, chosen in placed:
        places[piece.client] += chosen
    return [sorted(place, key=hosts.index) for place in places]


def job_order(places: Sequence[Sequence[str]], started: Sequence[str]) -> list[int]:
    """Return the number that each rank of the job was started with, in the order of the clients.

    Args:
        places: from `place`, with as many ranks on each host as were started there.
        started: host of each rank, in the order in which they were started.
    """
    waiting: dict[str, list[int]] = {}
    for number, host in enumerate(started):
        waiting.setdefault(host, []).append(number)
    return [waiting[host].pop(0) for client in places for host in client]


def describe(clients: Sequence[Trainer], places: Sequence[Sequence[str]]) -> str:
    """Return one line: each host with its clients and their ranks, and whose expert parallelism crosses hosts."""
    on_host: dict[str, list[str]] = {}
    crossing = []
    for client, hosts in zip(clients, places, strict=True):
        for host, count in Counter(hosts).items():
            on_host.setdefault(host, []).append(f"{client.name} {count}")
        groups = [hosts[n : n + client.expert_parallel] for n in range(0, client.ranks, client.expert_parallel)]
        if any(len(set(group)) > 1 for group in groups):
            crossing.append(client.name)
    line = "; ".join(f"{host}: {', '.join(names)}" for host, names in on_host.items())
    if crossing:
        line += f"; expert parallelism of {', '.join(crossing)} crosses hosts"
    return line
