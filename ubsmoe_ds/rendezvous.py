"""Where the ranks of a client meet: an address of its first rank that all others have reached, and a free port there.

A host has several addresses, and not all lead to it from elsewhere: a name may stand for the loopback address in
/etc/hosts, and containers give every host the same bridge. So addresses are tried, not guessed.
"""

import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from typing import Any, NamedTuple

import numpy as np
import psutil

from ubsmoe_ds.errors import UserError

LOOPBACK = "127.0.0.1"
TRY_SECONDS = 3.0  # to reach an address
MOST_ADDRESSES = 32
MESSAGE_BYTES = 4096
INTERFACES = "GLOO_SOCKET_IFNAME"  # of gloo: names with commas between


class Meeting(NamedTuple):
    """For MASTER_ADDR and MASTER_PORT; and the interface of this rank's host that leads there, "" if none is known."""

    address: str
    port: int
    interface: str


def meet(client_comm: Any, everybody: Any, one_host: bool) -> Meeting:
    """Agree on a meeting place (a collective over the client, and over the job).

    Args:
        client_comm: communicator of the client.
        everybody: of the job. Ports are held until all clients have theirs, so that they differ on a host.
        one_host: whether the client is on one host; then it meets on the loopback interface.

    Raises:
        UserError: if no address of the first rank is reached by all others.
    """
    with closing(_Listener()) if client_comm.rank == 0 else nullcontext() as listener:
        offer = None if listener is None else (listener.port, listener.token, _addresses(one_host))
        port, token, addresses = _broadcast(client_comm, offer)
        with ThreadPoolExecutor(max_workers=MOST_ADDRESSES) as pool:
            tried = list(pool.map(lambda address: _reach(address, port, token), addresses))
        reached = _by_all(client_comm, [interface is not None for interface in tried])
        everybody.Barrier()
    if not any(reached):
        raise UserError(
            f"rendezvous: no address of the client's first host ({', '.join(addresses) or 'it has none'}) is reached "
            f"from all its hosts; open the network between them, or set {INTERFACES} to the interface that joins them"
        )
    chosen = reached.index(True)
    return Meeting(addresses[chosen], port, tried[chosen] or "")


class _Listener:
    """Holds a free port on all interfaces and answers whoever comes with a token, which tells it from other hosts."""

    def __init__(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        self.server = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        self.port, self.token = int(self.server.getsockname()[1]), secrets.token_hex(8)
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
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


def _reach(address: str, port: int, token: str) -> str | None:
    """The interface through which the listener is reached at an address; None if it is not."""
    try:
        with socket.create_connection((address, port), timeout=TRY_SECONDS) as connection:
            if connection.recv(len(token), socket.MSG_WAITALL) != token.encode():
                return None
            return interface_of(connection.getsockname()[0])
    except OSError:
        return None


def _addresses(one_host: bool) -> list[str]:
    """Those of this host that may be reached: of interfaces that are up, in the order of the system; IPv4 first."""
    if one_host:
        return [LOOPBACK]
    asked = [name for name in os.environ.get(INTERFACES, "").split(",") if name]
    found = [(family, address) for name, family, address in all_addresses() if not asked or name in asked]
    return [address for _, address in sorted(found, key=lambda pair: pair[0] != socket.AF_INET)][:MOST_ADDRESSES]


def all_addresses() -> Iterator[tuple[str, int, str]]:
    """(interface, family, address) of this host, but those that lead nowhere else."""
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            ours = entry.family in (socket.AF_INET, socket.AF_INET6)
            local = entry.address.startswith(("127.", "::1", "fe80:", "169.254."))
            if ours and not local and name in states and states[name].isup:
                yield name, entry.family, entry.address


def interface_of(address: str) -> str:
    """Name of this host's interface that has the address; "" if none has."""
    plain = address.removeprefix("::ffff:")
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == plain for entry in addresses):
            return name
    return ""


def _broadcast(comm: Any, offer: tuple[int, str, list[str]] | None) -> tuple[int, str, list[str]]:
    message = np.zeros(MESSAGE_BYTES, dtype=np.uint8)
    if offer is not None:
        text = json.dumps(offer).encode()
        message[: len(text)] = np.frombuffer(text, dtype=np.uint8)
    comm.Bcast(message, root=0)
    port, token, addresses = json.loads(message.tobytes().rstrip(b"\0"))
    return port, token, addresses


def _by_all(comm: Any, mine: Sequence[bool]) -> list[bool]:
    """What is true on every rank of a communicator."""
    given = np.array(mine, dtype=np.uint8)
    found = np.empty((comm.size, len(given)), dtype=np.uint8)
    comm.Allgather(given, found)
    return [bool(column.all()) for column in found.T]
