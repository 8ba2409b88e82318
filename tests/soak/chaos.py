"""A soak test: strike the tiny job at random moments and resume it until it is done; it must end as if undisturbed.

    python tests/soak/chaos.py --faults 100 --seed 0        # kills, hangs, requests to stop: see FAULTS
    python tests/soak/chaos.py --faults 20 --seed 0 --ulfm    # kills; the others go on; needs Open MPI (make openmpi)
    python tests/soak/chaos.py --faults 20 --seed 0 --population    # or with --ulfm: groups that train clients in turn

Without --ulfm jobs run one after the other, each struck a few times, until that many faults are done. Each must end by
itself after a fault, and have the bits of the undisturbed job: metrics of every round, each recorded once, and the
adapter. No round that was saved may run again. In the end nothing of it may be left but its folder: no process, no
temporary file, no shared memory. With --ulfm the remaining ranks must finish by themselves, with every round recorded
once and a lower loss; of a population every client must take part whenever it is drawn, but for those of a group in the
round of its death. Exit codes: 0 success, 1 a failed expectation.
"""

import argparse
import contextlib
import itertools
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402

from tests.support.jobs import OWN_SERVER, REPO, TRAIN, Job, records, small_model  # noqa: E402
from ubsmoe_ds.adapters.adapter import read_adapter  # noqa: E402
from ubsmoe_ds.federation.budgets import CLIENT_RECORD  # noqa: E402

ROUNDS = 8
SHORT = [f"train.rounds={ROUNDS}", "train.local_steps=3", "data.rows=200", "data.eval_rows=12", "overwrite=false"]
SHORT += ["deepspeed.train_batch_size=4", small_model()]
CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}]"
MANY = CLIENTS.replace("}]", "}, {name: c, budget: 0.25}, {name: d, budget: 0.5}]")
POPULATION = (  # of ten clients, whose figures are in a file of their own
    "clients=[{count: 10, budgets: [0.25, 0.5, 1.0], capacity_factor: [1.25, null, null, null]}]",
    "sampling={clients: 5}",
)
GROUPS = (*POPULATION, "groups=[{}, {ranks: 2, expert_parallel: 2}]")
MANY_GROUPS = (*POPULATION, "groups=[{}, {ranks: 2, expert_parallel: 2}, {count: 2}]")
OPEN_MPI = Path(os.environ.get("UBSMOE_DS_OPENMPI_PYTHON", REPO / ".venv-openmpi" / "bin" / "python"))
FAULTS_A_JOB = 10  # then the job may end
STARTING = 0.15  # share of the faults that come before the first round
ROUND_SECONDS = 0.5  # a fault comes up to so long after a line: a round or two on 2 cores
HANG_TIMEOUT = 6  # seconds
ENDING_SECONDS = 400  # on a machine with much other work, and if a rank was stopped before it had joined
# what is struck: (share of the faults, signal)
FAULTS = {
    "a rank": (0.5, signal.SIGKILL),
    "a rank that hangs": (0.2, signal.SIGSTOP),
    "launch/train.py, asked to stop": (0.1, signal.SIGTERM),
    "launch/train.py": (0.07, signal.SIGKILL),
    "mpiexec": (0.07, signal.SIGKILL),
    "mpiexec's proxy": (0.06, signal.SIGKILL),
}
# of launch/train.py: killed, or asked to stop before it listens; and those of docs/fault-tolerance.md
CODES = (-signal.SIGKILL, -signal.SIGTERM, 0, 1, 75, 137, 143)
PROGRAMS = {"mpiexec": "mpiexec", "mpiexec's proxy": "hydra_pmi_proxy"}
SHARED_MEMORY = Path("/dev/shm")


class Failure(Exception):  # noqa: N818
    """An expectation that failed."""


def expect(condition: bool, message: str) -> None:
    """Raise `Failure` with the message unless the condition holds."""
    if not condition:
        raise Failure(message)


def last_saved(folder: Path) -> int:
    """Return the last round that is saved completely: the newest checkpoint goes on after it; -1 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")] if folder.exists() else []
    if not names:
        return -1
    number = int(re.findall(r"\d+$", max(names))[0])
    return number if "within" not in max(names) else number - 1


def victim(job: Job, what: str, chance: random.Random) -> int | None:
    """Return the process to strike; None if there is none any more."""
    if what.startswith("a rank"):
        ranks = job.rank_pids()
        return ranks[chance.choice(sorted(ranks))] if ranks else None
    if what.startswith("launch/train.py"):
        return job.process.pid
    name = PROGRAMS[what]
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(job.process.pid).children(recursive=True):
            if process.name().startswith(name):
                return process.pid
    return None


def await_moment(job: Job, line: str, chance: random.Random) -> None:
    """Wait for a line and a random part of a round more; raise AssertionError if the job ends before.

    Seconds since the start would tell nothing: how many rounds they are differs between machines.
    """
    job.wait_for(line, ENDING_SECONDS)
    time.sleep(chance.uniform(0, ROUND_SECONDS))


def strike(job: Job, chance: random.Random, saved: int) -> str | None:
    """Wait for a random moment of the three rounds after the one that is saved, then strike something.

    Return what; None if the job had ended.
    """
    what = chance.choices(list(FAULTS), [share for share, _ in FAULTS.values()])[0]
    try:
        if chance.random() < STARTING:
            time.sleep(chance.uniform(0, 6))
        else:
            number = chance.randint(saved, min(saved + 2, ROUNDS - 1))
            await_moment(job, f"round {number:3d}/" if number > saved else ": ub_smoe, ", chance)
    except AssertionError:
        return None  # done, or too slow to be struck
    pid = victim(job, what, chance)
    if pid is None or job.process.poll() is not None:
        return None
    try:
        os.kill(pid, FAULTS[what][1])
    except ProcessLookupError:
        return None
    return what


def unused(files: set[Path]) -> set[Path]:
    """Return the files that exist, and that no living process has mapped, such as another job's.

    Names of MPICH's memory are left out: those of ranks that were killed while MPI started go at a later start.
    """
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= {Path(line.split()[-1]) for line in maps.read_text().splitlines() if str(SHARED_MEMORY) in line}
    return {file for file in files - mapped if file.exists() and not file.name.startswith("mpich_shm_")}


def broken_run(out: Path, clients: Sequence[str], chance: random.Random, faults: int) -> Counter[str]:
    """Repeat one run until it succeeds, with up to `faults` faults; return which ones hit it."""
    command = [sys.executable, TRAIN, *SHORT, *clients, f"hang_timeout_s={HANG_TIMEOUT}", f"output={out}"]
    temporary, shared = out.parent / f"{out.name}-tmp", set(SHARED_MEMORY.iterdir())
    temporary.mkdir()
    hits: Counter[str] = Counter()
    for attempt in itertools.count(1):
        saved, log = last_saved(out / "tiny"), out.parent / f"{out.name}-{attempt}.log"
        job = Job([*command, "--resume", "auto"], log, TMPDIR=str(temporary), **OWN_SERVER)
        struck = strike(job, chance, max(saved, 0)) if hits.total() < faults else None
        code = job.end(ENDING_SECONDS, ENDING_SECONDS)  # ranks whose launcher was killed save first
        hits.update([struck] if struck else [])
        ran = [int(number) for number in re.findall(r"^round +(\d+)/", job.output, re.MULTILINE)]
        expect(not ran or min(ran) > saved, f"round {min(ran, default=0)} was saved and ran again: {log}")
        expect(code in CODES and "Traceback" not in job.output, f"exit code {code}: {log}\n{job.output}")
        print(f"{out.name}: {struck}, exit code {code}, saved up to round {last_saved(out / 'tiny')}", flush=True)
        if code == 0 and last_saved(out / "tiny") == ROUNDS:
            break
    left = [*temporary.iterdir(), *unused(set(SHARED_MEMORY.iterdir()) - shared)]
    expect(not left, f"left behind by {out}: {left}")
    return hits


def figures_of_clients(folder: Path) -> list[tuple]:
    """Return what a run has recorded of each client of each round; nothing where clients are few."""
    lines = records(folder, CLIENT_RECORD) if (folder / CLIENT_RECORD).exists() else []
    return [(line["round"], line["client"], line["metrics"]) for line in lines]


def compare(whole: Path, broken: Path) -> None:
    """Check that both runs have the same records and the same adapter, bit for bit."""
    expected, actual = records(whole), records(broken)
    rounds = [r["round"] for r in actual]
    expect(rounds == list(range(ROUNDS + 1)), f"rounds {rounds} in {broken}")
    expect([r["metrics"] for r in actual] == [r["metrics"] for r in expected], f"other metrics in {broken}")
    expect(figures_of_clients(broken) == figures_of_clients(whole), f"other figures of clients in {broken}")
    first, second = read_adapter(whole / "adapter").state, read_adapter(broken / "adapter").state
    expect(all(torch.equal(value, second[key]) for key, value in first.items()), f"another adapter in {broken}")


def soak(folder: Path, faults: int, seed: int, clients: Sequence[str] = (CLIENTS,)) -> str:
    """Strike and resume jobs; return a line to report."""
    chance = random.Random(seed)
    whole = Job([sys.executable, TRAIN, *SHORT, *clients, f"output={folder / 'whole'}"], folder / "whole.log")
    expect(whole.end(300) == 0, whole.output)
    hits: Counter[str] = Counter()
    for runs in itertools.count(1):
        out = folder / f"broken-{runs}"
        hits += broken_run(out, clients, chance, min(FAULTS_A_JOB, faults - hits.total()))
        compare(folder / "whole" / "tiny", out / "tiny")
        if hits.total() == faults:
            break
    kinds = ", ".join(f"{count} {what}" for what, count in hits.most_common())
    return f"{faults} faults ({kinds}) in {runs} runs of {ROUNDS} rounds: all bit-equal to the undisturbed run"


def soak_shrinking(folder: Path, kills: int, seed: int, clients: Sequence[str] = (MANY,)) -> str:
    """Kill ranks of at most two groups in each job, which must shrink and go on; return a line to report."""
    chance, hits, runs, misses = random.Random(seed), 0, 0, 0
    path = os.pathsep.join([str(OPEN_MPI.parent), os.environ["PATH"]])
    while hits < kills:
        runs += 1
        out = folder / f"shrunk-{runs}"
        command = [
            str(OPEN_MPI),
            TRAIN,
            *SHORT,
            *clients,
            f"output={out}",
            "fault_tolerance=shrink",
            "min_clients=1",
        ]
        job = Job(command, folder / f"shrunk-{runs}.log", PATH=path)
        killed = []
        for number in sorted(chance.sample(range(ROUNDS - 1), min(2, kills - hits))):
            try:
                await_moment(job, f"round {number:3d}/" if number else "before ", chance)
            except AssertionError:
                break  # done
            ranks = job.rank_pids()
            if len(ranks) < 2:
                break
            rank = chance.choice(sorted(ranks))
            killed.append(rank)
            os.kill(ranks[rank], signal.SIGKILL)
        code = job.end(3 * ENDING_SECONDS)
        hits, misses = hits + len(killed), misses + (not killed)
        expect(misses < 5, f"no rank was there to be killed in {misses} jobs, such as {job.log}\n{job.output}")
        print(f"{out.name}: killed ranks {killed}, exit code {code}", flush=True)
        rounds = records(out / "tiny")
        expect(code == 0, f"exit code {code}: {job.log}\n{job.output}")
        numbers = [r["round"] for r in rounds]
        expect(numbers == list(range(ROUNDS + 1)), f"rounds {numbers} in {out}")
        expect(rounds[-1]["metrics"]["eval/loss"] < rounds[0]["metrics"]["eval/loss"], f"nothing learned in {out}")
        for record in rounds[1:] if clients == MANY_GROUPS else []:
            cohort, missing = record["metrics"]["clients/cohort"], record["metrics"].get("clients/out", 0)
            expect(cohort + missing == 5, f"round {record['round']} of {out}: {cohort} took part, {missing} out")
    return f"{hits} kills in {runs} runs of {ROUNDS} rounds: the remaining ranks ended every one"


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ulfm", action="store_true")
    parser.add_argument("--population", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        try:
            run = soak_shrinking if options.ulfm else soak
            kind = (MANY_GROUPS if options.ulfm else GROUPS,) if options.population else ()
            report = run(Path(folder), options.faults, options.seed, *kind)
        except Failure as failure:
            print(f"FAILED: {failure}", flush=True)
            return 1
    print(report, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
