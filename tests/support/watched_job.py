"""A job that has joined its world, is watched, and waits; the tests start it as one rank of MPI.

mpiexec -n N python -m mpi4py tests/support/watched_job.py N     with a client a rank; says "waiting" on each
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from ubsmoe_ds.config.loading import load_experiment  # noqa: E402
from ubsmoe_ds.launching.hang_watch import HangWatch  # noqa: E402
from ubsmoe_ds.mpi import watchdog  # noqa: E402
from ubsmoe_ds.mpi.join import join  # noqa: E402

CONFIG = Path(__file__).resolve().parent.parent.parent / "ds_configs" / "tiny.yaml"
HOST_TIMEOUT_S = 3
WAIT_SECONDS = 60  # a job that nothing ends is left behind, as the tests see


def main() -> None:
    """One rank."""
    count = int(sys.argv[1])
    clients = ", ".join(f"{{name: c{number}, budget: 1.0}}" for number in range(count))
    exp = load_experiment(CONFIG, [f"clients=[{clients}]", f"host_timeout_s={HOST_TIMEOUT_S}"])
    joined = join(exp, sys.argv[0], sys.argv[1:])
    heartbeat = watchdog.watch(exp.clients, joined, exp.host_timeout_s, HangWatch("", None, survives=False))
    joined.barrier()
    time.sleep(1)  # all hosts have been heard from
    print(f"waiting {joined.rank}", flush=True)
    time.sleep(WAIT_SECONDS)
    if heartbeat is not None:
        heartbeat.close()


if __name__ == "__main__":
    main()
