"""Choose where the ranks of a group meet: an address of its first rank that all others have reached, and a free port.

A host has several addresses, and not all lead to it from elsewhere: a name may resolve to the loopback address in
/etc/hosts, and containers give every host the same bridge. So addresses are tried, not guessed.
"""

import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.mpi.collectives import gather_json

LOOPBACK = "127.0.0.1"
TRY_SECONDS = 3.0  # limit for reaching an address
MOST_ADDRESSES = 32
PORT_TRIES = 100
FIRST_PORT, SYSTEM_PORTS = 16384, 32768  # by default the system hands out no port between them
INTERFACES = "GLOO_SOCKET_IFNAME"  # gloo's variable: names of interfaces, separated by commas


class Meeting(NamedTuple):
    """A meeting place of a group, as one of its ranks sees it."""

    address: str  # MASTER_ADDR
    port: int  # MASTER_PORT
    interface: str  # of this rank's host, that leads there; "" if it is unknown


def meet(group_comm: Any, job_comm: Any, one_host: bool) -> Meeting:
    """Agree on a meeting place of a group (a collective over the job).

    Args:
        group_comm: communicator of the group.
        job_comm: communicator of the job. Ports are held until all groups have theirs, so that they differ on a host.
        one_host: whether the group is on one host; then it meets on the loopback interface. A group of one rank has
            nobody to meet, and no port.

    Raises:
        UserError: on every rank of the job, if no address of some group's first rank is reached by all its others.
    """
    alone = group_comm.size == 1 and one_host
    with closing(_Listener(one_host)) if group_comm.rank == 0 and not alone else nullcontext() as listener:
        offer = None if listener is None else (listener.port, listener.token, _addresses(one_host))
        port, token, addresses = (0, "", [LOOPBACK]) if alone else gather_json(group_comm, offer)[0]
        with ThreadPoolExecutor(max_workers=MOST_ADDRESSES) as pool:
            reach = interface_of if alone else partial(_reach, port=port, token=token)
            tried = list(pool.map(reach, addresses))
        answers = gather_json(group_comm, [interface is not None for interface in tried])
        reached = np.array(answers, dtype=bool).all(axis=0)
        problem = "" if reached.any() else ", ".join(addresses) or "it has none"
        problems = [each for each in gather_json(job_comm, problem) if each]
    if problems:
        raise UserError(
            f"rendezvous: no address of the client's first host ({problems[0]}) is reached from all its hosts; open "
            f"the network between them, or set {INTERFACES} to the interface that joins them"
        )
    chosen = int(reached.argmax())
    return Meeting(addresses[chosen], port, tried[chosen] or "")


class _Listener:
    """Holds a free port and answers each connection with a token, which tells it from other hosts.

    It listens on the loopback interface for a group on one host, else on all, to find out which the others reach. The
    store that torch opens there later listens on the chosen address alone (client/deepspeed_setup.py). The system gives
    this port to no outgoing connection: torch takes it again only after rows have been read.
    """

    def __init__(self, one_host: bool) -> None:
        both = socket.has_dualstack_ipv6() and not one_host
        listen = partial(
            socket.create_server,
            family=socket.AF_INET6 if both else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=both,
        )
        self.server = _on_free_port(lambda place: listen((LOOPBACK if one_host else place[0], place[1])))
        self.port, self.token = int(self.server.getsockname()[1]), secrets.token_hex(8)
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        """Send the token to each connection until the server is closed."""
        while True:
            try:
                connection, _ = self.server.accept()
                with connection:
                    connection.sendall(self.token.encode())
            except OSError:
                if self.server.fileno() < 0:
                    return

    def close(self) -> None:
        """Free the port."""
        self.server.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self.server.close()


def _on_free_port(listen: Callable[[tuple[str, int]], socket.socket]) -> socket.socket:
    """Return a server on a random port below the system's range; on any free port if all those tried are taken."""
    for _ in range(PORT_TRIES):
        with suppress(OSError):
            return listen(("", secrets.choice(range(FIRST_PORT, _first_system_port()))))
    return listen(("", 0))


def _first_system_port() -> int:
    """Return the first port that the system gives to outgoing connections."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = SYSTEM_PORTS
    return max(first, FIRST_PORT + 1)


def _reach(address: str, port: int, token: str) -> str | None:
    """Return this host's interface through which the listener is reached at an address; None if it is not reached."""
    try:
        with socket.create_connection((address, port), timeout=TRY_SECONDS) as connection:
            if connection.recv(len(token), socket.MSG_WAITALL) != token.encode():
                return None
            return interface_of(connection.getsockname()[0])
    except OSError:
        return None


def _addresses(one_host: bool) -> list[str]:
    """Return addresses under which this host may be reached: IPv4 first, else in the order of the system."""
    if one_host:
        return [LOOPBACK]
    asked = [name for name in os.environ.get(INTERFACES, "").split(",") if name]
    candidates = [(family, address) for name, family, address in all_addresses() if not asked or name in asked]
    return [address for _, address in sorted(candidates, key=lambda pair: pair[0] != socket.AF_INET)][:MOST_ADDRESSES]


def all_addresses() -> Iterator[tuple[str, int, str]]:
    """Yield (interface, family, address) of this host's interfaces that are up; leave out loopback and link-local."""
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            ours = entry.family in (socket.AF_INET, socket.AF_INET6)
            local = entry.address.startswith(("127.", "::1", "fe80:", "169.254."))
            if ours and not local and name in states and states[name].isup:
                yield name, entry.family, entry.address


def interface_of(address: str) -> str:
    """Return the name of this host's interface that has the address; "" if none has."""
    plain = address.removeprefix("::ffff:")
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == plain for entry in addresses):
            return name
    return ""
