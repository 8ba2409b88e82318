"""Datagrams of the heartbeat: made by hosts of the job alone, each accepted once, by the host that it is for."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ubsmoe_ds.mpi.datagram import MAC_BYTES, WINDOW, Seal

KEY = b"0123456789abcdef"
CONTENT = st.binary(min_size=4, max_size=4)
HOSTS = st.integers(0, 2**16 - 1)


@given(contents=st.lists(CONTENT, min_size=1), sender=HOSTS, receiver=HOSTS)
def test_a_host_opens_what_is_sealed_for_it(contents, sender, receiver):
    sealing, opening = Seal(KEY, sender, 4), Seal(KEY, receiver, 4)
    for content in contents:
        datagram = sealing.seal(receiver, content)
        assert len(datagram) == opening.size
        assert opening.open(datagram) == (sender, content)
        assert opening.open(datagram) is None, "a replay"


@given(content=CONTENT, place=st.integers(0, 39), bit=st.integers(0, 7))
def test_a_datagram_with_any_bit_changed_is_refused_and_the_right_one_still_opens(content, place, bit):
    sealing, opening = Seal(KEY, 1, 4), Seal(KEY, 0, 4)
    datagram = sealing.seal(0, content)
    changed = bytearray(datagram)
    changed[place] ^= 1 << bit
    assert len(datagram) == 40 and opening.open(bytes(changed)) is None
    assert opening.open(datagram) == (1, content)


@given(datagram=st.binary(max_size=80))
def test_nothing_else_is_opened(datagram):
    assert Seal(KEY, 0, 4).open(datagram) is None


def test_other_receivers_and_other_jobs_refuse_it():
    datagram = Seal(KEY, 1, 4).seal(0, b"beat")
    assert Seal(KEY, 2, 4).open(datagram) is None
    assert Seal(KEY[::-1], 0, 4).open(datagram) is None
    assert KEY not in datagram and Seal(KEY, 1, 4).open(datagram) is None, "nor does its sender"


@given(order=st.lists(st.integers(0, 2 * WINDOW), max_size=60))
def test_each_is_accepted_once_unless_it_is_overtaken_by_a_window(order):
    """The plain rule: remember all that came, and the highest."""
    sealing, opening = Seal(KEY, 1, 4), Seal(KEY, 0, 4)
    datagrams = [sealing.seal(0, b"beat") for _ in range(2 * WINDOW + 1)]
    came: set[int] = set()
    for number in order:
        is_new = number not in came and number > max(came, default=-1) - WINDOW
        assert (opening.open(datagrams[number]) is not None) == is_new
        came |= {number} if is_new else set()


def test_counters_of_senders_are_apart():
    opening = Seal(KEY, 0, 4)
    first, second = (Seal(KEY, sender, 4) for sender in (1, 2))
    for _ in range(2 * WINDOW):
        first.seal(0, b"beat")
    assert opening.open(first.seal(0, b"beat")) and opening.open(second.seal(0, b"beat"))


@pytest.mark.parametrize("family, address", [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_the_kernel_drops_what_has_another_size_or_mark(family, address):
    seal, other = Seal(KEY, 0, 4), Seal(KEY[::-1], 0, 4)
    with socket.socket(family, socket.SOCK_DGRAM) as receiving, socket.socket(family, socket.SOCK_DGRAM) as sending:
        try:
            receiving.bind((address, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        seal.guard(receiving)
        receiving.settimeout(5)
        right = seal.seal(0, b"beat")
        forged = right[:-MAC_BYTES] + bytes(MAC_BYTES)  # the kernel does not know the key
        for datagram in (b"", other.seal(0, b"beat"), right[:-1], right + b"\0", bytes(len(right)), forged, right):
            sending.sendto(datagram, receiving.getsockname())
        assert [receiving.recv(100) for _ in range(2)] == [forged, right]
