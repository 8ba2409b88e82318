"""Compare methods over several seeds: one job per method and seed, one after the other, then tables and pictures.

    python launch/compare.py --config ds_configs/compare_tiny.yaml --methods all --seeds 0 1 2 --out results/tiny
    python launch/compare.py --methods ub_smoe topk --ablate --seeds 0 --out results/short train.rounds=2

    python launch/compare.py --methods all --list                 # print the jobs, one a line
    python launch/compare.py --methods all --only 3               # run the third job; slurm/compare.sbatch does so

Writes results.csv, rounds.csv, results.md, comparison.png and, for ablations, ablation.png to the folder --out. The
same command continues where it stopped: finished jobs are not run again. Runs that earlier commands finished in --out
stay in the tables if config, weights and rows are the same; notes name them, and those that are left out. With --only
it runs one job and writes no results; several such commands may run at the same time.
Exit codes: 0 done, 2 a mistake in options or config, 130 interrupted; else the exit code of the job that failed.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.command_line import Parser, carry_out, whole
from ubsmoe_ds.base.errors import EXIT_INTERRUPTED, UserError
from ubsmoe_ds.base.files import replace_files
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.studies.comparison_cohorts import cohort_notes
from ubsmoe_ds.studies.comparison_earlier import earlier_runs
from ubsmoe_ds.studies.comparison_jobs import Job, Runner, make_jobs, notes, run_job, run_jobs, settings_by_label
from ubsmoe_ds.studies.comparison_picture import picture
from ubsmoe_ds.studies.comparison_runs import Run, collect, machines
from ubsmoe_ds.studies.comparison_table import markdown

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key in all jobs")
    parser.add_argument("--config", default=ROOT / "ds_configs" / "compare_tiny.yaml", help="experiment (YAML)")
    names = " ".join([*PRESETS, *ABLATIONS])
    parser.add_argument("--methods", nargs="*", default=["all"], help=f"all (no ablations), or some of: {names}")
    parser.add_argument("--seeds", nargs="*", default=["0", "1", "2"], help="default 0 1 2")
    parser.add_argument("--out", default="runs/compare", help="folder of the results; jobs write to its runs/")
    parser.add_argument("--ablate", action="store_true", help="also ub_smoe without each of its parts")
    parser.add_argument("--list", action="store_true", help="print the jobs, one a line, and run none")
    parser.add_argument("--only", type=whole(1), metavar="N", help="run job N of the list and write no results")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str], runner: Runner = run_job) -> int:
    """Validate everything, run the jobs that are missing, write the results.

    Args:
        arguments: the command line without the program's name.
        runner: runs one job.

    Returns:
        The exit code.
    """
    return carry_out(partial(compare, arguments, runner))


def compare(arguments: Sequence[str], runner: Runner) -> int:
    """As `main`, whose arguments these are; mistakes are raised.

    Raises:
        UserError: for a mistake in options or config; nothing has been started or written then.
    """
    options = parse(arguments)
    jobs = read_jobs(options)
    tell(notes([job.run for job in jobs]))
    if options.list:
        say("\n".join(job.run.exp.name for job in jobs))
        return 0
    chosen = jobs if options.only is None else [nth_job(jobs, options.only)]
    try:
        code = run_jobs(chosen, runner, report)
    except KeyboardInterrupt:
        return report("interrupted; the same command continues where it stopped", EXIT_INTERRUPTED)
    if code == 0 and options.only is None:
        finish(options, [job.run for job in jobs], shlex.join(["python", "launch/compare.py", *arguments]))
    return code


def tell(lines: Sequence[str]) -> None:
    """Print notes."""
    for line in lines:
        say(f"note: {line}", error=True)


def read_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs that the options ask for.

    Raises:
        UserError: for a mistake in options or config; nothing has been started or written then.
    """
    settings = settings_by_label(options.methods, options.ablate)
    return jobs_of(options, settings, read_seeds(options.seeds))


def jobs_of(options: argparse.Namespace, settings: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> list[Job]:
    """Return the jobs of these labels and seeds, with the config, overrides and folder of the options."""
    train = ROOT / "launch" / "train.py"
    return make_jobs(train, options.config, options.overrides, settings, seeds, Path(options.out))


def finish(options: argparse.Namespace, asked: Sequence[Run], command: str) -> None:
    """Write the results of a command's own runs, and of those that earlier commands finished in the same folder."""

    def as_asked(label: str, seed: int) -> Run:
        return jobs_of(options, settings_by_label([label], ablate=False), [seed])[0].run

    earlier = earlier_runs(Path(options.out) / "runs", asked, as_asked)
    runs = [*asked, *earlier.runs]
    remarks = list(earlier.left_out)
    if earlier.runs:
        names = ", ".join(run.exp.name for run in earlier.runs)
        remarks.insert(0, f"also in the tables, from earlier commands: {names}")
    tell(remarks)
    seeds = " ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    headline = f"`{command}`; {machines(runs)}; seeds {seeds}"
    write_results(runs, Path(options.out), "\n\n".join([headline, *notes(runs), *cohort_notes(runs), *remarks]))


def read_seeds(texts: Sequence[str]) -> list[int]:
    """Return the seeds of the option --seeds.

    Raises:
        UserError: unless they are whole numbers, at least one, and all different.
    """
    for text in texts:
        if not (text.isascii() and text.isdecimal() and len(text) < 11):
            raise UserError(f"seeds: {text!r} is no seed; use whole numbers from 0 with spaces between, such as 0 1 2")
    seeds = [int(text) for text in texts]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {' '.join(texts)!r} must name at least one seed, and none twice")
    return seeds


def nth_job(jobs: Sequence[Job], number: int) -> Job:
    """Return job `number`, counted from 1.

    Raises:
        UserError: if there are fewer.
    """
    if number > len(jobs):
        raise UserError(f"--only: {number}, but there are {len(jobs)} jobs; use 1 to {len(jobs)}")
    return jobs[number - 1]


def write_results(runs: Sequence[Run], out: Path, headline: str) -> None:
    """Write tables and pictures of finished runs.

    Args:
        runs: finished runs.
        out: the folder.
        headline: first line of results.md.
    """
    clients, rounds = collect(runs)
    files: dict[str, Callable[[Path], object]] = {
        "results.csv": lambda path: clients.to_csv(path, index=False),
        "rounds.csv": lambda path: rounds.to_csv(path, index=False),
        "results.md": lambda path: path.write_text(markdown(clients, rounds, headline), encoding="utf-8"),
    }
    labels = list(dict.fromkeys(run.method for run in runs))
    pictures = {}
    if not PRESETS.keys().isdisjoint(labels):
        pictures["comparison.png"] = [label for label in labels if label in PRESETS]
    if not ABLATIONS.keys().isdisjoint(labels):
        pictures["ablation.png"] = [label for label in labels if label in ("ub_smoe", "topk", *ABLATIONS)]
    for name, methods in pictures.items():
        figure = picture(clients, rounds, methods)
        files[name] = partial(figure.savefig, dpi=150)
    replace_files(out, files)
    say(f"written to {out}: results.md results.csv rounds.csv {' '.join(pictures)}")


def report(line: str, code: int) -> int:
    """Print an error and return its exit code."""
    say(f"error: {line}", error=True)
    return code


if __name__ == "__main__":
    # SIGTERM is treated as Ctrl-C, so that no job is left behind; shells start background commands with SIGINT ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
