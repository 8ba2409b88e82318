"""The jobs of a comparison: which runs it consists of, the command of each, and running those that are not finished."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from ubsmoe_ds.base.errors import EXIT_FAILURE, UserError
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.launching.launchers import RENDEZVOUS_VARIABLES
from ubsmoe_ds.launching.run_folder import check_run_folder, forget_checkpoints
from ubsmoe_ds.launching.sign_in import PARENT_SPEAKS
from ubsmoe_ds.studies.comparison_runs import Run, check_inputs, collect, departures, is_finished

JOB_KEYS = ("method", "seed", "name", "output", "overwrite")  # set for each job, so not the user's to override
PROCESS_MANAGER = ("PMI_", "PMIX_", "OMPI_COMM_WORLD_")  # variables that make a process a rank of a running MPI job

Runner = Callable[[Sequence[str], Path], int]  # command, log file -> exit code


class Job(NamedTuple):
    """One run, the command that makes it, and the file for its output."""

    run: Run
    command: list[str]
    log: Path


def make_jobs(
    train: Path,
    config: Path | str,
    overrides: Sequence[str],
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    out: Path,
) -> list[Job]:
    """Return a job for each label and seed, validated; seed by seed, so that a failure leaves whole seeds behind.

    Args:
        train: launch/train.py.
        config: the experiment's YAML.
        overrides: `key.sub=value` for all jobs.
        settings: of each label, what it changes in the experiment; see `settings_by_label`.
        seeds: one run of each label per seed.
        out: folder of the comparison; jobs write to its `runs/`.

    Raises:
        UserError: for a mistake in config or overrides; nothing has been started or written then.
    """
    for text in overrides:
        if text.partition("=")[0] in JOB_KEYS:
            raise UserError(f"override {text!r}: differs from job to job; use --methods, --seeds and --out")
    jobs = []
    for seed in seeds:
        for label, changes in settings.items():
            folder, name = out / "runs", f"{label}-seed{seed}"
            # the job's keys come last: an ablation must stay what its label says
            job_keys = {"seed": seed, "name": name, "output": str(folder), "overwrite": True}
            of_job = [*overrides, *as_overrides({**changes, **job_keys})]
            exp = load_experiment(config, of_job)
            command = [sys.executable, str(train), "--config", str(config), *of_job, "--resume", "auto"]
            jobs.append(Job(Run(label, seed, exp), command, folder / f"{name}.log"))
    return jobs


def settings_by_label(methods: Sequence[str], ablate: bool) -> dict[str, Mapping[str, Any]]:
    """Return what each label changes in the experiment.

    Args:
        methods: presets and ablations by name, or "all": every preset.
        ablate: whether to add all ablations.

    Raises:
        UserError: for an unknown name, or none.
    """
    known = {name: {"method": name} for name in PRESETS} | ABLATIONS
    if not methods:
        raise UserError(f"methods: none given; use all, or some of {', '.join(known)}")
    for name in methods:
        if name != "all" and name not in known:
            raise UserError(f"methods: {name!r} is not a method; use all, or some of {', '.join(known)}")
    names = [*(PRESETS if "all" in methods else ()), *methods, *(ABLATIONS if ablate else ())]
    return {name: known[name] for name in names if name != "all"}


def as_overrides(nested: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a nested mapping as `key.sub=value` texts; JSON is YAML, and quotes what YAML would read otherwise."""
    texts = []
    for key, value in nested.items():
        if isinstance(value, Mapping):
            texts += as_overrides(value, f"{prefix}{key}.")
        else:
            texts.append(f"{prefix}{key}={json.dumps(value, ensure_ascii=False)}")
    return texts


def notes(runs: Sequence[Run]) -> list[str]:
    """Return a line for each label whose runs have keys that differ from its preset."""
    by_label = {run.method: departures(run) for run in runs}
    return [f"`{label}` here has {', '.join(keys)}" for label, keys in by_label.items() if keys]


def run_jobs(jobs: Sequence[Job], runner: Runner, report: Callable[[str, int], int]) -> int:
    """Run the jobs that are not finished, one after the other, with a line for each.

    Args:
        jobs: all jobs.
        runner: runs one of them, see `run_job`.
        report: prints an error and returns its exit code.

    Returns:
        0, or the exit code of the job that failed; no job is started after it.

    Raises:
        UserError: before the first job, if a folder cannot be used, or holds a run of another config or a finished run
            of another model or data.
    """
    missing = [job for job in jobs if not is_finished(job.run.exp)]
    check_inputs(job.run for job in jobs if job not in missing)
    _prepare(missing)
    spent, ran = 0.0, 0
    for number, job in enumerate(jobs, 1):
        took = "done before"
        if job in missing:
            start = time.perf_counter()
            code = runner(job.command, job.log)
            if code != 0 or not is_finished(job.run.exp):
                ending = f"exit code {code}" if code else "exit code 0 but without a summary.json"
                return report(f"job {job.run.exp.name} ended with {ending}; see {job.log}", code or EXIT_FAILURE)
            forget_checkpoints(job.run.exp.run_dir)  # a comparison has many large runs, and none is continued
            seconds = time.perf_counter() - start
            spent, ran, took = spent + seconds, ran + 1, f"{seconds:.1f} s"
        left = timedelta(seconds=round(spent / max(ran, 1) * (len(missing) - ran)))
        say(_progress(job, number, len(jobs), took) + (f"  ETA {left}" if ran else ""))
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
    clients, _ = collect([job.run])
    loss, accuracy = clients["loss"].mean(), clients["accuracy"].mean()
    place = f"[{number:{len(str(count))}d}/{count}]"
    state = f"eval loss {loss:.4f}" + ("" if math.isnan(accuracy) else f"  accuracy {100 * accuracy:5.1f} %")
    return f"{place} {job.run.method:18s} seed {job.run.seed}  {took:>11s}  {state}"


def run_job(command: Sequence[str], log: Path) -> int:
    """Run one job with its output in `log`. An interruption ends the job before it ends this program.

    Returns:
        The job's exit code; 128 + the signal's number if a signal ended it.
    """
    dropped = (*RENDEZVOUS_VARIABLES, PARENT_SPEAKS)
    environment = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(PROCESS_MANAGER)}
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
