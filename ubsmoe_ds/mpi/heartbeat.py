"""Notice that a host of the job is lost: small datagrams over sockets of our own, in a thread. No MPI here.

MPI and gloo over TCP wait for ever for a host whose cable is cut, and ranks may rightly wait long for slower ones. So
one process per host sends a datagram to the first host every few seconds and gets an answer. A host that is silent for
too long is lost; the first host then tells the others, and each ends its own ranks (watchdog.py). Datagrams are sealed
(datagram.py): nobody else can keep a dead host alive, or end the job, with datagrams of his own or with copies.
"""

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ubsmoe_ds.mpi.datagram import Seal

BEATS = 6  # within the timeout; single datagrams may be lost too
SEARCH = 1 / 2  # part of the timeout without an answer after which other addresses are tried
LONGEST_INTERVAL = 5.0  # seconds between two beats
CONTENT = struct.Struct("!BHB?")  # kind, host in question, number of the address it was sent to, do its ranks wait
BEAT, ANSWER, LOST = range(3)
REPEATS = 3  # of a datagram that nobody answers
HEARD_SECONDS = 1.0  # for launchers to pass on the message, before anybody ends
TOLD_SECONDS = 0.3  # for the other hosts to end first
FIRST = 0  # the host that all others talk to
TOLD_OF_LOSS, CLOSED = "told of loss", "closed"  # why the thread ends, other than by silence


class Host(NamedTuple):
    """A host of the job; all hosts have the same list."""

    description: str  # name, clients and ranks, for messages
    addresses: tuple[str, ...]  # under which it may be reached, the best first
    port: int


def open_socket() -> socket.socket:
    """Return a socket for `Heartbeat`, on a free port of all interfaces."""
    both = socket.has_dualstack_ipv6()
    opened = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_DGRAM)
    if both:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    opened.bind(("", 0))
    opened.setblocking(False)
    return opened


class Heartbeat:
    """Watches the other hosts from now until `close`, in a thread of its own that sleeps nearly always.

    A host counts only once it has been heard from: where a firewall lets no datagrams pass there is a warning and no
    alarm. Of the first host's addresses the best that answers is used; when it falls silent all are tried again.

    Args:
        own_socket: from `open_socket`, bound to this host's port in the list.
        me: this host's position in the list.
        hosts: all hosts of the job.
        token: 16 secret bytes of this job, with which its datagrams are sealed.
        timeout_seconds: silence after which a host is lost.
        say: called in the thread with a line for the user.
        end: called in the thread, last, when a host is lost; its argument is whether this host is cut off from the
            first.
        waits: called in the thread; returns whether all ranks of this host wait for others.
        note_others: called in the first host's thread with whether all ranks of all other hosts wait.
    """

    def __init__(
        self,
        own_socket: socket.socket,
        me: int,
        hosts: Sequence[Host],
        token: bytes,
        timeout_seconds: float,
        say: Callable[[str], None],
        end: Callable[[bool], None],
        waits: Callable[[], bool],
        note_others: Callable[[bool], None],
    ) -> None:
        self._socket, self._me, self._hosts = own_socket, me, hosts
        self._seal = Seal(token, me, CONTENT.size)
        self._seal.guard(own_socket)
        self._timeout, self._say, self._end = timeout_seconds, say, end
        self._waits, self._note_others = waits, note_others
        self._waiting: set[int] = set()  # hosts all of whose ranks wait
        self._interval = min(timeout_seconds / BEATS, LONGEST_INTERVAL)
        # when the first host is silent the second one reports it, so the others wait a little longer
        self._patience = timeout_seconds + (2 * max(self._interval, HEARD_SECONDS) if me > 1 else 0)
        watched = range(1, len(hosts)) if me == FIRST else (FIRST,)
        self._silence = dict.fromkeys(watched, 0.0)  # seconds since a host was heard from
        self._reached: dict[int, tuple] = {}  # address and port under which a host has been heard from
        self._best: int | None = None  # number of the first host's address in use
        self._closing, self._close = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching. All hosts of the job close together, within less than the timeout."""
        self._close.send(b"\0")
        self._thread.join()
        for each in (self._socket, self._closing, self._close):
            each.close()

    def _run(self) -> None:
        """Send a beat, listen until the next is due, and end if a host is silent for too long."""
        warn_at = time.monotonic() + self._timeout
        while True:
            if self._me != FIRST:
                self._beat()
            started = time.monotonic()
            reason = self._listen(started + self._interval)
            if reason == CLOSED:
                return
            if reason == TOLD_OF_LOSS:
                self._end(False)
                return
            # count at most two intervals: a process that was suspended has heard nothing because it did not listen
            passed = min(time.monotonic() - started, 2 * self._interval)
            for host in self._silence:
                self._silence[host] += passed
            if any(self._silence[host] > self._patience for host in self._reached):
                self._tell_of_silent()
                self._end(self._me != FIRST)
                return
            if time.monotonic() > warn_at:
                self._warn()
                warn_at = float("inf")

    def _listen(self, until: float) -> str | None:
        """Read datagrams until then; return why the thread ends, or None."""
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([self._socket, self._closing], [], [], left)
            if self._closing in ready:
                return CLOSED
            if ready and self._read():
                return TOLD_OF_LOSS
        return None

    def _read(self) -> bool:
        """Take one datagram; return whether it says that a host is lost."""
        try:
            datagram, place = self._socket.recvfrom(self._seal.size + 1)
        except OSError:  # the system reports here that an earlier one could not be delivered
            return False
        opened = self._seal.open(datagram)
        if opened is None:
            return False
        sender, (kind, host, address, waits) = opened[0], CONTENT.unpack(opened[1])
        first = self._hosts[FIRST]
        if self._me == FIRST and kind == BEAT and host == sender and host in self._silence:
            self._silence[host], self._reached[host] = 0.0, place
            self._waiting = self._waiting | {host} if waits else self._waiting - {host}
            self._note_others(len(self._waiting) == len(self._silence))
            self._send(ANSWER, host, address, place, to=host)
        elif self._me != FIRST and sender != FIRST:
            return False
        elif self._me != FIRST and kind == ANSWER and address < len(first.addresses):
            if self._best is None or address < self._best or self._searches():
                self._best, self._reached[FIRST] = address, self._destination(address)
            self._silence[FIRST] = 0.0
        return self._me != FIRST and kind == LOST

    def _beat(self) -> None:
        """Send a beat to the address that answers, or to each while none does."""
        for number in range(len(self._hosts[FIRST].addresses)):
            if number == self._best or self._searches():
                self._send(BEAT, self._me, number, self._destination(number))

    def _searches(self) -> bool:
        """Return whether no address of the first host answers, yet or any longer."""
        return self._best is None or self._silence[FIRST] > self._timeout * SEARCH

    def _destination(self, number: int) -> tuple[str, int]:
        """Return an address of the first host as our socket takes it."""
        address, port = self._hosts[FIRST].addresses[number], self._hosts[FIRST].port
        mapped = self._socket.family == socket.AF_INET6 and ":" not in address
        return (f"::ffff:{address}" if mapped else address, port)

    def _tell_of_silent(self) -> None:
        """Say which hosts are lost; the first host then tells the others."""
        # hosts lost by the same cut may have been heard from a beat or two later
        silent = sorted(host for host in self._reached if self._silence[host] > self._timeout / 2)
        names = " and ".join(self._hosts[host].description for host in silent)
        self._say(
            f"error: {names} {'has' if len(silent) == 1 else 'have'} not been heard from for {self._timeout:g} s; the "
            "network or the host is down, or its first rank is stopped; continue with --resume auto"
        )
        time.sleep(min(HEARD_SECONDS, self._timeout / 2))  # nobody gets an answer meanwhile
        remaining = set(self._reached) - set(silent) if self._me == FIRST else ()
        for host in remaining:
            for _ in range(REPEATS):
                self._send(LOST, silent[0], 0, self._reached[host], to=host)
        if remaining:
            time.sleep(TOLD_SECONDS)

    def _warn(self) -> None:
        """Warn of hosts that have never been heard from; the first host does it for all."""
        silent = sorted(set(self._silence) - set(self._reached))
        if silent and self._me == FIRST:
            self._say(
                f"warning: no datagram (UDP) passes between {self._hosts[FIRST].description} and "
                f"{', '.join(self._hosts[host].description for host in silent)}: nothing will notice if that network "
                "breaks"
            )

    def _send(self, kind: int, host: int, address: int, destination: tuple, to: int = FIRST) -> None:
        """Send one datagram.

        Args:
            kind: BEAT, ANSWER or LOST.
            host: position in the list of the host that it is about.
            address: number of the first host's address that a beat is sent to, and its answer comes from.
            destination: address and port.
            to: position of the host that it is for.
        """
        with contextlib.suppress(OSError):  # no route, or a full buffer: as if it were lost on the way
            waits = kind == BEAT and self._waits()
            self._socket.sendto(self._seal.seal(to, CONTENT.pack(kind, host, address, waits)), destination)
