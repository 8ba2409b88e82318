"""`launch/train.py` with a fault planted in one rank; the tests start it as they start the real one.

FAULT=raise@3 deepspeed tests/failing_train.py ...     # job rank 3 raises in its first local steps
FAULT=user@3, FAULT=hang@3
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
    """Replace the local steps of the chosen rank."""
    kind, _, rank = os.environ["FAULT"].partition("@")
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank != int(rank):
        return
    from ubsmoe_ds.federation import rounds

    def fault(*_: object) -> None:
        if kind == "raise":
            raise RuntimeError("planted fault")
        if kind == "user":
            raise UserError("data: planted mistake")
        print(f"hanging with process id {os.getpid()}", flush=True)
        time.sleep(300)

    rounds.Federation._evaluate = fault  # type: ignore[assignment,method-assign]


if __name__ == "__main__":
    if relaunch.inside_mpi(os.environ):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        plant()
    sys.exit(train.main())
