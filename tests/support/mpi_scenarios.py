"""Functions that the ranks of MPI tests run; each returns arrays (see `ranks.py`). Nothing here needs DeepSpeed."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi import join as join_module
from ubsmoe_ds.mpi.join import join
from ubsmoe_ds.mpi.rendezvous import meet
from ubsmoe_ds.mpi.world import World


def fair_cores(sets: list[list[int]]) -> dict[str, Any]:
    """Return this rank's cores if rank r may run on the cores `sets[r]`."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    with mock.patch("os.sched_getaffinity", return_value=set(sets[comm.rank])):
        return {"cores": np.array(join_module._fair_cores(comm))}


def gathered(lengths: list[int]) -> dict[str, Any]:
    """Gather a text of every rank, of `lengths[r]` characters on rank r; return what this rank received."""
    from mpi4py import MPI

    from ubsmoe_ds.mpi.collectives import gather_json

    rank = MPI.COMM_WORLD.rank
    values = gather_json(MPI.COMM_WORLD, {"rank": rank, "text": "é" * lengths[rank], "third": rank / 3})
    return {
        "ranks": np.array([value["rank"] for value in values]),
        "lengths": np.array([len(value["text"]) for value in values]),
        "thirds": np.array([value["third"] for value in values]),
    }


def summed(sizes: list[int]) -> dict[str, Any]:
    """Return by size the sum over all ranks of arrays that `part_of` makes."""
    from mpi4py import MPI

    world = mock.Mock(comm=MPI.COMM_WORLD)
    return {str(size): World.sum(world, part_of(world.comm.rank, size)) for size in sizes}


def part_of(rank: int, size: int) -> np.ndarray:
    """Return a rank's numbers, whose sum depends on the order in its last bits."""
    return np.random.default_rng(rank).normal(size=size)


def joined() -> dict[str, Any]:
    """Join a job on two made-up hosts; return this rank's place in it, its device and its rendezvous."""
    from mpi4py import MPI

    exp = tiny.experiment("unused", [{"budget": 1.0, "ranks": count} for count in (2, 1, 1)])
    with mock.patch.object(join_module, "_hosts", return_value=["n0", "n1", "n0", "n1"]):
        world = join(exp, "train.py", [])
    assert world.hosts == ("n0", "n0", "n1", "n1") and not any(world.meetings)
    values: dict[str, Any] = {
        "rank": world.rank,
        "client": world.group,
        "group_rank": world.group_rank,
        "port": int(os.environ["MASTER_PORT"]),
        "local_of_two": _local_rank(exp, world, [["a", "b"], ["a", "b"], ["c"], ["d"]]),
        "local_of_one": _local_rank(exp, world, [["a"], ["a"], ["c"], ["d"]]),
    }
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    meeting = meet(MPI.COMM_WORLD, MPI.COMM_WORLD, one_host=False)
    values |= {"address": meeting.address, "meeting_port": meeting.port, "interface": meeting.interface}
    os.environ["GLOO_SOCKET_IFNAME"] = "none0"
    try:
        meet(MPI.COMM_WORLD, MPI.COMM_WORLD, one_host=False)
    except UserError as error:
        values["error"] = str(error)
    return {key: np.array(value) for key, value in values.items()}


def _local_rank(exp: Experiment, world: World, devices: list[list[str]]) -> int:
    """Return LOCAL_RANK if rank r of the job sees `devices[r]`; -1 if they are too few."""
    try:
        join_module.check_devices(exp, world, devices[world.rank])
    except UserError:
        return -1
    return int(os.environ["LOCAL_RANK"])


def shared_rows(source: str, hosts: list[str], folder: str) -> dict[str, Any]:
    """Read rows that are too many for memory, on made-up hosts; return their digest, who wrote, and the file mapped."""
    from mpi4py import MPI

    from ubsmoe_ds.config.sections import DataConfig
    from ubsmoe_ds.data import host_files, row_table
    from ubsmoe_ds.data.sources import choose, digest_of

    wrote = []

    def written(write: Any, path: Path) -> Any:
        wrote.append(path)
        return host_files_written(write, path)

    host_files_written = host_files.written
    sharing = host_files.OfHost(MPI.COMM_WORLD, hosts)
    with (
        mock.patch.object(row_table, "IN_MEMORY", 1000),
        mock.patch.object(host_files, "written", written),
        mock.patch("tempfile.tempdir", folder),
    ):
        chosen = choose(DataConfig(source=source), 0, sharing)
    lines = Path("/proc/self/maps").read_text().splitlines()
    inodes = {int(line.split()[4]) for line in lines if f"{folder}/ubsmoe_ds-" in line}
    return {
        "digest": np.array(list(bytes.fromhex(digest_of([chosen.training.rows, chosen.evaluation])))),
        "wrote": np.array(len(wrote)),
        "inodes": np.array(sorted(inodes)),
        "left": np.array(len(list(Path(folder).iterdir()))),
    }
