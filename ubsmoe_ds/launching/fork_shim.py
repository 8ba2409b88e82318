"""Stand in for a rank that a warmed process forks (fork_server.py): mpiexec starts this in its place.

    python -I -S fork_shim.py SOCKET python -u -m mpi4py SCRIPT ...

The shim hands its descriptors, environment and folder to the server, which forks a process that takes them over and
runs the command. To mpiexec the shim then is that process: it passes signals on, and it ends with the same exit code or
by the same signal. Where the server is gone or refuses, the shim becomes the command itself, and only time is lost.

It imports nothing but the standard library, and starts in 20 ms.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

MOST_BYTES = 2**20  # of a request; a larger environment is not handed over
NAMESPACES = Path("/proc/self/ns")
PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT")
HELD_BACK = [getattr(signal, name) for name in PASSED_ON]


def surroundings() -> dict[str, Any]:
    """Return what a process inherits and a server cannot hand over; it must be the same on both sides."""
    return {
        "namespaces": sorted(str(path.readlink()) for path in NAMESPACES.iterdir()),
        "control groups": Path("/proc/self/cgroup").read_text(encoding="utf-8"),
        "limits": {
            name: resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")
        },
        "cores": sorted(os.sched_getaffinity(0)),
        "users": [os.getresuid(), os.getresgid(), sorted(os.getgroups())],
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
    }


def inherited() -> list[int]:
    """Return the descriptors that this process was started with."""
    descriptors = []
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  # pathlib's own would be among them in some versions
        with contextlib.suppress(OSError):  # that of the listing
            if os.get_inheritable(int(name)):
                descriptors.append(int(name))
    return sorted(descriptors)


def main(path: str, command: list[str]) -> NoReturn:
    """Ask the server for a process, and end as it does."""
    descriptors = inherited()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    umask = os.umask(0o077)
    os.umask(umask)
    request = {
        "command": command,
        "environment": dict(os.environ),
        "folder": os.getcwd(),  # noqa: PTH109
        "umask": umask,
        "surroundings": surroundings(),
        "descriptors": descriptors,
    }
    # once the rank is there, a signal is for it: none may come before they are passed on
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MOST_BYTES)
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
        _, handles, _, _ = socket.recv_fds(connection, MOST_BYTES, 1)
    except OSError:
        handles = []
    if not handles:
        connection.close()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
        os.execv(command[0], command)  # noqa: S606
    for descriptor in descriptors[3:]:
        os.close(descriptor)  # the process manager must see when the rank closes its own
    stand_in(connection, handles[0])


def stand_in(connection: socket.socket, rank: int) -> NoReturn:
    """Pass signals on until the rank has ended, then end like it.

    Args:
        connection: to the server, which sends how it ended.
        rank: its pidfd.
    """

    def pass_on(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(rank, number)

    for name in PASSED_ON:
        signal.signal(getattr(signal, name), pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD_BACK)
    try:
        answer = connection.recv(MOST_BYTES)
    except OSError:
        answer = b""
    code = json.loads(answer)["code"] if answer else -signal.SIGKILL  # with its server a rank is killed
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has left its own
    with contextlib.suppress(OSError):  # SIGKILL has no handler
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
    os._exit(128 - code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
