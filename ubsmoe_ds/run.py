"""Run the experiment on one rank: set up the environment, build the federation, carry out the rounds."""

import os
from typing import NamedTuple

import torch

from ubsmoe_ds.base.errors import EXIT_FAILURE, EXIT_PREEMPTED, Preempted, TooFewClients, UserError
from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.launching.sign_in import sign_in
from ubsmoe_ds.mpi import exits, ulfm, watchdog
from ubsmoe_ds.mpi.collectives import RanksLost
from ubsmoe_ds.mpi.join import check_devices
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World


class Ending(NamedTuple):
    """The end of a job; the same on all remaining ranks."""

    code: int  # exit code
    message: str  # line for the user, or ""
    world: World  # of the remaining ranks


def run(exp: Experiment, world: World, *, verbose: bool, resume: str | None) -> Ending:
    """Carry out the experiment; every rank of the job calls it.

    Args:
        exp: the experiment.
        world: this rank's.
        verbose: let DeepSpeed print.
        resume: the checkpoint to go on from: "auto", the newest if there is one; or its folder. None: start anew.

    Raises:
        UserError: for a mistake, before anything is written; and if a checkpoint cannot be written.
    """
    keep_freed_memory()
    stop = StopRequests(world.comm, exp.checkpoint.grace_s)
    sign_in(os.environ, describe(exp, world.rank))
    heartbeat = watchdog.watch(exp, world)
    try:
        ending = _run(exp, world, stop, verbose, resume)
    except UserError:
        stop.close()
        raise
    if heartbeat is not None:  # after an error it goes on: a host may be lost while the job ends
        heartbeat.close()
    return ending


def _run(exp: Experiment, world: World, stop: StopRequests, verbose: bool, resume: str | None) -> Ending:
    """Build the federation and run it, with requests to stop and the heartbeat already in place."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.cores)  # more threads than cores would only get in each other's way
    devices = choose_accelerator(exp)
    check_devices(exp, world, devices)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # DeepSpeed reads rank, world and accelerator from the environment when it is imported: only now are they all set
    from ubsmoe_ds.federation import recovery
    from ubsmoe_ds.federation.build import build

    federation = build(exp, world, stop, on_accelerator=bool(devices), verbose=verbose, resume=resume)
    code, message = 0, ""
    try:
        recovery.run(federation)
    except Preempted as stopped:
        code, message = EXIT_PREEMPTED, f"{stopped}; --resume auto goes on from there"
    except TooFewClients as error:
        code, message = EXIT_FAILURE, f"error: {error}"
    except Exception:
        if world.survives and ulfm.is_group_broken(world):
            exits.leave_job()  # the error only shows that another rank of this group is gone
        raise
    _close_group(federation.world)
    return Ending(code, message, federation.world)


def _close_group(world: World) -> None:
    """Close the group's torch world once all ranks are done: left open, it can keep a process from ending."""
    try:
        world.barrier()
    except RanksLost:
        return  # a rank died after the work was done
    torch.distributed.destroy_process_group()


def describe(exp: Experiment, rank: int) -> str:
    """Return a rank of the job as messages name it."""
    first = 0
    for client in exp.clients:
        if rank < first + client.ranks:
            return f"client {client.name!r}, rank {rank - first} of {client.ranks} (job rank {rank})"
        first += client.ranks
    return f"job rank {rank}"


def choose_accelerator(exp: Experiment) -> list[str]:
    """Tell DeepSpeed cpu or cuda, so that it neither guesses nor prints its guess.

    Returns:
        Unique identifiers of the CUDA devices that this rank sees and uses.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    available = torch.cuda.is_available()
    if exp.accelerator == "cuda" and not available:
        raise UserError("accelerator: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    use_cuda = available and exp.accelerator != "cpu"
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"
    count = torch.cuda.device_count() if use_cuda else 0
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]
