"""Import what ranks need once, then fork them: importing it again would take each rank seconds.

    python -P -u -m ubsmoe_ds.launching.fork_server SOCKET CREATOR MODULE ...

SOCKET listens for shims (fork_shim.py), each of which mpiexec has started in place of a rank; CREATOR is one end of a
pair whose other end the starting process holds. Both are descriptors. A message is one JSON object, never a pickle, and
descriptors travel beside it (SCM_RIGHTS).

    shim -> server    command, environment, folder, umask, surroundings, descriptors
    server -> shim    {"pid": ...} and the rank's pidfd, or {"refused": why}
    server -> shim    {"code": ...}, minus a signal's number if that ended the rank

A fork copies the calling thread alone, so there must be no other, and no MPI yet. The server is the parent of the ranks
and reaps them. A rank is killed when its shim dies (its connection ends), and when the server dies. The server ends
when its creator has ended and no rank is left: until then ranks may still save.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import EXIT_FAILURE
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.launching.fork_shim import MOST_BYTES, surroundings
from ubsmoe_ds.launching.supervisor import end_with_parent

MOST_DESCRIPTORS = 253  # of one message (Linux)
REQUEST_SECONDS = 10.0  # for a shim to send its request after it has connected
# What may differ between the server's environment and a rank's: nothing that is preloaded has read it. For all others
# the rank imports everything itself.
OF_A_RANK = ("PMI_", "PMIX_", "MPI_", "MPIR_", "HYDI_", "HYDRA_", "OMPI_", "OPAL_", "PRTE_", "UBSMOE_DS_")
OF_A_SHELL = ("PWD", "OLDPWD", "SHLVL", "_", "PATH", "GFORTRAN_UNBUFFERED_PRECONNECTED")
OF_AN_ACCELERATOR = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")  # of which this torch knows none


@dataclass
class Rank:
    """A forked process and the shim that stands for it."""

    pid: int
    handle: int  # pidfd
    shim: socket.socket


class Server:
    """Forks a process for every shim that asks.

    Args:
        listening: for shims.
        creator: ends when the creator does.
    """

    def __init__(self, listening: socket.socket, creator: socket.socket) -> None:
        self.listening, self.creator = listening, creator
        self.ranks: list[Rank] = []
        self.surroundings, self.environment = surroundings(), read_at_import(os.environ)
        self.added: dict[str, str] = {}  # variables that the imports have set
        self.spoken = False

    def serve(self) -> list[str] | None:
        """Serve until the creator has ended and no rank is left.

        Returns:
            None in the server; in a forked process, which then is the rank: the command it has to run.
        """
        wanted = True
        while wanted or self.ranks:
            poll = select.poll()
            for descriptor in [self.listening.fileno(), self.creator.fileno()] if wanted else []:
                poll.register(descriptor, select.POLLIN)
            for rank in self.ranks:
                poll.register(rank.handle, select.POLLIN)
                if rank.shim.fileno() >= 0:
                    poll.register(rank.shim.fileno(), select.POLLIN)
            ready = {descriptor for descriptor, _ in poll.poll()}
            for rank in list(self.ranks):
                if rank.handle in ready:
                    self._reap(rank)
                elif rank.shim.fileno() in ready:  # it never speaks again: it has ended
                    kill(rank)
                    rank.shim.close()  # reaped once it has ended, which a stuck file system may delay
            if wanted and self.creator.fileno() in ready:
                wanted = False
                self.listening.close()
            elif wanted and self.listening.fileno() in ready:
                command = self._accept()
                if command is not None:
                    return command
        return None

    def _reap(self, rank: Rank) -> None:
        """Take a rank's exit status and send it to the shim."""
        _, status = os.waitpid(rank.pid, 0)
        with contextlib.suppress(OSError):
            rank.shim.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
        rank.shim.close()
        os.close(rank.handle)
        self.ranks.remove(rank)

    def _accept(self) -> list[str] | None:
        """Take one request. Return the command in the process that is forked for it, None in the server."""
        connection, _ = self.listening.accept()
        connection.settimeout(REQUEST_SECONDS)
        descriptors: list[int] = []
        try:
            content, descriptors, flags, _ = socket.recv_fds(connection, MOST_BYTES, MOST_DESCRIPTORS)
            whole = content and not flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC)
            if whole and not has_ended(connection):
                return self._fork(connection, json.loads(content), descriptors)
        except OSError:  # the shim has died
            pass
        finally:
            for descriptor in descriptors:  # of a rank none: it has made them its own
                os.close(descriptor)
        connection.close()
        return None

    def _fork(self, connection: socket.socket, request: dict[str, Any], descriptors: list[int]) -> list[str] | None:
        """Fork a rank, or refuse to. Return the command in the rank, None in the server."""
        why = self._refusal(request)
        if why:
            self._say(why)
            connection.send(json.dumps({"refused": why}).encode())
            connection.close()
            return None
        server, pid = os.getpid(), os.fork()
        if pid == 0:
            try:
                for each in (self.listening, self.creator, connection, *(rank.shim for rank in self.ranks)):
                    each.detach()  # their numbers will soon mean others
                become(request | {"environment": self.added | request["environment"]}, descriptors, server)
            except BaseException:
                traceback.print_exc()
                os._exit(EXIT_FAILURE)  # it must not go on as a second server
            return request["command"]
        rank = Rank(pid, os.pidfd_open(pid), connection)
        self.ranks.append(rank)
        with contextlib.suppress(OSError):  # the shim has died; the loop sees it
            socket.send_fds(connection, [json.dumps({"pid": pid}).encode()], [rank.handle])
        return None

    def _refusal(self, request: dict[str, Any]) -> str:
        """Return why this rank has to import everything itself; empty if it need not."""
        ours, theirs = self.environment, read_at_import(request["environment"])
        names = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if names:
            return f"environment: {', '.join(names)}"
        same = json.loads(json.dumps(self.surroundings))
        names = [name for name, value in same.items() if request["surroundings"].get(name) != value]
        if names:
            return ", ".join(names)
        python, *words = request["command"]
        if python != sys.executable or request["descriptors"][:3] != [0, 1, 2] or not words_after_options(words):
            return "command"
        return ""

    def _say(self, why: str) -> None:
        """Tell the user once that jobs start the slow way."""
        if not self.spoken:
            say(f"note: ranks import everything themselves, because this differs: {why}", error=True)
            self.spoken = True


def read_at_import(environment: Any) -> dict[str, str]:
    """Return the part of an environment that modules may have read at import, in a comparable form."""
    variables = {
        k: v
        for k, v in environment.items()
        if not k.startswith(OF_A_RANK) and k not in (*OF_A_SHELL, *OF_AN_ACCELERATOR)
    }
    for name in {"PYTHONPATH", "LD_LIBRARY_PATH"} & variables.keys():  # with the same folder twice they mean the same
        variables[name] = os.pathsep.join(dict.fromkeys(variables[name].split(os.pathsep)))
    return variables


def has_ended(connection: socket.socket) -> bool:
    """Return whether the other side is gone already."""
    poll = select.poll()
    poll.register(connection.fileno(), 0)  # hang-ups are always reported
    return bool(poll.poll(0))


def kill(rank: Rank) -> None:
    """End a rank, and what it has started in its session."""
    for end in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            end(rank.pid, signal.SIGKILL)


def become(request: dict[str, Any], descriptors: list[int], server: int) -> None:
    """Make this forked process what the shim was: its session, folder, environment and descriptors.

    Args:
        request: of the shim.
        descriptors: those it has sent, in the order of the request's numbers.
        server: process id of the parent.
    """
    os.setsid()
    end_with_parent(signal.SIGKILL)
    if os.getppid() != server:
        os._exit(128 + signal.SIGKILL)
    base = 1 + max(int(name) for name in os.listdir("/proc/self/fd"))  # noqa: PTH208
    base = max(base, 1 + max(request["descriptors"]))
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, base) for descriptor in descriptors]
    os.closerange(0, base)
    for descriptor, number in zip(high, request["descriptors"], strict=True):
        os.dup2(descriptor, number)
    os.closerange(base, 1 + max(high))
    descriptors.clear()
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environment"])


def words_after_options(words: list[str]) -> list[str]:
    """Return `-m MODULE ...` or `SCRIPT ...` of a command; empty for other forms and for options other than -u."""
    words = words[1:] if words[:1] == ["-u"] else words
    return words if words[:1] == ["-m"] and len(words) > 1 or words and not words[0].startswith("-") else []


def run(command: list[str]) -> None:
    """Run a command of Python in this process, as `python` itself would."""
    words = words_after_options(command[1:])
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def not_ready(ours: set[int]) -> str:
    """Return why this process must not fork ranks after its imports; empty if it may.

    Args:
        ours: descriptors that it knows.
    """
    # BLAS ends its threads before a fork, and starts them again when they are needed: one fork without a purpose
    probe = os.fork()
    if probe == 0:
        os._exit(0)
    os.waitpid(probe, 0)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    if threads > 1:
        return f"{threads} threads"
    if "mpi4py.MPI" in sys.modules:
        return "MPI"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA"
    open_now = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    strange = {number for number in open_now - ours if Path(f"/proc/self/fd/{number}").exists()}
    return f"descriptors {sorted(strange)}" if strange else ""


def main() -> list[str] | None:
    """Import, and serve. Return the command to run in processes that are forked, None in the server."""
    listening, creator = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    server = Server(listening, creator)
    os.environ["DS_ACCELERATOR"] = "cpu"
    before = dict(os.environ)
    for module in sys.argv[3:]:
        importlib.import_module(module)
    server.added = {k: v for k, v in os.environ.items() if k not in before}
    why = not_ready({0, 1, 2, listening.fileno(), creator.fileno()})
    if why:
        say(f"note: ranks import everything themselves: after the imports there are {why}", error=True)
        return None
    gc.freeze()  # the pages of what is imported stay shared
    return server.serve()


if __name__ == "__main__":
    command = main()
    if command is not None:
        run(command)
