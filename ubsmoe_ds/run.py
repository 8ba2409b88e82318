"""Putting a run together on one rank: world, data, model, exchange, and then the rounds."""

import os

import torch

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.memory import keep_freed_memory
from ubsmoe_ds.world import check_devices, join


def run(exp: Experiment, script: str, arguments: list[str], verbose: bool) -> None:
    """Carry out the experiment; every rank of the job calls it.

    Args:
        exp: the experiment.
        script, arguments: how this process was started, for messages that recommend a command.
        verbose: let DeepSpeed print.

    Raises:
        UserError: before anything is written.
    """
    keep_freed_memory()
    world = join(exp, script, arguments)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(world.cores)  # more threads than cores would only get in each other's way
    devices = choose_accelerator(exp)
    check_devices(exp, world, devices)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "0" if verbose else "1")
    # DeepSpeed reads rank, world and accelerator from the environment when it is imported: only now are they all set
    from ubsmoe_ds.federation.build import build

    federation = build(exp, world, on_accelerator=devices > 0, verbose=verbose)
    federation.run()
    world.barrier()
    torch.distributed.destroy_process_group()


def choose_accelerator(exp: Experiment) -> int:
    """Tell DeepSpeed cpu or cuda, so that it neither guesses nor prints its guess; returns the devices of this host.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    found = torch.cuda.is_available()
    if exp.accelerator == "cuda" and not found:
        raise UserError("accelerator: 'cuda' was asked for, but torch sees no CUDA device; use auto or cpu")
    use_cuda = found and exp.accelerator != "cpu"
    os.environ["DS_ACCELERATOR"] = "cuda" if use_cuda else "cpu"
    return torch.cuda.device_count() if use_cuda else 0
