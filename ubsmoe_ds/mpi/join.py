"""From COMM_WORLD to a rank's `World`, and to the environment of its group's own torch.distributed world.

Ranks are numbered anew, so that clients take consecutive ones in the order of the config wherever their hosts are (see
launching/placement.py): the job's rank is not COMM_WORLD's. Each group is a torch world of its own: DeepSpeed's
data-parallel and expert groups span the whole torch world, so that clients sharing one would average their gradients.
Everything is derived from MPI, never from RANK, and all five rendezvous variables are set before DeepSpeed is
imported: if one is missing, DeepSpeed takes all of COMM_WORLD.
"""

import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.population import kind_of
from ubsmoe_ds.launching.launchers import check_size
from ubsmoe_ds.launching.placement import job_order, place
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.rendezvous import INTERFACES, Meeting, meet
from ubsmoe_ds.mpi.world import World

MOST_CORES = 8192  # of a host
NAME_BYTES = 256  # of a host's name


def started_rank() -> int:
    """Return the number this process was started with, for messages before there is a `World`."""
    return MPI.COMM_WORLD.rank


def join(exp: Experiment, script: str, arguments: list[str]) -> World:
    """Number the ranks by clients, split them into groups, and set this rank's rendezvous variables (a collective).

    Args:
        exp: the experiment.
        script, arguments: how this process was started, for messages.

    Raises:
        UserError: if the job has another number of ranks than the clients need, if clients cannot be on the hosts that
            the config says, or if hosts of a group do not reach each other.
    """
    started = MPI.COMM_WORLD
    check_size(os.environ, started.size, _library(), script, arguments, exp.trainers)
    host_of = _hosts(started)
    placement = place(exp.trainers, Counter(host_of))
    order = job_order(placement, host_of)
    comm = MPI.Intracomm(started.Split(key=order.index(started.rank)))
    group_of = tuple(number for number, trainer in enumerate(exp.trainers) for _ in range(trainer.ranks))
    group = group_of[comm.rank]
    group_comm = comm.Split(color=group, key=comm.rank)
    host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank)
    one_host = len(set(placement[group])) == 1
    meeting = meet(group_comm, comm, one_host)
    _set_rendezvous(meeting, group_comm, host_comm)
    _remove_shared_names(host_comm)
    crosses = group_comm.rank == 0 and not one_host
    said = gather_json(comm, f"{meeting.address} ({meeting.interface})" if crosses else "")
    return World(
        comm=comm,
        group_comm=group_comm,
        group_of=group_of,
        group=group,
        group_rank=group_comm.rank,
        hosts=tuple(host_of[number] for number in order),
        meetings=tuple(said[group_of.index(number)] for number in range(len(exp.trainers))),
        host_comm=host_comm,
        cores=_fair_cores(host_comm),
        survives=exp.fault_tolerance == "shrink",
    )


def _set_rendezvous(meeting: Meeting, group_comm: MPI.Comm, host_comm: MPI.Comm) -> None:
    """Set the variables from which torch makes the group's world."""
    os.environ.update(
        RANK=str(group_comm.rank),
        WORLD_SIZE=str(group_comm.size),
        LOCAL_RANK=str(host_comm.rank),
        MASTER_ADDR=meeting.address,
        MASTER_PORT=str(meeting.port),
    )
    if meeting.interface:
        os.environ.setdefault(INTERFACES, meeting.interface)  # gloo's own guess is the address of the host's name
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={meeting.interface}")  # without "=" names that begin so match


def check_devices(exp: Experiment, world: World, devices: Sequence[str]) -> None:
    """Refuse more ranks than accelerators, unless the config allows sharing them; set LOCAL_RANK to match.

    Args:
        exp: the experiment.
        world: this rank's.
        devices: unique identifiers of the accelerators that this rank sees; launchers may show each rank only its own.
            Empty: the job runs on the CPU, where sharing is always fine.

    Raises:
        UserError: with the arithmetic; also if two ranks of one client would share a device, which NCCL cannot.
    """
    # ranks that see the same devices share them
    sharers = world.host_comm.Split(color=zlib.crc32(" ".join(devices).encode()) >> 1, key=world.rank)
    if not devices:
        return
    on_host, count = sharers.size, len(devices)
    if on_host > count and not exp.oversubscribe:
        raise UserError(
            f"{kind_of(exp.trainers[0])}s: {on_host} ranks on this host, {count} accelerators: {on_host - count} too "
            "few; lower the ranks, use more hosts, set oversubscribe=true, or accelerator=cpu"
        )
    groups = np.empty(on_host, dtype=np.int64)
    sharers.Allgather(np.array([world.group]), groups)
    for number, ranks in Counter(groups.tolist()).items():
        if ranks > count:
            trainer = exp.trainers[number]
            kind = kind_of(trainer)
            raise UserError(
                f"{kind}s: {trainer.name!r} has {ranks} ranks for {count} accelerators of this host; ranks of one "
                f"{kind} cannot share a device: give it at most {count} here, or set accelerator=cpu"
            )
    os.environ["LOCAL_RANK"] = str(sharers.rank % count)


def _library() -> str:
    """Return the name and version of this MPI."""
    name, version = MPI.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


def _hosts(comm: MPI.Intracomm) -> list[str]:
    """Return the host name of each rank (a collective).

    A host is what shares memory; hosts of the same name get a number, such as gpu1#2.
    """
    leader = np.array([comm.rank], dtype=np.int64)
    comm.Split_type(MPI.COMM_TYPE_SHARED, key=comm.rank).Bcast(leader, root=0)
    leaders = np.empty(comm.size, dtype=np.int64)
    comm.Allgather(leader, leaders)
    name = np.frombuffer(MPI.Get_processor_name().encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0"), dtype=np.uint8)
    names = np.empty((comm.size, NAME_BYTES), dtype=np.uint8)
    comm.Allgather(name, names)
    host_of_leader: dict[int, str] = {}
    seen: Counter[str] = Counter()
    for first, row in zip(leaders.tolist(), names, strict=True):
        if first not in host_of_leader:
            host = row.tobytes().rstrip(b"\0").decode(errors="replace")
            seen[host] += 1
            host_of_leader[first] = host if seen[host] == 1 else f"{host}#{seen[host]}"
    return [host_of_leader[first] for first in leaders.tolist()]


def _remove_shared_names(host_comm: MPI.Comm) -> None:
    """Remove the names of the shared memory that MPICH has opened on this host (a collective over its ranks).

    All ranks have it by now, and keep it without a name. A rank that is killed could not remove the name any more, and
    the memory would stay until the host starts anew.
    """
    host_comm.Barrier()
    if host_comm.rank == 0:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        for path in {line.split()[-1] for line in lines if "/dev/shm/mpich_shm_" in line}:
            Path(path).unlink(missing_ok=True)


def _fair_cores(host_comm: MPI.Comm) -> int:
    """Return this rank's number of cores if ranks that may run on a core share it evenly (a collective)."""
    mine = np.zeros(MOST_CORES, dtype=np.int32)
    mine[list(os.sched_getaffinity(0))] = 1
    ranks = np.empty_like(mine)
    host_comm.Allreduce(mine, ranks)
    return max(1, int((1 / ranks[mine > 0]).sum() + 1e-6))
