"""Hosts fall silent: heartbeats over loopback, with short times."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.ranks import clean_environment
from ubsmoe_ds.mpi.datagram import Seal
from ubsmoe_ds.mpi.heartbeat import BEAT, BEATS, CONTENT, FIRST, LOST, Heartbeat, Host, open_socket

pytestmark = [pytest.mark.extended, pytest.mark.alone]
TOKEN = b"0123456789abcdef"
TIMEOUT = 0.6
SECONDS = 5.0  # for events that must happen; those that must not get several timeouts


class Net:
    """Heartbeats of several hosts in one process, and the lines that each has said about lost hosts."""

    def __init__(self, count: int, addresses: tuple[str, ...] = ("127.0.0.1",), timeout: float = TIMEOUT) -> None:
        sockets = [open_socket() for _ in range(count)]
        self.hosts = [Host(f"host n{n}", addresses, each.getsockname()[1]) for n, each in enumerate(sockets)]
        self.said: list[list[str]] = [[] for _ in range(count)]
        self.ended: set[int] = set()
        self.cut_off: set[int] = set()  # those that ended because they are cut off from the first
        self.waiting: set[int] = set()  # hosts all of whose ranks wait
        self.others_wait = False  # as the first host has heard
        self.beating = {
            n: Heartbeat(
                each,
                n,
                self.hosts,
                TOKEN,
                timeout,
                say=self.said[n].append,
                end=partial(self._end, n),
                waits=partial(self.waiting.__contains__, n),
                note_others=partial(setattr, self, "others_wait"),
            )
            for n, each in enumerate(sockets)
        }

    def _end(self, number: int, cut_off: bool) -> None:
        self.cut_off |= {number} if cut_off else set()
        self.ended.add(number)

    def stop(self, *numbers: int) -> None:
        for number in numbers:
            self.beating.pop(number).close()

    def wait_for(self, *numbers: int) -> None:
        """Wait until these hosts have ended."""
        deadline = time.monotonic() + SECONDS
        while not self.ended >= set(numbers):
            assert time.monotonic() < deadline, (self.ended, self.said)
            time.sleep(0.02)


@pytest.fixture
def net():
    made = []

    def make(*arguments, **named):
        made.append(Net(*arguments, **named))
        time.sleep(TIMEOUT / 2)  # all have been heard from
        return made[-1]

    yield make
    for each in made:
        each.stop(*list(each.beating))


def test_the_silent_host_is_named_once_and_the_others_are_told(net):
    hosts = net(3)
    time.sleep(2 * TIMEOUT)
    assert hosts.said == [[], [], []]
    start = time.monotonic()
    hosts.stop(2)
    hosts.wait_for(0, 1)
    assert time.monotonic() - start > TIMEOUT / 2
    (line,) = hosts.said[0]
    assert line.startswith("error: host n2 has not been heard from for 0.6 s;") and "--resume auto" in line
    assert hosts.said[1:] == [[], []] and not hosts.cut_off


def test_without_the_first_host_each_of_the_others_ends(net):
    """The second host says so first; its launcher, where it still runs, ends the rest before they speak."""
    hosts = net(3)
    hosts.stop(0)
    hosts.wait_for(1)
    assert hosts.said[2] == []
    hosts.wait_for(2)
    assert hosts.cut_off == {1, 2}
    assert all(line.startswith("error: host n0 has not") for said in hosts.said[1:] for line in said)


def test_a_host_without_all_others_names_them(net):
    hosts = net(3)
    hosts.stop(1, 2)
    hosts.wait_for(0)
    assert hosts.said[0][0].startswith("error: host n1 and host n2 have not been heard from")


def test_hosts_that_end_together_lose_nobody(net):
    hosts = net(3)
    for number in (0, 2, 1):
        hosts.stop(number)
        time.sleep(TIMEOUT / BEATS)
    assert hosts.said == [[], [], []] and not hosts.ended


def test_the_first_host_hears_when_all_others_wait(net):
    """With hosts 1 and 2 it is so, with host 2 alone no longer."""
    hosts = net(3)
    for waiting, expected in (({1}, False), ({1, 2}, True), ({2}, False)):
        hosts.waiting.clear()
        hosts.waiting.update(waiting)
        time.sleep(2 * TIMEOUT / BEATS)
        assert hosts.others_wait == expected, waiting


def test_where_no_datagram_passes_there_is_a_warning_and_no_alarm(net):
    hosts = net(3, addresses=("192.0.2.1",))  # an address reserved for documentation; nobody answers
    time.sleep(3 * TIMEOUT)
    assert not hosts.ended
    (line,) = hosts.said[0]
    assert line.startswith("warning: no datagram (UDP) passes between host n0 and host n1, host n2: nothing")
    assert hosts.said[1:] == [[], []]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_address_that_answers_is_used(address, net):
    if ":" in address and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    hosts = net(2, addresses=("192.0.2.1", address))
    assert hosts.beating[1]._reached == {0: hosts.beating[1]._destination(1)}
    time.sleep(2 * TIMEOUT)
    hosts.stop(1)
    hosts.wait_for(0)
    assert not hosts.said[1]


def test_another_address_is_used_when_one_falls_silent_and_the_best_that_answers(net, monkeypatch):
    hosts = net(2, addresses=("127.0.0.1", "127.0.0.2", "127.0.0.3"))
    beating, send, broken = hosts.beating[1], hosts.beating[1]._send, set()
    monkeypatch.setattr(beating, "_send", lambda kind, host, n, place: n in broken or send(kind, host, n, place))
    for falls_silent, best in (({0}, 1), ({1, 2}, 0), ({0, 1}, 2)):
        broken.clear()
        broken.update(falls_silent)
        time.sleep(2 * TIMEOUT)
        assert beating._reached == {0: beating._destination(best)}
    assert hosts.said == [[], []] and not hosts.ended


def test_the_best_address_is_used_though_another_answers_sooner(net, monkeypatch):
    send = Heartbeat._send

    def late(self, kind, host, number, place, to=FIRST):
        seconds = TIMEOUT / BEATS / 2 if kind == BEAT and number == 0 else 0
        threading.Timer(seconds, send, (self, kind, host, number, place, to)).start()

    monkeypatch.setattr(Heartbeat, "_send", late)
    hosts = net(2, addresses=("127.0.0.1", "127.0.0.2"))
    assert hosts.beating[1]._reached == {0: hosts.beating[1]._destination(0)}


def recorded(beating, monkeypatch):
    """Return the list of datagrams that a host seals from now on."""
    sent, seal = [], beating._seal.seal
    monkeypatch.setattr(beating._seal, "seal", lambda *given: sent.append(seal(*given)) or sent[-1])
    return sent


def test_strangers_count_for_nothing(net, monkeypatch):
    """Neither copies of its own beats, nor those of another job, cut short or in clear keep a host alive."""
    hosts = net(2)
    stranger = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    places = [("127.0.0.1", host.port) for host in hosts.hosts]
    copies = recorded(hosts.beating[1], monkeypatch)
    time.sleep(TIMEOUT / 2)
    hosts.stop(1)
    assert copies
    beat = CONTENT.pack(BEAT, 1, 0, False)
    other_job = Seal(TOKEN[::-1], 1, CONTENT.size)
    deadline = time.monotonic() + SECONDS
    with stranger:
        while not hosts.ended:
            assert time.monotonic() < deadline
            for content in (*copies, copies[0][:-1], other_job.seal(FIRST, beat), TOKEN + beat):
                stranger.sendto(content, places[0])
            time.sleep(0.02)


def test_no_copy_and_no_flood_ends_the_job(net, monkeypatch):
    """Of three hosts one is told of a loss; the datagram that told it is sent to the other, among many of no sense."""
    hosts = net(3)
    copies = recorded(hosts.beating[0], monkeypatch)
    hosts.beating[0]._send(LOST, 1, 0, hosts.beating[0]._reached[1], to=1)
    hosts.wait_for(1)
    lost = [copy for copy in copies if CONTENT.pack(LOST, 1, 0, False) in copy]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        for _ in range(2000):
            for content in (*lost, b"x" * len(lost[0])):
                stranger.sendto(content, ("127.0.0.1", hosts.hosts[2].port))
    time.sleep(TIMEOUT / 3)
    assert hosts.ended == {1}


SUSPENDED = """
import time
from tests.cluster.test_heartbeat import Net
net = Net(2)
time.sleep(0.5)
print("beating", flush=True)
input()
time.sleep(1.5)
print(net.said, net.ended)
"""


def test_a_job_that_was_suspended_goes_on():
    job = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED],
        env=clean_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stdout.readline() == "beating\n"
    os.kill(job.pid, signal.SIGSTOP)
    time.sleep(4 * TIMEOUT)
    os.kill(job.pid, signal.SIGCONT)
    assert job.communicate("\n", timeout=20)[0] == "[[], []] set()\n"
