"""Run one experiment: federated UB-SMoE fine-tuning.

    deepspeed launch/train.py                                     # the demo, ds_configs/tiny.yaml
    deepspeed launch/train.py --config my.yaml train.rounds=20    # any key can be overridden
    mpiexec -n 6 python -m mpi4py launch/train.py                 # in an MPI world of your own

    deepspeed launch/train.py --resume auto                       # go on from the newest checkpoint, if any
    python launch/train.py --hostfile hosts                       # on several hosts; lines `host slots=N`

SIGTERM or SIGUSR1 to this process or to any rank makes the job save and end with exit code 75; a second one ends it at
once. Exit codes: 0 done, 1 failure, 2 a mistake in config, data or layout, 75 stopped and saved, 130 interrupted, 143
stopped before it was saved.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from ubsmoe_ds.base.command_line import Parser, add_show_rows, quoting_rows, whole
from ubsmoe_ds.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ubsmoe_ds.base.terminal import guard_libraries, say
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data.shares import check_rows
from ubsmoe_ds.launching import launchers, left_over
from ubsmoe_ds.launching.hang_watch import StartWatch
from ubsmoe_ds.launching.hostfile import read_hostfile
from ubsmoe_ds.launching.placement import place
from ubsmoe_ds.launching.relaunch import relaunch
from ubsmoe_ds.launching.run_folder import check_run_folder, checkpoints, resumes_in_place, summary
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS, sign_off
from ubsmoe_ds.models.hub import model_folder

DEATH_SECONDS = 1.0  # for mpiexec to end this rank, where another was killed
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "tiny.yaml"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the experiment")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment (YAML); default ds_configs/tiny.yaml")
    parser.add_argument("-v", "--verbose", action="store_true", help="let DeepSpeed print, and show tracebacks")
    parser.add_argument(
        "--resume",
        metavar="auto|FOLDER",
        help="go on from a checkpoint: its folder, or auto: the newest complete one; if there is none, start anew",
    )
    parser.add_argument(
        "--restarts", type=whole(0), default=0, metavar="N", help="start a job that died again, at most N times"
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="hosts to start ranks on over ssh, listed as lines `host slots=N`"
    )
    parser.add_argument(
        "--forward-env",
        action="append",
        default=[],
        metavar="NAME",
        help="with --hostfile: pass this variable to other hosts too, such as HF_TOKEN; may be given again",
    )
    add_show_rows(parser)
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Validate, then start an MPI world or join it as a rank; return the exit code."""
    guard_libraries()
    try:
        first, inside = launchers.is_first(os.environ), launchers.inside_mpi(os.environ)
        left_over.check_process_manager(os.environ)
        if not inside and not first:
            left_over.check_launcher_runs(os.environ, sys.argv)
            return 0  # the launcher's first process starts the MPI world, or says what is wrong
    except UserError as error:
        return report(error)
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]  # DeepSpeed's launcher adds it
    try:
        options = parse(arguments)
        exp = load_experiment(options.config, options.overrides)
        if not inside:
            return start(exp, arguments, options)
        if options.hostfile is not None and PARENT_SPEAKS not in os.environ:
            raise UserError(f"--hostfile: {options.hostfile} has no effect under mpiexec; give the hosts to mpiexec")
    except UserError as error:
        return report(error) if first else EXIT_USER_ERROR
    return run_rank(exp, arguments, options)


def start(exp: Experiment, arguments: list[str], options: argparse.Namespace) -> int:
    """Start the MPI world, on the hosts of the hostfile if there is one; return its exit code.

    Raises:
        UserError: for mistakes that show before a process is started.
    """
    if exp.model.quantize and find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantize: {exp.model.quantize!r} needs bitsandbytes, which is missing; pip install '.[quantize]'"
        )
    launchers.check_launcher(os.environ, sys.argv[0], arguments, exp.world_size)
    check_run_folder(exp, resumes_in_place(exp, options.resume))
    with quoting_rows(options.show_rows):  # of rows that all clients read; ranks never quote those of a site
        check_rows(exp)
    model_folder(exp.model.path, weights=True)  # fetch a model of the hub once, not on every rank
    hosts = None
    if options.hostfile is not None:
        slots = read_hostfile(options.hostfile)
        used = Counter(host for client in place(exp.trainers, slots) for host in client)
        hosts = {host: used[host] for host in slots if used[host]}
    return relaunch(
        sys.argv[0],
        arguments,
        exp.world_size,
        hosts=hosts,
        forward=options.forward_env,
        survive=exp.fault_tolerance == "shrink",
        restarts=options.restarts,
        saved=partial(checkpoints, exp.run_dir),
        finished=partial(summary, exp.run_dir),
    )


def run_rank(exp: Experiment, arguments: list[str], options: argparse.Namespace) -> int:
    """Run one rank of the job; return its exit code.

    An error here ends the other ranks too, or where the job survives deaths, this rank's client.
    """
    from ubsmoe_ds.mpi.start import start_mpi

    start_watch = StartWatch(exp.hang_timeout_s, os.environ)
    start_mpi(os.environ)  # not in the process of mpiexec
    from ubsmoe_ds import run
    from ubsmoe_ds.mpi import exits, ulfm
    from ubsmoe_ds.mpi.join import join, started_rank

    survives = exp.fault_tolerance == "shrink"
    who, speaks, speaks_for_group = f"rank {started_rank()}", launchers.is_first(os.environ), True
    try:
        if survives:
            ulfm.check_survivable(os.environ)
        joined = join(exp, sys.argv[0], arguments)
        who, speaks = run.describe(exp.trainers, joined.rank), joined.rank == 0
        speaks_for_group = joined.group_rank == 0
        ending = run.run(exp, joined, start_watch, verbose=options.verbose, resume=options.resume)
    except UserError as error:
        together = report_once(error, speaks, speaks_for_group)
        return exits.end_after_error(EXIT_USER_ERROR, survives, together)
    except KeyboardInterrupt:
        if speaks and PARENT_SPEAKS not in os.environ:
            say("error: interrupted", error=True)
        return exits.end_after_error(EXIT_INTERRUPTED, survives, together=False)
    except Exception as error:  # whatever it is: the other ranks must not wait for this one
        time.sleep(DEATH_SECONDS)  # if only another rank was killed, mpiexec ends this one before it prints
        detail = traceback.format_exc() if options.verbose else "(-v shows the traceback)\n"
        line = f"error: {who}: {type(error).__name__}: {error}\n{detail}"
        say(line.rstrip(), error=True)
        if survives:
            exits.die()  # the other clients continue
        return exits.end_after_error(EXIT_FAILURE, survives, together=False)
    if ending.world.rank == 0 and ending.message:
        say(ending.message, error=True)
    sign_off(os.environ, ending.code)
    return exits.end_together(ending.world.comm, ending.code, survives)


def report_once(error: UserError, speaks: bool, speaks_for_group: bool) -> bool:
    """Print a user's mistake once; once per group if only some ranks have it. Return whether every rank has failed."""
    from ubsmoe_ds.mpi import exits

    if speaks:
        report(error)
    together = exits.all_ranks_failed()
    if speaks_for_group and not speaks and not together:
        report(error)
    return together


def report(error: UserError) -> int:
    """Print a user's mistake as one line; return the exit code."""
    say(f"error: {error}", error=True)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
