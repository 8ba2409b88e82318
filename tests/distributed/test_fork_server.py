"""Ranks that a warmed process forks: to mpiexec each is the process that it has started."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.ranks import clean_environment
from ubsmoe_ds.launching import fast_start

SECONDS = 20.0
PROGRAM = """
import json, os, signal, sys, time
print(json.dumps({
    "pid": os.getpid(), "parent": os.getppid(), "session": os.getsid(0), "warm": "fractions" in sys.modules,
    "argv": sys.argv, "path": sys.path[0], "folder": os.getcwd(), "environment": dict(os.environ),
    "umask": os.umask(0), "name": __name__,
    "open": {number: os.readlink(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")
             if os.path.exists(f"/proc/self/fd/{number}")},
}), flush=True)
print("to stderr", file=sys.stderr, flush=True)
exec(sys.argv[1])
"""


@pytest.fixture(scope="module")
def server():
    """One that has imported a small module which nothing else here imports."""
    with fast_start.fork_server(clean_environment(), ["fractions"]) as started:
        yield started


class Rank:
    """A program under a shim."""

    def __init__(self, folder, server, do: str = "", python: tuple[str, ...] = ("-u",), **options) -> None:
        (folder / "program.py").write_text(PROGRAM)
        command = [*server.through, sys.executable, *python, str(folder / "program.py"), do]
        options = {"env": clean_environment()} | options
        self.shim = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
        self.facts = json.loads(self.shim.stdout.readline())

    def end(self) -> int:
        code = self.shim.wait(timeout=SECONDS)
        self.shim.stdout.close()
        self.shim.stderr.close()
        return code

    def is_gone(self) -> bool:
        """Whether it is, or soon is."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if not Path(f"/proc/{self.facts['pid']}").exists():
                return True
            time.sleep(0.01)
        return False


def test_it_takes_over_what_the_shim_was_started_with(server, tmp_path):
    environment = clean_environment() | {"PMI_RANK": "3", "UBSMOE_DS_SOMETHING": "ü\udcff"}
    where, other = tmp_path / "elsewhere", os.open(tmp_path, os.O_RDONLY)
    where.mkdir()
    rank = Rank(tmp_path, server, env=environment, cwd=where, umask=0o027, pass_fds=[other], stdin=subprocess.DEVNULL)
    facts, standard = rank.facts, rank.shim.stdout.fileno()
    assert facts["warm"] and facts["parent"] == server.pid and facts["session"] == facts["pid"] != rank.shim.pid
    assert facts["environment"] == environment
    assert facts["argv"] == [str(tmp_path / "program.py"), ""] and facts["path"] == str(tmp_path)
    assert facts["folder"] == str(where) and facts["umask"] == 0o027 and facts["name"] == "__main__"
    assert facts["open"].keys() == {"0", "1", "2", str(other)}
    assert facts["open"]["0"] == "/dev/null" and facts["open"]["1"] == str(Path(f"/proc/self/fd/{standard}").readlink())
    assert facts["open"][str(other)] == str(tmp_path)
    assert rank.shim.communicate(timeout=SECONDS) == ("", "to stderr\n")
    assert rank.shim.returncode == 0
    os.close(other)


ENDS = {
    "exit code": ("sys.exit(7)", 7),
    "failure": ("raise RuntimeError", 1),
    "at once": ("os._exit(75)", 75),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    "aborted": ("os.abort()", -signal.SIGABRT),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_shim_ends_as_the_rank_does(how, server, tmp_path):
    do, code = ENDS[how]
    rank = Rank(tmp_path, server, do)
    assert rank.end() == code
    assert rank.is_gone()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on(number, server, tmp_path):
    """Handled by the rank; and where it does not handle them they end both."""
    handle = f"signal.signal({number}, lambda *_: os._exit(9)); print('ready', flush=True); time.sleep(60)"
    rank = Rank(tmp_path, server, handle)
    assert rank.shim.stdout.readline() == "ready\n"
    rank.shim.send_signal(number)
    assert rank.end() == 9
    rank = Rank(tmp_path, server, "print('ready', flush=True); time.sleep(60)")
    assert rank.shim.stdout.readline() == "ready\n"
    rank.shim.send_signal(number)
    plain = subprocess.Popen(
        [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    plain.stdout.readline()
    plain.send_signal(number)
    assert rank.end() == plain.wait(timeout=SECONDS)
    plain.stdout.close()


def test_with_its_shim_a_rank_and_what_it_has_started_end(server, tmp_path):
    start = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    rank = Rank(tmp_path, server, start)
    child = int(rank.shim.stdout.readline())
    rank.shim.kill()
    assert rank.end() == -signal.SIGKILL
    assert rank.is_gone()
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{child}").exists() and "\nState:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_do_not_hold_each_others_descriptors(server, tmp_path):
    """Else the end of one would not be seen while another lives."""
    first = Rank(tmp_path, server, "time.sleep(60)")
    second = Rank(tmp_path, server, "time.sleep(60)")
    assert second.facts["open"].keys() == {"0", "1", "2"}
    first.shim.kill()
    assert first.shim.stdout.read() == "" and first.end() == -signal.SIGKILL
    second.shim.kill()
    assert second.end() == -signal.SIGKILL


def test_with_the_server_ranks_and_shims_end(tmp_path):
    with fast_start.fork_server(clean_environment(), ["fractions"]) as server:
        ranks = [Rank(tmp_path, server, "time.sleep(60)") for _ in range(2)]
        os.kill(server.pid, signal.SIGKILL)
        assert [rank.end() for rank in ranks] == [-signal.SIGKILL] * 2
        assert all(rank.is_gone() for rank in ranks)
        # and whoever comes now imports for itself
        late = Rank(tmp_path, server, "sys.exit(3)")
        assert late.facts["pid"] == late.shim.pid and not late.facts["warm"] and late.end() == 3


CREATOR = """
import os, signal, subprocess, sys, time
from tests.support.ranks import clean_environment
from ubsmoe_ds.launching import fast_start
with fast_start.fork_server(clean_environment(), ["fractions"]) as server:
    command = [*server.through, sys.executable, "-u", *sys.argv[1:]]
    shim = subprocess.Popen(command, env=clean_environment())
    print(server.pid, server.path, flush=True)
    time.sleep(1000)
"""


def test_the_server_outlives_its_creator_only_as_long_as_ranks_do(tmp_path):
    (tmp_path / "rank.py").write_text("import os\nprint(os.getppid(), flush=True)\nos.read(0, 1)\nos._exit(5)\n")
    with subprocess.Popen(
        [sys.executable, "-c", CREATOR, str(tmp_path / "rank.py")],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as creator:
        lines = {creator.stdout.readline().split()[0] for _ in range(2)}
        assert len(lines) == 1, "the rank is the server's"
        server = int(lines.pop())
        creator.kill()
        creator.wait()
        time.sleep(0.3)
        assert Path(f"/proc/{server}").exists()
        creator.stdin.write("x")
        creator.stdin.flush()
        deadline = time.monotonic() + SECONDS
        while Path(f"/proc/{server}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(f"/proc/{server}").exists()


REFUSED = {
    "a variable that imports may have read": {"env": {"OMP_NUM_THREADS": "7"}},
    "a limit": {"preexec_fn": lambda: __import__("resource").setrlimit(__import__("resource").RLIMIT_CORE, (1, 1))},
    "an option of Python": {"python": ("-u", "-O")},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_fork_cannot_give_is_started_as_ever(what, server, tmp_path):
    options = dict(REFUSED[what])
    if "env" in options:
        options["env"] = clean_environment() | options["env"]
    rank = Rank(tmp_path, server, "sys.exit(6)", **options)
    assert rank.facts["pid"] == rank.shim.pid and not rank.facts["warm"]
    assert rank.end() == 6


NOT_READY = {
    "a thread": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=[60], daemon=True).start()",
        "2 threads",
    ),
    "a descriptor": ("import os\nos.open('/', os.O_RDONLY)", "descriptors"),
    "MPI": ("import sys\nsys.modules['mpi4py.MPI'] = sys", "MPI"),
}


@pytest.mark.parametrize("what", NOT_READY)
def test_a_server_that_must_not_fork_says_so_and_leaves(what, tmp_path, capfd):
    source, reason = NOT_READY[what]
    (tmp_path / "unready.py").write_text(source)
    environment = clean_environment()
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    with fast_start.fork_server(environment, ["unready"]) as server:
        rank = Rank(tmp_path, server, "sys.exit(4)", env=environment)
        assert rank.facts["pid"] == rank.shim.pid and rank.end() == 4
        assert (
            f"note: ranks import everything themselves: after the imports there are {reason}" in capfd.readouterr().err
        )


STUCK = "import sys\nsys.modules['__main__'].kill = lambda rank: None\n"  # it is not killed at once, whatever is sent


def test_a_rank_that_does_not_end_holds_no_other_up(tmp_path):
    """Such as one in a system call of a stuck file system: the job that is started again needs the server."""
    (tmp_path / "stuck.py").write_text(STUCK)
    environment = clean_environment() | {"PYTHONPATH": str(tmp_path)}
    with fast_start.fork_server(environment, ["stuck"]) as started:
        first = Rank(tmp_path, started, "time.sleep(60)", env=environment)
        first.shim.kill()
        first.end()
        command = [*started.through, sys.executable, "-u", str(tmp_path / "program.py"), ""]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        facts = json.loads(done.stdout)
        assert facts["parent"] == first.facts["parent"] == started.pid and not done.returncode
        os.kill(first.facts["pid"], signal.SIGKILL)
        assert first.is_gone()
