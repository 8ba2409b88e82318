"""Datagrams that only the hosts of a job can make: of constant size, authenticated, each accepted once.

A datagram is a mark of the job, sender, receiver, a counter of the sender, the content, and an HMAC-SHA256 of all that
(RFC 2104, cut to 16 bytes as RFC 2104 allows). Replays are told by the counter with a sliding window, as in RFC 4303.
The mark is no secret: with it the kernel drops what is not of this job before this process wakes up.
"""

import contextlib
import ctypes
import hmac
import itertools
import socket
import struct
from hashlib import sha256

HEAD = struct.Struct("!8sHHQ")  # mark, sender, receiver, counter
MAC_BYTES = 16
WINDOW = 64  # datagrams of a sender that may overtake each other
SO_ATTACH_FILTER = 26  # of Linux
UDP_HEADER = 8  # bytes before a datagram's own
# classic BPF: load the length, load a word, compare, return
LOAD_LENGTH, LOAD_WORD, EQUAL, RETURN = 0x80, 0x20, 0x15, 0x06


class Seal:
    """Seal datagrams of one host, and open those of the others. `seal` may be called in several threads.

    Args:
        key: at least 16 secret bytes that all hosts of the job have, and of this job alone.
        me: number of this host.
        content_bytes: size of every content.
    """

    def __init__(self, key: bytes, me: int, content_bytes: int) -> None:
        self._key, self._me = key, me
        self._mark = hmac.digest(key, b"mark", sha256)[:8]
        self.size = HEAD.size + content_bytes + MAC_BYTES
        self._counter = itertools.count(1)
        self._seen: dict[int, tuple[int, int]] = {}  # sender: (highest counter, bit n: highest - n was accepted)

    def seal(self, receiver: int, content: bytes) -> bytes:
        """Return a new datagram for a host."""
        body = HEAD.pack(self._mark, self._me, receiver, next(self._counter)) + content
        return body + self._mac(body)

    def open(self, datagram: bytes) -> tuple[int, bytes] | None:
        """Return (sender, content); None for what is not for this host, not made with the key, or not new."""
        if len(datagram) != self.size:
            return None
        body, mac = datagram[:-MAC_BYTES], datagram[-MAC_BYTES:]
        mark, sender, receiver, counter = HEAD.unpack_from(body)
        if mark != self._mark or receiver != self._me:
            return None
        highest, accepted = self._seen.get(sender, (0, 0))
        if counter <= highest and (highest - counter >= WINDOW or accepted >> (highest - counter) & 1):
            return None  # before the MAC, which costs more
        if not hmac.compare_digest(mac, self._mac(body)):
            return None
        if counter > highest:
            accepted = accepted << min(counter - highest, WINDOW) & (1 << WINDOW) - 1
            highest = counter
        self._seen[sender] = highest, accepted | 1 << (highest - counter)
        return sender, body[HEAD.size :]

    def guard(self, own_socket: socket.socket) -> None:
        """Have the kernel drop datagrams of another size or mark; where it cannot, `open` does it alone."""
        words = [int.from_bytes(self._mark[start : start + 4], "big") for start in (0, 4)]
        program = [
            (LOAD_LENGTH, 0, 0, 0),
            (EQUAL, 0, 5, UDP_HEADER + self.size),  # else 5 steps on, to the last
            (LOAD_WORD, 0, 0, UDP_HEADER),
            (EQUAL, 0, 3, words[0]),
            (LOAD_WORD, 0, 0, UDP_HEADER + 4),
            (EQUAL, 0, 1, words[1]),
            (RETURN, 0, 0, 0xFFFFFFFF),
            (RETURN, 0, 0, 0),
        ]
        steps = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
        with contextlib.suppress(OSError):
            own_socket.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(steps))
            )

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, sha256)[:MAC_BYTES]
