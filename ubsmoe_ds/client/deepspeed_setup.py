"""Start DeepSpeed for a client's group: its torch world, and silence while it starts.

torch's own rendezvous (`env://`) opens its store on all interfaces, for a group of one rank too, and a store lets
everybody who reaches it read and set keys. Ours listens on the group's meeting address alone.
"""

import contextlib
import io
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from torch.distributed import HashStore, Store, TCPStore
from torch.distributed.rendezvous import register_rendezvous_handler

SCHEME = "ubsmoe"  # of torch's init_method


def start_deepspeed(on_accelerator: bool, verbose: bool) -> None:
    """Initialise torch.distributed for this client's group; needs the rendezvous variables."""
    # on the CPU DeepSpeed would compile this at start (40-85 s, needs a compiler); a killed build hangs all later runs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_accelerator:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with deepspeed_output(verbose):
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name() if on_accelerator else "gloo",
            init_method=f"{SCHEME}://",
        )


def _rendezvous(_: str, timeout: timedelta, **__: Any) -> Iterator[tuple[Store, int, int]]:
    """Yield (store, rank, ranks) of the group, as torch asks of a rendezvous."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    yield open_store(place, rank, ranks, timeout), rank, ranks


register_rendezvous_handler(SCHEME, _rendezvous)


def open_store(place: tuple[str, int], rank: int, ranks: int, timeout: timedelta) -> Store:
    """Return the store of a group: in this process for one rank, else at an address and port of its first rank.

    Args:
        place: an address, never a name, and a port.
        rank, ranks: this rank's place in the group.
        timeout: for the others to come.
    """
    if ranks == 1:
        return HashStore()
    if rank > 0:
        return TCPStore(*place, ranks, is_master=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
    listening = socket.create_server(place, family=family, backlog=1024)
    return TCPStore(*place, ranks, is_master=True, timeout=timeout, master_listen_fd=listening.detach())


@contextlib.contextmanager
def deepspeed_output(verbose: bool) -> Iterator[None]:
    """Suppress what DeepSpeed prints and logs during setup, unless `verbose`."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        yield
