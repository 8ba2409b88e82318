"""Note a rank's progress in memory that its watcher and the other processes of its host can read.

The rank writes how far it is (`PROGRESS`) and its stage, others write the two flags behind.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

PROGRESS = struct.Struct("<qqq")  # number of events, number within the stage, 1 if the stage is counted
STAGE_BYTES = 256  # of the stage's name, which follows
STAGE_END = PROGRESS.size + STAGE_BYTES
FLAG = struct.Struct("<q")
WAITS_AT = STAGE_END  # by the watcher: 1 + the number of events if it has found the rank waiting for others, else 0
OTHERS_WAIT_AT = WAITS_AT + FLAG.size  # by the heartbeat: 1 if all ranks of all other hosts wait
RECORD_BYTES = OTHERS_WAIT_AT + FLAG.size


class Peer(NamedTuple):
    """Name a rank of this host, and the descriptor in its process of what it notes."""

    pid: int
    record: int
    description: str


def open_peers(peers: Iterable[Sequence]) -> list[tuple[Peer, int]]:
    """Return each peer with a descriptor of ours of what it notes; raise OSError if one may not be read."""
    found = [Peer(*peer) for peer in peers]
    return [(peer, os.open(f"/proc/{peer.pid}/fd/{peer.record}", os.O_RDONLY | os.O_CLOEXEC)) for peer in found]


def do_all_wait(peers: Sequence[tuple[Peer, int]]) -> bool:
    """Return whether all of these ranks, at least one, were found waiting and have not gone on since."""
    return bool(peers) and all(_waits(os.pread(record, RECORD_BYTES, 0)) for _, record in peers)


def _waits(record: bytes) -> bool:
    events, _, _ = PROGRESS.unpack_from(record)
    return FLAG.unpack_from(record, WAITS_AT) == (1 + events,)


def stage_of(record: bytes) -> str:
    """Return the stage that the rank has noted, such as "round 2, local step 3"."""
    _, number, counted = PROGRESS.unpack_from(record)
    text = record[PROGRESS.size : STAGE_END].partition(b"\0")[0].decode(errors="replace")
    return f"{text} {number}" if counted else text
