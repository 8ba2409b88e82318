"""Federated UB-SMoE fine-tuning of one experiment.

    deepspeed launch/train.py                                     # the demo, ds_configs/tiny.yaml
    deepspeed launch/train.py --config my.yaml train.rounds=20    # any key can be overridden
    mpiexec -n 6 python -m mpi4py launch/train.py                 # in an MPI world of your own

Exit codes: 0 done, 1 failure, 2 a mistake in config, data or layout, 130 interrupted.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

from ubsmoe_ds import relaunch
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.config_file import load_experiment
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import load_rows
from ubsmoe_ds.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ubsmoe_ds.run_folder import check_run_folder

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "tiny.yaml"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the experiment")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment (YAML); default ds_configs/tiny.yaml")
    parser.add_argument("-v", "--verbose", action="store_true", help="let DeepSpeed print, and show tracebacks")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Validate, then start an MPI world or take a place in it."""
    first = relaunch.is_first(os.environ)
    if not relaunch.inside_mpi(os.environ) and not first:
        return 0  # another local process of the deepspeed launcher: the first one starts the MPI world
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # the launcher adds it
    options = parse(arguments)
    try:
        exp = load_experiment(options.config, options.overrides)
        if not relaunch.inside_mpi(os.environ):
            check_files(exp)
            return relaunch.relaunch(sys.argv[0], arguments, exp.world_size)
    except UserError as error:
        return report(error) if first else EXIT_USER_ERROR
    return run_rank(exp, arguments, options.verbose)


def check_files(exp: Experiment) -> None:
    """What can be found wrong before a process is started: the run's folder, rows, and how they are dealt."""
    check_run_folder(exp)
    if not exp.data.source.startswith("hub:"):
        train, _ = load_rows(exp.data, exp.seed)
        partition([row["task"] for row in train], exp.clients, exp.data, exp.seed)


def run_rank(exp: Experiment, arguments: list[str], verbose: bool) -> int:
    """One rank of the job; whatever goes wrong here ends the others too."""
    from ubsmoe_ds import run, world  # MPI starts when it is imported, so not in the process that starts mpiexec

    rank = world.job_rank()
    try:
        run.run(exp, sys.argv[0], arguments, verbose)
        return 0
    except UserError as error:
        if rank == 0:
            report(error)
        if not world.all_ranks_failed():
            if rank > 0:
                report(error)
            world.abort(EXIT_USER_ERROR)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if rank == 0 and relaunch.PARENT_SPEAKS not in os.environ:
            print("error: interrupted", file=sys.stderr, flush=True)
        world.abort(EXIT_INTERRUPTED)
    except Exception as error:  # the boundary of the process: the other ranks must not wait for this one
        detail = traceback.format_exc() if verbose else "(-v shows the traceback)\n"
        print(
            f"error: {_describe(exp, rank)}: {type(error).__name__}: {error}\n{detail}",
            end="",
            file=sys.stderr,
            flush=True,
        )
        world.abort(EXIT_FAILURE)
    return EXIT_FAILURE


def report(error: UserError) -> int:
    """One line, and the exit code of a user's mistake."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def _describe(exp: Experiment, rank: int) -> str:
    first = 0
    for client in exp.clients:
        if rank < first + client.ranks:
            return f"client {client.name!r}, rank {rank - first} of {client.ranks} (job rank {rank})"
        first += client.ranks
    return f"job rank {rank}"


if __name__ == "__main__":
    sys.exit(main())
