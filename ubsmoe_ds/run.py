"""Run one rank of a job from start to end: device, data and model, rounds, and how the job ended."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ubsmoe_ds.base.errors import (
    EXIT_DIVERGED,
    EXIT_FAILURE,
    EXIT_PREEMPTED,
    Diverged,
    Preempted,
    TooFewClients,
    UserError,
)
from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.checkpoint.search import newest_sound
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.population import Trainer, kind_of
from ubsmoe_ds.launching.hang_watch import HangWatch, StartWatch
from ubsmoe_ds.launching.sign_in import sign_in
from ubsmoe_ds.mpi import exits, ulfm, watchdog
from ubsmoe_ds.mpi.collectives import RanksLost
from ubsmoe_ds.mpi.join import check_devices
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World


class Ending(NamedTuple):
    """How a job ended, the same on all remaining ranks: exit code, message, and the world that they share."""

    code: int
    message: str
    world: World


def run(exp: Experiment, place: World, start_watch: StartWatch, *, verbose: bool, resume: str | None) -> Ending:
    """Carry out the experiment; every rank of the job calls this.

    Args:
        exp: the experiment.
        place: this rank's place in the job.
        start_watch: closed once this rank is watched for hangs.
        verbose: let DeepSpeed print.
        resume: the checkpoint to resume from: "auto" for the newest one, if any, or its folder. None: start a new run.

    Raises:
        UserError: before anything is written, and if a checkpoint cannot be written.
    """
    keep_freed_memory()
    stop = StopRequests(place.comm, exp.checkpoint.grace_s)
    who = describe(exp.trainers, place.rank)
    sign_in(os.environ, who)
    hang_watch = HangWatch(who, exp.hang_timeout_s, place.survives)
    start_watch.close()
    heartbeat = watchdog.watch(exp.trainers, place, exp.host_timeout_s, hang_watch)
    try:
        ending = _run(exp, place, stop, hang_watch, verbose, resume)
    except UserError:
        stop.close()
        raise
    if heartbeat is not None:  # after an error it keeps running: another host may fall silent during the exit too
        heartbeat.close()
    return ending


def _run(
    exp: Experiment, world: World, stop: StopRequests, hang_watch: HangWatch, verbose: bool, resume: str | None
) -> Ending:
    """Build the federation, run its rounds, and close the group's torch world."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.cores)  # more threads than cores would slow each other down
    devices = choose_accelerator(exp.accelerator)
    check_devices(exp, world, devices)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # DeepSpeed reads rank, world and accelerator from the environment on import; only now are they all set
    from ubsmoe_ds.federation import recovery
    from ubsmoe_ds.federation.build import build

    federation = build(exp, world, stop, hang_watch, on_accelerator=bool(devices), verbose=verbose, resume=resume)
    code, message = 0, ""
    try:
        recovery.run(federation)
    except Preempted as stopped:
        code, message = EXIT_PREEMPTED, f"{stopped}; continue with --resume auto"
    except Diverged as error:
        sound = newest_sound(exp.run_dir) if federation.world.rank == 0 else None  # only the first rank speaks
        kept = f"the newest checkpoint with a finite evaluation is {sound}" if sound else "no checkpoint is sound"
        advice = "look at that data, the learning rate and gradient clipping"
        code, message = EXIT_DIVERGED, f"error: {error}; {advice}; {kept}"
    except TooFewClients as error:
        code, message = EXIT_FAILURE, f"error: {error}"
    except Exception:
        if world.survives and ulfm.is_group_broken(world):
            exits.leave_job()  # the error only shows that another rank of this client is gone
        raise
    _close_group(federation.world)
    return Ending(code, message, federation.world)


def _close_group(world: World) -> None:
    """Close the group's torch world once all ranks are done; left open, it can keep a process from ending."""
    try:
        world.barrier()
    except RanksLost:
        return  # a rank died after the work was done
    torch.distributed.destroy_process_group()


def describe(trainers: Sequence[Trainer], rank: int) -> str:
    """Return a rank's name for messages: its client or group, its rank there and in the job."""
    first = 0
    for trainer in trainers:
        if rank < first + trainer.ranks:
            return f"{kind_of(trainer)} {trainer.name!r}, rank {rank - first} of {trainer.ranks} (job rank {rank})"
        first += trainer.ranks
    return f"job rank {rank}"


def choose_accelerator(accelerator: str) -> list[str]:
    """Tell DeepSpeed to use cpu or cuda, so that it does not guess and print; return the UUIDs of the CUDA devices.

    Raises:
        UserError: if `accelerator` is cuda and there is no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if accelerator == "cuda" and not has_cuda:
        raise UserError("accelerator: cuda, but torch sees no CUDA device; use auto or cpu")
    use_cuda = has_cuda and accelerator != "cpu"
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"
    count = torch.cuda.device_count() if use_cuda else 0
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(count)]
