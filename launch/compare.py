"""All methods, several seeds, one table: every method x seed as a job of its own, one after the other.

    python launch/compare.py --config ds_configs/compare_tiny.yaml --methods all --seeds 0 1 2 --out results/tiny
    python launch/compare.py --methods ub_smoe topk --ablate --seeds 0 --out results/short train.rounds=2

    python launch/compare.py --methods all --list                 # the jobs, a line each
    python launch/compare.py --methods all --only 3               # the third of them; slurm/compare.sbatch runs each so

Writes results.csv, rounds.csv, results.md, comparison.png and, of ablations, ablation.png to the folder --out. Started
again with the same options it goes on where it stopped: finished jobs are not run again. With --only it runs one job
and writes no results; several such commands may run at the same time.
Exit codes: 0 done, 2 a mistake in options or config, 130 interrupted; else the exit code of the job that failed.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ubsmoe_ds.base.command_line import Parser, whole
from ubsmoe_ds.base.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from ubsmoe_ds.base.files import replace_files
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.launching.launchers import RENDEZVOUS_VARIABLES
from ubsmoe_ds.launching.run_folder import check_run_folder, forget_checkpoints
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS
from ubsmoe_ds.studies import comparison

ROOT = Path(__file__).resolve().parent.parent
OWN_KEYS = ("method", "seed", "name", "output", "overwrite")  # what differs between jobs is not the user's to override
PROCESS_MANAGER = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_")  # variables that make a process a rank of a running MPI job

Runner = Callable[[Sequence[str], Path], int]  # command, log file -> exit code


class Job(NamedTuple):
    """One run, the command that makes it, and where its output goes."""

    run: comparison.Run
    command: list[str]
    log: Path


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key in all jobs")
    parser.add_argument("--config", default=ROOT / "ds_configs" / "compare_tiny.yaml", help="experiment (YAML)")
    names = " ".join([*PRESETS, *ABLATIONS])
    parser.add_argument("--methods", nargs="*", default=["all"], help=f"all (no ablations), or some of: {names}")
    parser.add_argument("--seeds", nargs="*", default=["0", "1", "2"], help="default 0 1 2")
    parser.add_argument("--out", default="runs/compare", help="folder of the results; jobs write to its runs/")
    parser.add_argument("--ablate", action="store_true", help="also ub_smoe without each part, and with rescaling")
    parser.add_argument("--list", action="store_true", help="print the jobs, a line each, and run none")
    parser.add_argument("--only", type=whole(1), metavar="N", help="run job N of the list and write no results")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str], runner: Runner | None = None) -> int:
    """Validate everything, run what is missing, write the results.

    Args:
        arguments: the command line without the program's name.
        runner: runs one job; default `run_job`.

    Returns:
        The exit code.
    """
    try:
        options = parse(arguments)
        jobs = make_jobs(options)
        said = notes([job.run for job in jobs])
        for line in said:
            print(f"note: {line}", file=sys.stderr, flush=True)
        if options.list:
            print("\n".join(job.run.exp.name for job in jobs))
            return 0
        chosen = jobs if options.only is None else [_nth(jobs, options.only)]
        code = run_jobs(chosen, runner or run_job)
        if code == 0 and options.only is None:
            command = shlex.join(["python", "launch/compare.py", *arguments])
            runs = [job.run for job in jobs]
            headline = f"`{command}`; {comparison.machines(runs)}; seeds {' '.join(options.seeds)}"
            write_results(runs, Path(options.out), "\n\n".join([headline, *said]))
    except UserError as error:
        return _report(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return _report("interrupted; the same command goes on where it stopped", EXIT_INTERRUPTED)
    return code


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Every method x seed, each validated. Seed by seed, so that a job that fails leaves whole seeds behind.

    Raises:
        UserError: for what is wrong with options or config, before anything is started or written.
    """
    settings = _settings(options.methods, options.ablate)
    for text in options.overrides:
        if text.partition("=")[0] in OWN_KEYS:
            raise UserError(f"override {text!r}: differs from job to job; use --methods, --seeds and --out")
    jobs = []
    for seed in _seeds(options.seeds):
        for label, changes in settings.items():
            folder, name = Path(options.out) / "runs", f"{label}-seed{seed}"
            # the job's own keys come last: an ablation must stay what its label says
            own = changes | {"seed": seed, "name": name, "output": str(folder), "overwrite": True}
            overrides = [*options.overrides, *as_overrides(own)]
            exp = load_experiment(options.config, overrides)
            command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(options.config), *overrides]
            command += ["--resume", "auto"]
            jobs.append(Job(comparison.Run(label, seed, exp), command, folder / f"{name}.log"))
    return jobs


def notes(runs: Sequence[comparison.Run]) -> list[str]:
    """A line for each label that does not say all, because config or overrides set keys of its preset otherwise."""
    found = {run.method: comparison.departures(run) for run in runs}
    return [f"`{label}` here has {', '.join(keys)}" for label, keys in found.items() if keys]


def _nth(jobs: Sequence[Job], number: int) -> Job:
    if number > len(jobs):
        raise UserError(f"--only: {number}, but there are {len(jobs)} jobs; use 1 to {len(jobs)}")
    return jobs[number - 1]


def as_overrides(nested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A nested mapping as `key.sub=value` texts; JSON is YAML, and quotes what YAML would take for something else."""
    found = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found += as_overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return found


def _settings(methods: Sequence[str], ablate: bool) -> dict[str, dict[str, Any]]:
    """What each label changes in the experiment."""
    known = {name: {"method": name} for name in PRESETS} | ABLATIONS
    if not methods:
        raise UserError(f"methods: none given; use all, or some of {', '.join(known)}")
    for name in methods:
        if name != "all" and name not in known:
            raise UserError(f"methods: {name!r} is no method; use all, or some of {', '.join(known)}")
    names = [*(PRESETS if "all" in methods else ()), *methods, *(ABLATIONS if ablate else ())]
    return {name: known[name] for name in names if name != "all"}


def _seeds(texts: Sequence[str]) -> list[int]:
    for text in texts:
        if not (text.isascii() and text.isdecimal() and len(text) < 11):
            raise UserError(f"seeds: {text!r} is no seed; use whole numbers from 0 with spaces between, such as 0 1 2")
    seeds = [int(text) for text in texts]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds: {' '.join(texts)!r} must name at least one seed, and none twice")
    return seeds


def run_jobs(jobs: Sequence[Job], runner: Runner) -> int:
    """Run what is not finished, one after the other, with a line for each job.

    Returns:
        0, or the exit code of the job that failed; no job is started after it.

    Raises:
        UserError: before the first job, if a folder cannot be used or holds a run of another config, or a finished
            one of another model or data.
    """
    missing = [job for job in jobs if not comparison.is_finished(job.run.exp)]
    comparison.check_inputs(job.run for job in jobs if job not in missing)
    _prepare(missing)
    spent, ran = 0.0, 0
    for number, job in enumerate(jobs, 1):
        took = "done before"
        if job in missing:
            start = time.perf_counter()
            code = runner(job.command, job.log)
            if code != 0 or not comparison.is_finished(job.run.exp):
                what = f"exit code {code}" if code else "exit code 0 but without a summary.json"
                return _report(f"job {job.run.exp.name} ended with {what}; see {job.log}", code or EXIT_FAILURE)
            forget_checkpoints(job.run.exp)  # many large runs, none of which goes on
            seconds = time.perf_counter() - start
            spent, ran, took = spent + seconds, ran + 1, f"{seconds:.1f} s"
        left = timedelta(seconds=round(spent / max(ran, 1) * (len(missing) - ran)))
        print(_progress(job, number, len(jobs), took) + (f"  ETA {left}" if ran else ""), flush=True)
    return 0


def _prepare(jobs: Sequence[Job]) -> None:
    for job in jobs:
        check_run_folder(job.run.exp)
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            job.log.open("a").close()
        except OSError as error:
            raise UserError(f"out: {job.log} cannot be written ({error.strerror}); choose another --out") from error


def _progress(job: Job, number: int, count: int, took: str) -> str:
    clients, _ = comparison.collect([job.run])
    loss, accuracy = clients["loss"].mean(), clients["accuracy"].mean()
    place = f"[{number:{len(str(count))}d}/{count}]"
    state = f"eval loss {loss:.4f}  accuracy {100 * accuracy:5.1f} %"
    return f"{place} {job.run.method:18s} seed {job.run.seed}  {took:>11s}  {state}"


def run_job(command: Sequence[str], log: Path) -> int:
    """Run one job; all that it prints goes to `log`. An interruption ends the job before it ends this program.

    Returns:
        The job's exit code; 128 + the signal's number if a signal ended it.
    """
    left_out = (*RENDEZVOUS_VARIABLES, PARENT_SPEAKS)
    environment = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith(PROCESS_MANAGER)}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            # a terminal's Ctrl-C has reached the job already, a signal to this process alone has not
            process.terminate()
            process.wait()
            raise
    return code if code >= 0 else 128 - code


def write_results(runs: Sequence[comparison.Run], out: Path, headline: str) -> None:
    """The files that `--out` is for.

    Args:
        runs: finished runs.
        out: the folder.
        headline: first line of results.md.
    """
    clients, rounds = comparison.collect(runs)
    files: dict[str, Callable[[Path], object]] = {
        "results.csv": lambda path: clients.to_csv(path, index=False),
        "rounds.csv": lambda path: rounds.to_csv(path, index=False),
        "results.md": lambda path: path.write_text(comparison.markdown(clients, headline), encoding="utf-8"),
    }
    labels = list(dict.fromkeys(run.method for run in runs))
    pictures = {}
    if not PRESETS.keys().isdisjoint(labels):
        pictures["comparison.png"] = [label for label in labels if label in PRESETS]
    if not ABLATIONS.keys().isdisjoint(labels):
        pictures["ablation.png"] = [label for label in labels if label in ("ub_smoe", "topk", *ABLATIONS)]
    for name, drawn in pictures.items():
        figure = comparison.picture(clients, rounds, drawn)
        files[name] = partial(figure.savefig, dpi=150)
    replace_files(out, files)
    print(f"written to {out}: results.md results.csv rounds.csv {' '.join(pictures)}", flush=True)


def _report(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    # SIGTERM is treated as Ctrl-C, so that no job is left behind; shells start background commands with SIGINT ignored
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
