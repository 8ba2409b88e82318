"""A job on several hosts ends when one of them is cut off: who is on which host, and how ranks then end.

What the launchers do with a host that they cannot reach, found by trying: after Abort MPICH's mpiexec ends at once with
its code, but ranks on the other side of the cut live on; they have to end themselves, and then their daemon does too.
Open MPI's daemons wait for each other for ever, or where TCP gives a connection up end with any code, 0 too, and leave
ranks behind; so there each host's daemon is ended by force, and ranks never outlive theirs.
"""

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.exits import end_host, end_with_daemon
from ubsmoe_ds.mpi.heartbeat import Heartbeat, Host, open_socket
from ubsmoe_ds.mpi.rendezvous import INTERFACES, MOST_ADDRESSES, all_addresses
from ubsmoe_ds.mpi.world import World


def watch(exp: Experiment, world: World) -> Heartbeat | None:
    """Start to watch the other hosts (a collective); None on ranks that do not: all but the first of each host.

    Nobody does on one host, nor where the job goes on without ranks that die: there the first rank of a host may.
    """
    first_of = {host: world.hosts.index(host) for host in world.hosts}  # in the order of their first ranks
    if len(first_of) == 1 or world.survives:
        return None
    end_with_daemon()
    here = world.hosts[world.rank]
    speaks = first_of[here] == world.rank
    own_socket = open_socket() if speaks else None
    told: dict[str, Any] = {"pid": os.getpid(), "counted_in": Path("/proc/self/ns/pid").stat().st_ino}
    if own_socket is not None:
        told |= {"addresses": _addresses(), "port": own_socket.getsockname()[1], "token": secrets.token_hex(16)}
    everybody = gather_json(world.comm, told)
    if own_socket is None:
        return None
    hosts = [
        Host(_describe(exp, world, host), tuple(everybody[first]["addresses"]), everybody[first]["port"])
        for host, first in first_of.items()
    ]
    others = _handles(
        other["pid"]
        for rank, other in enumerate(everybody)
        # in a container of its own a rank's process has another number here; its launcher has to end it
        if world.hosts[rank] == here and rank != world.rank and other["counted_in"] == told["counted_in"]
    )
    token = bytes.fromhex(everybody[0]["token"])
    me = list(first_of).index(here)
    return Heartbeat(own_socket, me, hosts, token, exp.host_timeout_s, _say, partial(end_host, others))


def _handles(pids: Iterable[int]) -> list[int]:
    """Of these processes, those that can be had; the launcher has to end the others."""
    found = []
    for pid in pids:
        # neither kernels before 5.3 nor a Python built on one have it, old containers forbid it
        with contextlib.suppress(OSError, AttributeError):
            found.append(os.pidfd_open(pid))
    return found


def _addresses() -> list[str]:
    """Of this host; those of the interfaces that the user chose for gloo come first."""
    started_with = psutil.Process().environ()  # the variable may have been set since then, for the client's own world
    chosen = started_with.get(INTERFACES, "").split(",")
    found = sorted(all_addresses(), key=lambda entry: (entry[0] not in chosen, entry[1] != socket.AF_INET))
    return [address for _, _, address in found][:MOST_ADDRESSES]


def _describe(exp: Experiment, world: World, host: str) -> str:
    """host n1 (client 'b', job ranks 2 3)"""
    ranks = [rank for rank, other in enumerate(world.hosts) if other == host]
    names = [repr(exp.clients[client].name) for client in sorted({world.group_of[rank] for rank in ranks})]
    clients, several = "clients" if len(names) > 1 else "client", "ranks" if len(ranks) > 1 else "rank"
    return f"host {host} ({clients} {' '.join(names)}, job {several} {' '.join(map(str, ranks))})"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
