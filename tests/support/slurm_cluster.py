"""A real Slurm on this host: munged, slurmctld and a slurmd for each emulated node, for the tests and by hand.

    python -m tests.support.slurm_cluster FOLDER        # starts it and says how to use it; Ctrl-C stops it

Everything it needs or writes is in one private folder, ports are free ones, and it ends by its own process ids: several
clusters on a host do not meet. It takes root, because slurmd starts jobs as other users do.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PACKAGES = "slurmctld slurmd slurm-client munge libpmi2-0"
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "squeue", "scancel")
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # not on everybody's PATH
START_SECONDS, STOP_SECONDS, LOOK_SECONDS = 30.0, 10.0, 0.1
KILL_WAIT = 30  # seconds from SIGTERM to SIGKILL when Slurm ends a job; its default
MOST_JOBS = 60_000_000  # a little less than the highest number of a job
# what is a default of every version is left out; so are names that newer versions no longer know
CONF = """
ClusterName=tests
FirstJobId={first_job}
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait={kill_wait}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""
NODE = "NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} CPUs={cpus} CoresPerSocket={cpus} \
RealMemory=4000 State=UNKNOWN"


def why_not() -> str | None:
    """Why no Slurm can be started here, or None."""
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install {PACKAGES}"
    return "slurmd needs root" if os.geteuid() else None


@contextmanager
def cluster(folder: Path, nodes: int = 2, cpus: int = 4) -> Iterator[dict[str, str]]:
    """Run a Slurm for as long as the context lasts.

    Args:
        folder: a new one, of a short name: sockets are in it, whose paths have at most 107 characters.
        nodes: how many; they are called n0, n1, ...
        cpus: that each node claims to have; the host may have fewer.

    Yields:
        The environment that tells Slurm's commands about it.

    Raises:
        RuntimeError: if it does not come up.
    """
    names = [f"n{number}" for number in range(nodes)]
    for name in ("munge", "state", *(f"{kind}.{node}" for kind in ("spool", "tmp") for node in names)):
        (folder / name).mkdir(parents=True)
    conf = folder / "slurm.conf"
    conf.write_text(_configuration(folder, names, cpus), encoding="utf-8")
    environment = {"SLURM_CONF": str(conf)}
    munge, key = folder / "munge", folder / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    # --force: folders above it may belong to anybody, which is fine for a key of tests
    own = [f"--{what}-file={munge}/{what}" for what in ("key", "pid", "log", "seed")]
    daemons = [["munged", "--foreground", "--force", f"--socket={munge}/socket", *own]]
    daemons += [["slurmctld", "-D", "-c", "-f", str(conf)]]
    daemons += [["slurmd", "-D", "-N", name, "-f", str(conf)] for name in names]
    with ExitStack() as stack:
        for command in daemons:
            stack.enter_context(_daemon(command, environment, folder / "daemons.log"))
            if command[0] == "munged":
                _wait(lambda: (munge / "socket").exists(), "munged gives no socket", folder)
        _wait(lambda: _idle(environment) == set(names), "its nodes are not idle", folder)
        try:
            yield environment
        finally:
            _finish_jobs(environment)


def _configuration(folder: Path, names: Sequence[str], cpus: int) -> str:
    controller, *ports = _free_ports(len(names) + 1)
    lines = [NODE.format(name=name, port=port, cpus=cpus) for name, port in zip(names, ports, strict=True)]
    return CONF.format(
        folder=folder,
        controller_port=controller,
        nodes="\n".join(lines),
        kill_wait=KILL_WAIT,
        # MPICH names shared memory after job and step, and a killed job leaves it behind: no number may come twice
        first_job=secrets.randbelow(MOST_JOBS) + 1,
    )


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


@contextmanager
def _daemon(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """In a session of its own, so that a Ctrl-C meant for the tests does not end it before its jobs."""
    with log.open("a") as output:
        process = subprocess.Popen(
            [str(_program(command[0])), *command[1:]],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(ready: Callable[[], bool], problem: str, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > deadline:
            logs = [f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log")]
            raise RuntimeError("\n".join([f"Slurm: {problem}", *logs]))
        time.sleep(LOOK_SECONDS)


def _idle(environment: Mapping[str, str]) -> set[str]:
    """The nodes that are idle; sinfo names a node once for each partition."""
    return set(_ask(environment, "sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())


def _finish_jobs(environment: Mapping[str, str]) -> None:
    """No process of a job may outlive its cluster."""
    _ask(environment, "scancel", "--user=root")
    deadline = time.monotonic() + KILL_WAIT + STOP_SECONDS
    while _ask(environment, "squeue", "--noheader") and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)


def _ask(environment: Mapping[str, str], *command: str) -> str:
    """Return the output of one of Slurm's commands, nothing while it reaches no controller."""
    variables = os.environ | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    """Start one and keep it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    reason = why_not()
    if reason:
        sys.exit(f"error: {reason}")
    folder = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with cluster(folder) as environment:
            print(f"export SLURM_CONF={environment['SLURM_CONF']}   # and then sinfo, sbatch, srun ...", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("stopped", flush=True)


if __name__ == "__main__":
    main()
