"""Watch the other hosts of a job, so that it ends when one of them is cut off.

Heartbeats (heartbeat.py) notice the loss; `end_host` (exits.py) then ends each host's ranks, because the launchers do
not.
"""

import contextlib
import os
import secrets
import socket
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.population import Trainer, kind_of
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.launching.hang_watcher import Peer
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.exits import end_host, end_with_daemon
from ubsmoe_ds.mpi.heartbeat import Heartbeat, Host, open_socket
from ubsmoe_ds.mpi.rendezvous import INTERFACES, MOST_ADDRESSES, all_addresses
from ubsmoe_ds.mpi.world import World


def watch(clients: Sequence[Trainer], world: World, timeout_s: float, hang_watch: HangWatch) -> Heartbeat | None:
    """Start to watch the other hosts, and whether all ranks wait for one another (a collective).

    Args:
        clients: or groups, of the job.
        world: this rank's.
        timeout_s: seconds of silence after which a host counts as lost.
        hang_watch: this rank's.

    Returns:
        The heartbeat on the first rank of each host, to be closed by the caller; None on all other ranks, in a job on
        one host, and in a job that survives deaths, where the first rank of a host may die.
    """
    first_of = {host: world.hosts.index(host) for host in world.hosts}  # in the order of their first ranks
    if world.survives:
        return None
    peers = [Peer(*peer) for peer in gather_json(world.host_comm, hang_watch.peer)]
    if world.host_comm.rank == 0:
        hang_watch.meet(peers, acts=world.rank == 0, hosts=len(first_of))
    if len(first_of) == 1:
        return None
    end_with_daemon()
    here = world.hosts[world.rank]
    own_socket = open_socket() if first_of[here] == world.rank else None
    facts: dict[str, Any] = {"pid": os.getpid(), "pid_namespace": Path("/proc/self/ns/pid").stat().st_ino}
    if own_socket is not None:
        facts |= {"addresses": _addresses(), "port": own_socket.getsockname()[1], "token": secrets.token_hex(16)}
    facts_of = gather_json(world.comm, facts)
    if own_socket is None:
        return None
    hosts = [
        Host(_describe(clients, world, host), tuple(facts_of[first]["addresses"]), facts_of[first]["port"])
        for host, first in first_of.items()
    ]
    others = _handles(
        other["pid"]
        for rank, other in enumerate(facts_of)
        # a rank in a container of its own has another process id here; its launcher has to end it
        if world.hosts[rank] == here and rank != world.rank and other["pid_namespace"] == facts["pid_namespace"]
    )
    token = bytes.fromhex(facts_of[0]["token"])
    me = list(first_of).index(here)
    end = partial(end_host, others)
    waits, note_others = hang_watch.host_waits, hang_watch.note_others
    return Heartbeat(own_socket, me, hosts, token, timeout_s, _say, end, waits, note_others)


def _handles(pids: Iterable[int]) -> list[int]:
    """Return pidfds of those processes that allow it; the launcher has to end the others."""
    handles = []
    for pid in pids:
        # kernels before 5.3, and a Python built on one, lack it; old containers forbid it
        with contextlib.suppress(OSError, AttributeError):
            handles.append(os.pidfd_open(pid))
    return handles


def _addresses() -> list[str]:
    """Return this host's addresses, those of GLOO_SOCKET_IFNAME's interfaces first."""
    started_with = psutil.Process().environ()  # since then `join` may have set the variable for the group's own world
    chosen = started_with.get(INTERFACES, "").split(",")
    entries = sorted(all_addresses(), key=lambda entry: (entry[0] not in chosen, entry[1] != socket.AF_INET))
    return [address for _, _, address in entries][:MOST_ADDRESSES]


def _describe(clients: Sequence[Trainer], world: World, host: str) -> str:
    """Return a host as messages name it: host n1 (client 'b', job ranks 2 3)."""
    ranks = [rank for rank, other in enumerate(world.hosts) if other == host]
    names = [repr(clients[group].name) for group in sorted({world.group_of[rank] for rank in ranks})]
    kind = kind_of(clients[0])
    noun, several = f"{kind}s" if len(names) > 1 else kind, "ranks" if len(ranks) > 1 else "rank"
    return f"host {host} ({noun} {' '.join(names)}, job {several} {' '.join(map(str, ranks))})"


def _say(line: str) -> None:
    """Print a line for the user."""
    say(line, error=True)
