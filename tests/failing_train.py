"""`launch/train.py` with a fault planted; the tests start it as they start the real one.

FAULT=raise@3 deepspeed tests/failing_train.py ...     job rank 3 raises in its second local step
FAULT=user@3, FAULT=hang@3                             a user's mistake there; a rank that never comes back
FAULT=nobf16@all                                       every device says that it lacks bf16
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch import train  # noqa: E402
from ubsmoe_ds import relaunch  # noqa: E402
from ubsmoe_ds.errors import UserError  # noqa: E402


def plant() -> None:
    """Replace the local step of the chosen rank, or what devices say of themselves."""
    kind, _, rank = os.environ["FAULT"].partition("@")
    from mpi4py import MPI

    from ubsmoe_ds import client

    if kind == "nobf16":
        type(client.get_accelerator()).is_bf16_supported = lambda self: False
        return
    if MPI.COMM_WORLD.rank != int(rank):
        return
    real_step, calls = client.Client.step, []

    def fault(self: client.Client, batch: object) -> object:
        calls.append(batch)
        if len(calls) < 2:
            return real_step(self, batch)
        if kind == "raise":
            raise RuntimeError("planted fault")
        if kind == "user":
            raise UserError("data: planted mistake")
        print(f"hanging with process id {os.getpid()}", flush=True)
        time.sleep(300)
        return None

    client.Client.step = fault


if __name__ == "__main__":
    if relaunch.inside_mpi(os.environ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        plant()
    sys.exit(train.main())
