"""Run a function on several MPI ranks, as real processes, and get back the arrays that each returns.

results = run_ranks(tmp_path, 4, "tests.support.scenarios:train", {"zero": 2})   # results[rank]["losses"]
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ubsmoe_ds.launching import fast_start
from ubsmoe_ds.launching.fast_start import ForkServer
from ubsmoe_ds.launching.launchers import MPI_RANK_VARIABLES, RENDEZVOUS_VARIABLES
from ubsmoe_ds.launching.relaunch import with_libraries_of

REPO = Path(__file__).resolve().parent.parent.parent


def clean_environment() -> dict[str, str]:
    """This process's environment without traces of another MPI or torch job; one thread a rank."""
    traces = (*MPI_RANK_VARIABLES, *RENDEZVOUS_VARIABLES, "PYTEST_CURRENT_TEST")
    environment = {k: v for k, v in os.environ.items() if k not in traces}
    folders = [str(REPO), str(Path(sys.executable).parent)]
    environment |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = os.pathsep.join([folders[1], environment.get("PATH", "")])
    return environment


SERVERS: list[ForkServer] = []


@cache
def fork_server(python: str = sys.executable) -> ForkServer:
    """A server for all tests of this process: without it each of some 600 ranks would import for 5 CPU seconds."""
    environment = clean_environment()
    if python != sys.executable:  # of Open MPI
        environment |= with_libraries_of(str(Path(python).with_name("mpiexec")), environment)
    server = fast_start.fork_server(environment, python=python)
    atexit.register(server.__exit__, None, None, None)
    SERVERS.append(server.__enter__())
    return SERVERS[-1]


def warm_python() -> list[str]:
    """`python` for a script of launch/, forked where it has imported already."""
    return [*fork_server().through, sys.executable]


def run_ranks(folder: Path, count: int, function: str, arguments: dict[str, Any], timeout: float = 300) -> list[dict]:
    """Start `count` ranks of `module:function`; each writes the arrays it returns, and they are read back."""
    out = folder / f"ranks-{count}-{len(list(folder.iterdir()))}"
    out.mkdir(parents=True)
    command = ["mpiexec", "-n", str(count), *warm_python(), "-u", "-m", "mpi4py"]
    command += [str(Path(__file__)), function, json.dumps(arguments), str(out)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (
        f"{function} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return [dict(np.load(out / f"{rank}.npz", allow_pickle=False)) for rank in range(count)]


def _main() -> None:
    from mpi4py import MPI

    function, arguments, out = sys.argv[1:4]
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    np.savez(Path(out) / f"{MPI.COMM_WORLD.rank}.npz", **found)


if __name__ == "__main__":
    _main()
