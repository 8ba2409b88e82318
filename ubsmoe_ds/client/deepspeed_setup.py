"""Start DeepSpeed for a client's group: its torch world, and silence while it starts."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator

import deepspeed
from deepspeed.accelerator import get_accelerator


def start_deepspeed(on_accelerator: bool, verbose: bool) -> None:
    """Initialise torch.distributed for this client's group."""
    # on the CPU DeepSpeed would compile this at start (40-85 s, needs a compiler); a killed build hangs all later runs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_accelerator:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with deepspeed_output(verbose):
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name() if on_accelerator else "gloo"
        )


@contextlib.contextmanager
def deepspeed_output(verbose: bool) -> Iterator[None]:
    """Suppress what DeepSpeed prints and logs during setup, unless `verbose`."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        yield
