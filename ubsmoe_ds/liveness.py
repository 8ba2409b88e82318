"""A job on several hosts ends when one of them is cut off: who is on which host, told by MPI, and how ranks then end.

What the launchers do with a host that they cannot reach, found by trying: after Abort MPICH's mpiexec ends at once with
its code, but ranks on the other side of the cut live on; they have to end themselves, and then their daemon does too.
Open MPI's daemons wait for each other for ever, and end with code 0 and without their ranks if TCP gives the connection
up; so there the ranks of each host end first, and then their daemon by force.
"""

import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.errors import EXIT_FAILURE
from ubsmoe_ds.heartbeat import Heartbeat, Host, open_socket, own_addresses
from ubsmoe_ds.relaunch import sign_off
from ubsmoe_ds.world import World, abort

MOST_BYTES = 1024  # of what a rank tells the others
ABORT_SECONDS = 3.0  # for the launcher to end this rank
OPEN_MPI_DAEMONS = ("prted", "prterun", "prte")


def watch(exp: Experiment, world: World) -> Heartbeat | None:
    """Start to watch the other hosts (a collective); None on ranks that do not: all but the first of each host.

    Nobody does on one host, nor where the job goes on without ranks that die: there whole hosts may leave it.
    """
    host_comm = world.comm.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    if host_comm.size == world.comm.size or world.survives:
        return None
    speaks = host_comm.rank == 0
    own_socket = open_socket() if speaks else None
    told: dict[str, Any] = {"pid": os.getpid(), "pids_of": Path("/proc/self/ns/pid").stat().st_ino}
    if own_socket is not None:
        told |= {
            "name": socket.gethostname(),
            "addresses": own_addresses(),
            "port": own_socket.getsockname()[1],
            "token": secrets.token_hex(16),
        }
    speakers = np.empty(world.comm.size, dtype=np.int64)  # of each rank's host
    mine = np.array([world.rank], dtype=np.int64)
    host_comm.Bcast(mine, root=0)
    host_comm.Free()
    world.comm.Allgather(mine, speakers)
    everybody = _gather(world.comm, told)
    if own_socket is None:
        return None
    firsts = sorted(set(speakers.tolist()))
    hosts = []
    for first in firsts:
        ranks = np.flatnonzero(speakers == first).tolist()
        description = _describe(exp, world, everybody[first]["name"], ranks)
        hosts.append(Host(description, tuple(everybody[first]["addresses"]), everybody[first]["port"]))
    others = [
        os.pidfd_open(everybody[rank]["pid"])
        for rank in np.flatnonzero(speakers == world.rank).tolist()
        # a rank in a container of its own counts processes differently; its launcher has to end it
        if rank != world.rank and everybody[rank]["pids_of"] == told["pids_of"]
    ]
    token = bytes.fromhex(everybody[firsts[0]]["token"])
    return Heartbeat(own_socket, firsts.index(world.rank), hosts, token, exp.host_timeout_s, partial(_end, others))


def _gather(comm: MPI.Intracomm, told: dict[str, Any]) -> list[dict[str, Any]]:
    """What each rank tells, on every rank (a collective)."""
    text = json.dumps(told).encode()
    mine = np.zeros(MOST_BYTES, dtype=np.uint8)
    mine[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    gathered = np.empty((comm.size, MOST_BYTES), dtype=np.uint8)
    comm.Allgather(mine, gathered)
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in gathered]


def _describe(exp: Experiment, world: World, name: str, ranks: Sequence[int]) -> str:
    """host n1 (client 'b', job ranks 2 3)"""
    clients = sorted({world.client_of[rank] for rank in ranks})
    names = " ".join(repr(exp.clients[client].name) for client in clients)
    several = "s" if len(ranks) > 1 else ""
    return (
        f"host {name} (client{'s' if len(clients) > 1 else ''} {names}, job rank{several} {' '.join(map(str, ranks))})"
    )


def _end(others: Sequence[int], message: str) -> NoReturn:
    """End all ranks of this host, and where it can be reached the job; called in the heartbeat's thread.

    Args:
        others: pidfds of the other ranks here.
        message: what to say before.
    """
    if message:
        print(message, file=sys.stderr, flush=True)
    sign_off(os.environ, EXIT_FAILURE)
    daemon = _open_mpi_daemon()
    if daemon is None:
        threading.Thread(target=abort, args=[EXIT_FAILURE], daemon=True).start()
        time.sleep(ABORT_SECONDS)
    for handle in others:
        try:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            continue
    if daemon is not None:
        os.kill(daemon, signal.SIGKILL)
    os._exit(EXIT_FAILURE)


def _open_mpi_daemon() -> int | None:
    """The process that started this rank, if it is Open MPI's."""
    parent = os.getppid()
    try:
        name = Path(f"/proc/{parent}/comm").read_text().strip()
    except OSError:
        return None
    return parent if name in OPEN_MPI_DAEMONS else None
