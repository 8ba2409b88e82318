"""Read a hostfile: which hosts a job may use, and how many ranks each has room for. No MPI, no torch."""

import ipaddress
import re
from pathlib import Path

from ubsmoe_ds.base.errors import UserError

# a name becomes part of a command of mpiexec and ssh: it can be no option and hold no separator
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
LINE = re.compile(r"(?P<host>\S+?)(?:\s*:\s*(?P<count>\d+))?(?P<words>(?:\s+[\w-]+\s*=\s*\S+)*)")
WORD = re.compile(r"([\w-]+)\s*=\s*(\S+)")
MOST_SLOTS = 1_000_000
FORMS = "write `host slots=N`, `host:N`, or the name once for each rank"


def read_hostfile(path: Path) -> dict[str, int]:
    """Read the number of slots of each host, in the file's order.

    A line is `host slots=N` (DeepSpeed, Open MPI; `max_slots=` may follow, and has no effect, because no host gets more
    ranks than slots), `host:N` (MPICH), or a name alone, which stands for one slot each time (PBS). # begins a comment.

    Raises:
        UserError: for a file that cannot be read or is malformed, naming file, line and reason.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: {path} cannot be read ({error}); check the path") from error
    slots: dict[str, int] = {}
    repeated: set[str] = set()  # hosts whose names stand alone
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            host, count = _read_line(text)
            if host in slots and not (count is None and host in repeated):
                raise ValueError(f"{host!r} stands there twice; give it one line")
        except ValueError as error:
            raise UserError(f"--hostfile: {path}, line {number}: {error}") from error
        if count is None:
            repeated.add(host)
        slots[host] = slots.get(host, 0) + (1 if count is None else count)
    if not slots:
        raise UserError(f"--hostfile: {path} names no host; {FORMS}")
    return slots


def _read_line(text: str) -> tuple[str, int | None]:
    """Return a line's host and number of slots, None for a name alone.

    Raises:
        ValueError: with the reason.
    """
    if _is_ipv6(text.split()[0]):
        raise ValueError(f"{text!r} is an address of IPv6, which mpiexec cannot tell from host:N; write a name for it")
    match = LINE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no line of a hostfile; {FORMS}")
    host, words = match["host"], WORD.findall(match["words"])
    if "@" in host:
        raise ValueError(f"{host!r} names a user, which mpiexec does not take; put `User` into ~/.ssh/config")
    if not NAME.fullmatch(host):
        raise ValueError(f"{host!r} is no name of a host (letters, digits, dots, hyphens); correct it")
    for key, _ in words:
        if key not in {"slots", "max_slots", "max-slots"}:
            raise ValueError(f"{key}= has no effect here; remove it (ports and users: ~/.ssh/config)")
    counts = [value for key, value in words if key == "slots"] + ([match["count"]] if match["count"] else [])
    if len(counts) > 1 or (words and not counts):
        raise ValueError(f"{text!r} needs slots= once; {FORMS}")
    if not counts:
        return host, None
    count = counts[0]
    if not (count.isascii() and count.isdecimal() and len(count) < 9 and 1 <= int(count) <= MOST_SLOTS):
        raise ValueError(f"slots={count[:20]} must be a whole number from 1 to {MOST_SLOTS}")
    return host, int(count)


def _is_ipv6(text: str) -> bool:
    """Return whether a word is an address of IPv6, with or without brackets and a number of slots."""
    for address in (text, text.rpartition(":")[0]):
        try:
            return ipaddress.ip_address(address.strip("[]")).version == 6
        except ValueError:
            continue
    return False
