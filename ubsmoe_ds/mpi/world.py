"""COMM_WORLD -> this rank's client and the rendezvous of its own torch.distributed world.

Ranks are numbered anew, so that clients take consecutive ones in the order of the config wherever their hosts are (see
placement.py): the job's rank is not COMM_WORLD's. Each client is a torch world of its own: DeepSpeed's
data-parallel and expert groups span the whole torch world, so that clients sharing one would average their gradients.
Everything is derived from MPI, never from RANK, and all five rendezvous variables are set before DeepSpeed is
imported: if one is missing, DeepSpeed takes all of COMM_WORLD.
"""

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.launching.launchers import check_size
from ubsmoe_ds.launching.placement import job_order, place
from ubsmoe_ds.mpi.collectives import MOVE_SECONDS, RanksLost, gather_json, move, wait_quietly
from ubsmoe_ds.mpi.rendezvous import INTERFACES, meet

STAGE_DONE, RECOVERING = 0b01, 0b10  # what ranks agree on; both meet in the same agreements
MOST_CORES = 8192  # of a host
NAME_BYTES = 256  # of a host's name


@dataclass(frozen=True)
class World:
    """Where this rank stands: in the job, in its client, and on its host."""

    comm: MPI.Intracomm
    group_comm: MPI.Comm
    group_of: tuple[int, ...]  # each rank of the job: its group's number
    client: int  # position in the config's list of the client that this group trains: today its number
    group_rank: int
    hosts: tuple[str, ...]  # each rank of the job: the name of its host
    meetings: tuple[str, ...]  # each group: where its ranks meet if they are on several hosts, else ""
    host_comm: MPI.Comm  # of the ranks on this host
    cores: int  # this rank's share of those it may run on, at least 1
    survives: bool = False  # whether the job goes on when ranks die

    @property
    def rank(self) -> int:
        """Rank in the whole job."""
        return self.comm.rank

    @property
    def group_hosts(self) -> list[list[str]]:
        """Hosts of each group's ranks."""
        found: list[list[str]] = [[] for _ in range(max(self.group_of) + 1)]
        for client, host in zip(self.group_of, self.hosts, strict=True):
            found[client].append(host)
        return found

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of float64 arrays over all ranks (a collective), the same bits on every rank."""
        total = np.zeros_like(values, dtype=np.float64)
        given = np.ascontiguousarray(values, dtype=np.float64)
        move(self.comm, lambda: self.comm.Iallreduce(given, total))
        # ranks may sum in different orders; rank 0's result is everybody's
        wait_quietly(self.comm.Ibcast(total, root=0), MOVE_SECONDS)
        return total

    def agree(self) -> None:
        """Between what may be done again and what may not: all ranks have got here, or none goes on (a collective).

        Raises:
            RanksLost: on every survivor, if a rank has died before all were here.
        """
        if self.survives:
            word = np.array([STAGE_DONE], dtype=np.int32)  # AND of all; 0 if somebody is already recovering
            wait_quietly(self.comm.Iagree(word))
            if word[0] != STAGE_DONE:
                raise RanksLost("another rank has seen a death")

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank of the job (a collective)."""
        return _any(self.comm, flag)

    def any_of_group(self, flag: bool) -> bool:
        """Whether it is true on some rank of this group (a collective over it)."""
        return flag if self.group_comm.size == 1 else _any(self.group_comm, flag)

    def barrier(self) -> None:
        """Wait for every rank, leaving the cores to those that still work."""
        wait_quietly(self.comm.Ibarrier())


def _any(comm: MPI.Comm, flag: bool) -> bool:
    given, found = np.array([flag], dtype=np.int32), np.zeros(1, dtype=np.int32)
    wait_quietly(comm.Iallreduce(given, found, op=MPI.MAX))
    return bool(found[0])


def started_rank() -> int:
    """The number this process was started with, for messages before there is a `World`."""
    return MPI.COMM_WORLD.rank


def join(exp: Experiment, script: str, arguments: list[str]) -> World:
    """Number the ranks by clients, split them, and set this rank's rendezvous variables.

    Raises:
        UserError: if the job has another number of ranks than the clients need, if clients cannot be on the hosts that
            the config says, or if hosts of a client do not reach each other.
    """
    started = MPI.COMM_WORLD
    check_size(os.environ, started.size, _library(), script, arguments, exp.clients)
    host_of = _hosts(started)
    places = place(exp.clients, Counter(host_of))
    order = job_order(places, host_of)
    comm = MPI.Intracomm(started.Split(key=order.index(started.rank)))
    owners = [number for number, client in enumerate(exp.clients) for _ in range(client.ranks)]
    number = owners[comm.rank]
    group_comm = comm.Split(color=number, key=comm.rank)
    host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    meeting = meet(group_comm, comm, one_host=len(set(places[number])) == 1)
    os.environ.update(
        RANK=str(group_comm.rank),
        WORLD_SIZE=str(group_comm.size),
        LOCAL_RANK=str(host_comm.rank),
        MASTER_ADDR=meeting.address,
        MASTER_PORT=str(meeting.port),
    )
    crosses = group_comm.rank == 0 and len(set(places[number])) > 1
    told = gather_json(comm, [number, f"{meeting.address} ({meeting.interface})"] if crosses else None)
    if meeting.interface:
        os.environ.setdefault(INTERFACES, meeting.interface)  # gloo's own guess is what the host's name stands for
    return World(
        comm=comm,
        group_comm=group_comm,
        group_of=tuple(owners),
        client=number,
        group_rank=group_comm.rank,
        hosts=tuple(host_of[number] for number in order),
        meetings=tuple(dict(filter(None, told)).get(c, "") for c in range(len(exp.clients))),
        host_comm=host_comm,
        cores=_fair_cores(host_comm),
        survives=exp.fault_tolerance == "shrink",
    )


def check_devices(exp: Experiment, world: World, devices: Sequence[str]) -> None:
    """Refuse more ranks than accelerators, unless the config allows sharing them; set LOCAL_RANK to match.

    Args:
        devices: what tells the accelerators that this rank sees from others of this host. Launchers may show each rank
            its own alone. None at all: the job runs on the CPU, where sharing is always fine.

    Raises:
        UserError: with the arithmetic; also if two ranks of one client would share a device, which NCCL cannot.
    """
    sharers = world.host_comm.Split(color=zlib.crc32(" ".join(devices).encode()) >> 1, key=world.rank)
    if not devices:
        return
    on_host, count = sharers.size, len(devices)
    if on_host > count and not exp.oversubscribe:
        raise UserError(
            f"clients: {on_host} ranks on this host, {count} accelerators: {on_host - count} too few; "
            "lower the ranks, use more hosts, set oversubscribe=true, or accelerator=cpu"
        )
    clients = np.empty(on_host, dtype=np.int64)
    sharers.Allgather(np.array([world.client]), clients)
    for number, ranks in Counter(clients.tolist()).items():
        if ranks > count:
            raise UserError(
                f"clients: {exp.clients[number].name!r} has {ranks} ranks for {count} accelerators of this host; ranks "
                f"of one client cannot share a device: give it at most {count} here, or set accelerator=cpu"
            )
    os.environ["LOCAL_RANK"] = str(sharers.rank % count)


def _library() -> str:
    """Name and version of this MPI."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _hosts(comm: MPI.Intracomm) -> list[str]:
    """Name of each rank's host (a collective). Hosts are what shares memory; those of one name get a number."""
    leader = np.array([comm.rank], dtype=np.int64)
    comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank).Bcast(leader, root=0)
    leaders = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(leader, leaders)
    name = np.frombuffer(MPI.Get_processor_name().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), dtype=np.uint8)
    names = np.empty((comm.size, NAME_BYTES), dtype=np.uint8)
    comm.Allgather(name, names)
    found: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for first, row in zip(leaders.tolist(), names, strict=True):
        if first not in found:
            host = row.tobytes().rstrip(b"\0").decode(errors="replace")
            seen[host] += 1
            found[first] = host if seen[host] == 1 else f"{host}#{seen[host]}"
    return [found[first] for first in leaders.tolist()]


def _fair_cores(host_comm: MPI.Comm) -> int:
    """How many cores are this rank's, if ranks that may run on a core share it evenly."""
    mine = np.zeros(MOST_CORES, dtype=np.int32)
    mine[list(os.sched_getaffinity(0))] = 1
    ranks = np.empty_like(mine)
    host_comm.Allreduce(mine, ranks)
    return max(1, int((1 / ranks[mine > 0]).sum() + 1e-6))
