"""Which host the ranks of each client are on. Names and numbers only: no MPI, and no torch.

A client's ranks share a host where the numbers allow it. Where they do not, the clients that lose least by it are split
first: into whole expert groups, whose all-to-alls then stay inside a host, and only at last into single ranks.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.sections import ClientConfig

MOST_TRIES = 1000  # choices of a host, until a way of splitting counts as impossible
HOSTFILE_LINE = re.compile(r"(?P<host>[^\s:]+)(\s+slots=|:)(?P<slots>\d+)")
WHOLE, GROUPS, RANKS = range(3)  # how far a client is split


class _Piece(NamedTuple):
    """Ranks of a client that stay together, or where it is `loose` any number of its ranks."""

    client: int
    size: int
    hosts: tuple[str, ...]  # where they may be
    loose: bool = False


def place(clients: Sequence[ClientConfig], slots: Mapping[str, int]) -> list[list[str]]:
    """The host of each rank of each client, in the order of the client's ranks.

    Args:
        clients: with their `ranks`, `expert_parallel` and `hosts`.
        slots: name of a host -> ranks that it has room for.

    Returns:
        For each client the names of its ranks' hosts; the ranks of a host, and of an expert group, follow each other.

    Raises:
        UserError: for too few slots, and for a client pinned to hosts that are not there or have too few slots.
    """
    needed, given = sum(client.ranks for client in clients), sum(slots.values())
    if needed > given:
        each = ", ".join(f"{host} {count}" for host, count in slots.items())
        raise UserError(
            f"clients: need {needed} ranks, the hosts have {given} slots ({each}): {needed - given} too few; add hosts "
            "or slots, or lower the clients' ranks"
        )
    allowed = [_allowed(client, slots) for client in clients]
    fits = [_fits(client.ranks, hosts, slots) for client, hosts in zip(clients, allowed, strict=True)]
    split = [WHOLE if whole else GROUPS for whole in fits]
    # least is lost with clients that have no expert parallelism, and few ranks
    order = sorted(range(len(clients)), key=lambda c: (clients[c].expert_parallel, clients[c].ranks))
    for c, depth in [(order[0], WHOLE), *((c, depth) for depth in (GROUPS, RANKS) for c in order)]:
        split[c] = max(split[c], depth)
        pieces = [p for n, client in enumerate(clients) for p in _pieces(n, client, split[n], allowed[n], slots)]
        found = _pack(pieces, slots)
        if found is not None:
            return _by_client(found, len(clients), list(slots))
    pinned = ", ".join(
        f"{client.name!r} {client.ranks} on {' '.join(client.hosts)}" for client in clients if client.hosts
    )
    raise UserError(f"clients: no way was found to put them where their `hosts` say ({pinned}); give these more slots")


def _allowed(client: ClientConfig, slots: Mapping[str, int]) -> tuple[str, ...]:
    """Hosts that a client may be on."""
    if client.hosts is None:
        return tuple(slots)
    found = tuple(dict.fromkeys(_named(name, client, slots) for name in client.hosts))
    room = sum(slots[host] for host in found)
    if room < client.ranks:
        raise UserError(
            f"clients: {client.name!r} needs {client.ranks} ranks, its hosts {' '.join(client.hosts)} have {room} "
            "slots; add slots or hosts, or lower its ranks"
        )
    return found


def _named(name: str, client: ClientConfig, slots: Mapping[str, int]) -> str:
    """The one host that a name stands for; a client's data may be nowhere else, so in doubt it is refused."""
    equal = [host for host in slots if host.partition("#")[0] == name]  # gpu1#2: another of the same name
    matches = equal or [host for host in slots if _may_be(name, host.partition("#")[0])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UserError(
            f"clients: {client.name!r} has hosts {name!r}, which may be any of {', '.join(matches)}; write a name that "
            "only one of them has"
        )
    raise UserError(
        f"clients: {client.name!r} has hosts {name!r}, which is not among those of this job ({', '.join(slots)}); "
        "correct it, or start the job on that host too"
    )


def _may_be(name: str, host: str) -> bool:
    """Whether two names differ only in that one of them leaves out the domain."""
    short, dotted = sorted((name, host), key=len)
    return "." not in short and dotted.startswith(f"{short}.") and not dotted.replace(".", "").isdigit()


def _fits(size: int, hosts: Sequence[str], slots: Mapping[str, int]) -> bool:
    return any(slots[host] >= size for host in hosts)


def _pieces(
    number: int, client: ClientConfig, split: int, hosts: tuple[str, ...], slots: Mapping[str, int]
) -> list[_Piece]:
    group = client.expert_parallel
    if split == WHOLE:
        return [_Piece(number, client.ranks, hosts)]
    if split == GROUPS and group > 1 and _fits(group, hosts, slots):
        return [_Piece(number, group, hosts)] * (client.ranks // group)
    if len(hosts) < len(slots):  # how many ranks each of them gets may matter to others that need them
        return [_Piece(number, 1, hosts)] * client.ranks
    return [_Piece(number, client.ranks, hosts, loose=True)]


def _pack(pieces: Sequence[_Piece], slots: Mapping[str, int]) -> list[tuple[_Piece, list[str]]] | None:
    """Hosts for the ranks of each piece, by trying; those with the least choice come first, loose ones fill up."""
    order = sorted(pieces, key=lambda piece: (len(piece.hosts), piece.loose, -piece.size))
    free = dict(slots)
    found: list[tuple[_Piece, list[str]]] = []
    interchangeable = all(len(piece.hosts) == len(slots) for piece in pieces)
    left = [_choices(order[0], free, found, interchangeable)]  # for each piece that has a place, and the next
    for _ in range(MOST_TRIES + len(order)):
        hosts = next(left[-1], None)
        while hosts is None:  # nothing is left for this piece: another place for the one before it
            left.pop()
            if not left:
                return None
            _move(free, found.pop()[1], 1)
            hosts = next(left[-1], None)
        _move(free, hosts, -1)
        found.append((order[len(found)], hosts))
        if len(found) == len(order):
            return found
        left.append(_choices(order[len(found)], free, found, interchangeable))
    return None


def _move(free: dict[str, int], hosts: Sequence[str], sign: int) -> None:
    for host in hosts:
        free[host] += sign


def _choices(
    piece: _Piece, free: Mapping[str, int], found: Sequence[tuple[_Piece, list[str]]], interchangeable: bool
) -> Iterator[list[str]]:
    """Ways to put a piece: hosts that its client is on already come first, then the fullest with room for it.

    Of hosts that differ in nothing but their names one is tried.
    """
    if piece.loose:
        hosts = sorted(piece.hosts, key=lambda host: -free[host])
        filled = [host for host in hosts for _ in range(free[host])][: piece.size]
        if len(filled) == piece.size:
            yield filled
        return
    mine = {host for other, hosts in found if other.client == piece.client for host in hosts}
    seen = set()
    for host in sorted(piece.hosts, key=lambda host: (host not in mine, free[host])):
        kind = (host in mine, free[host], "" if interchangeable else host)
        if free[host] >= piece.size and kind not in seen:
            seen.add(kind)
            yield [host] * piece.size


def _by_client(found: Sequence[tuple[_Piece, list[str]]], clients: int, hosts: Sequence[str]) -> list[list[str]]:
    places: list[list[str]] = [[] for _ in range(clients)]
    for piece, chosen in found:
        places[piece.client] += chosen
    return [sorted(place, key=hosts.index) for place in places]


def job_order(places: Sequence[Sequence[str]], started: Sequence[str]) -> list[int]:
    """For each rank of the job in the order of the clients, the number it was started with.

    Args:
        places: from `place`, with as many ranks on each host as were started there.
        started: the host of each rank in the order in which they were started.
    """
    waiting: dict[str, list[int]] = {}
    for number, host in enumerate(started):
        waiting.setdefault(host, []).append(number)
    return [waiting[host].pop(0) for client in places for host in client]


def describe(clients: Sequence[ClientConfig], places: Sequence[Sequence[str]]) -> str:
    """One line: each host with its clients and their ranks, and which expert groups cross hosts."""
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


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host: lines `host slots=N` (DeepSpeed, Open MPI) or `host:N` (MPICH); # begins a comment.

    Raises:
        UserError: naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: {path} cannot be read ({error}); check the path") from error
    found: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = HOSTFILE_LINE.fullmatch(text)
        if match is None or int(match["slots"]) < 1:
            raise UserError(f"--hostfile: {path}, line {number}: {text!r} is not `host slots=N` with N at least 1")
        if match["host"] in found:
            raise UserError(
                f"--hostfile: {path}, line {number}: {match['host']!r} stands there twice; give it one line"
            )
        found[match["host"]] = int(match["slots"])
    if not found:
        raise UserError(f"--hostfile: {path} names no host; write lines `host slots=N`")
    return found
