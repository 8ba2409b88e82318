"""Whole jobs as a user starts them, and their processes, found by a mark in their environment.

MPI starts every rank in a session of its own, so neither groups nor sessions tell what belongs to a job.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.support.ranks import REPO, SERVERS, clean_environment, fork_server
from ubsmoe_ds.launching.fast_start import SERVER, SHIM
from ubsmoe_ds.models.hub import BUILTIN_MODELS

MARK = "UBSMOE_DS_TEST_JOB"
TRAIN = "launch/train.py"
SHORT = ["train.rounds=2", "train.local_steps=2", "data.rows=400", "data.eval_rows=24", "deepspeed.train_batch_size=4"]
OWN_SERVER = {SERVER: ""}  # in a job's environment: it starts a fork server of its own, as a user's does
NOT_FORKED = {SERVER: "/nonexistent"}  # each rank imports for itself, as on several hosts
TWO_CLIENTS = "clients=[{name: a, budget: 0.5}, {name: b, budget: 1.0, ranks: 2, expert_parallel: 2}]"


@cache
def small_model() -> str:
    """Return the key and folder of a random model with the built-in one's tokenizer, of a twentieth of its FLOPs.

    For tests that compare runs: a step takes a quarter of the time. Its losses say nothing but that they fall.
    """
    folder = tempfile.mkdtemp(prefix="ubsmoe_ds-small-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built_in, small, rng = BUILTIN_MODELS["builtin:tiny_olmoe"], 32, np.random.default_rng(0)
    facts = json.loads((built_in / "config.json").read_text())
    width, facts["num_hidden_layers"] = facts["hidden_size"], 2
    facts |= {"hidden_size": small, "intermediate_size": small, "dtype": "float32"}
    with safe_open(built_in / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if ".layers.2." not in name}  # noqa: SIM118
    weights = {}
    for name, shape in shapes.items():
        cut = [small if size == width else size for size in shape]
        weights[name] = np.ones(cut, "f4") if "norm" in name else rng.normal(0, 0.2, cut).astype("f4")
    save_file(weights, Path(folder) / "model.safetensors")
    (Path(folder) / "config.json").write_text(json.dumps(facts))
    for path in built_in.glob("tokenizer*"):
        shutil.copy(path, folder)
    return f"model.path={folder}"


def _read(path: Path) -> bytes:
    """Return a file of a process; empty if the process has ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _state(pid: int) -> str:
    """R, S, D, Z, ...; Z also if it is gone."""
    return (_read(Path(f"/proc/{pid}/stat")).decode().rpartition(")")[2].split() or ["Z"])[0]


def _stands_for(shim: int) -> int | None:
    """Return the process id of the rank for which a shim stands, from the pidfd that it holds; None if it has ended."""
    try:
        entries = list(Path(f"/proc/{shim}/fdinfo").iterdir())
    except OSError:
        return None
    for entry in entries:
        for line in _read(entry).splitlines():
            if line.startswith(b"Pid:"):
                return int(line.split()[1])
    return None


def _without_shim() -> Iterator[int]:
    """Ranks that the tests' fork servers have forked and whose shim has ended: for a moment at most."""
    lists = [_read(Path(f"/proc/{server.pid}/task/{server.pid}/children")) for server in SERVERS]
    children = {int(pid) for pids in lists for pid in pids.split()}
    commands = {int(path.parent.name): _read(path) for path in Path("/proc").glob("[0-9]*/cmdline")}
    shims = [pid for pid, command in commands.items() if SHIM.name.encode() in command]
    yield from (pid for pid in children - {_stands_for(shim) for shim in shims} if _state(pid) != "Z")


class Job:
    """A started job: its output grows in `log`."""

    def __init__(self, command: list[str], log: Path, **environment: str) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=REPO,
                env=clean_environment() | {SERVER: fork_server().path} | environment | {MARK: self.mark},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """Return what it has printed so far."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Until it has printed the text."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, f"ended before {text!r}: {self.output}"
            assert time.monotonic() < deadline, f"{text!r} does not come: {self.output}"
            time.sleep(0.02)

    def end(self, seconds: float = 240, leaving: float = 20) -> int:
        """Its exit code; after so many seconds more nothing of it may be left behind."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        deadline = time.monotonic() + leaving
        while left := list(self.pids()):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.1)
        return code

    def pids(self) -> Iterator[int]:
        """All its processes, zombies left out, and orphans of the fork server among them."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            if f"{MARK}={self.mark}".encode() in _read(path) and _state(pid) != "Z":
                yield pid
        # what a server has forked has the server's mark, if any: a rank is known by the shim that stands for it
        yield from _without_shim()

    def rank_pids(self) -> dict[int, int]:
        """Process id of each job rank that is alive."""
        found = {}
        for pid in self.pids():
            variables, command = (_read(Path(f"/proc/{pid}/{name}")) for name in ("environ", "cmdline"))
            for name in (b"PMI_RANK=", b"OMPI_COMM_WORLD_RANK="):
                ranks = [v.removeprefix(name) for v in variables.split(b"\0") if v.startswith(name)]
                if not ranks or b"train.py" not in command:
                    continue
                stands_for = _stands_for(pid) if SHIM.name.encode() in command else pid
                if stands_for is not None:
                    found[int(ranks[0])] = stands_for
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


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """A run's record, a round each; or another file of lines."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
