"""Whole jobs as a user starts them, and their processes, found by a mark in their environment.

MPI starts every rank in a session of its own, so neither groups nor sessions tell what belongs to a job.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.support.ranks import REPO, clean_environment

MARK = "UBSMOE_DS_TEST_JOB"
TRAIN = "launch/train.py"
SHORT = ["train.rounds=2", "train.local_steps=2", "data.rows=400", "data.eval_rows=24"]
TWO_CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}]"


class Job:
    """A started job: its output grows in `log`."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                env=clean_environment() | environment | {MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until it has printed the text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, f"ended before {text!r}: {self.output}"
            assert time.monotonic() < deadline, f"{text!r} does not come: {self.output}"
            time.sleep(0.02)

    def end(self, seconds: float = 240) -> int:
        """Its exit code; nothing of it may be left behind."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        deadline = time.monotonic() + 20
        while left := list(self.pids()):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)
        return code

    def pids(self) -> Iterator[int]:
        """All its processes, zombies left out."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                except OSError:
                    continue
                if f"{MARK}={self.mark}".encode() in environment and state != "Z":
                    yield int(entry.name)

    def rank_pids(self) -> dict[int, int]:
        """Process id of each job rank that is alive."""
        found = {}
        for pid in self.pids():
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            for name in (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK="):
                ranks = [v.removeprefix(name) for v in variables if v.startswith(name)]
                if ranks and b"train.py" in command:
                    found[int(ranks[0])] = pid
        return found

    def kill(self) -> None:
        """End all of it at once."""
        for pid in list(self.pids()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def run(*command: str, timeout: float = 240, **environment: str) -> tuple[int, str]:
    """Exit code and output of a job that ends by itself."""
    log = Path(f"/tmp/{uuid.uuid4().hex}.log")
    job = Job(list(command), log, **environment)
    try:
        return job.end(timeout), job.output
    finally:
        log.unlink()


def train(*arguments: str, timeout: float = 240, **environment: str) -> tuple[int, str]:
    """The same of launch/train.py."""
    return run(sys.executable, TRAIN, *arguments, timeout=timeout, **environment)


def records(folder: Path) -> list[dict]:
    """A run's record, a round each."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
