"""Surfaces of a job's start: hostfile, launchers' variables, datagrams of hosts, owners of folders, the site's key."""

import fcntl
from pathlib import Path

import pytest
from hypothesis import strategies as st

from tests.soak.fuzz_cases import TEXTS, Surface, Violation, accepts, reads_only
from ubsmoe_ds.data import site_key
from ubsmoe_ds.launching import left_over, ownership
from ubsmoe_ds.launching.hostfile import NAME, read_hostfile
from ubsmoe_ds.mpi.datagram import Seal

WORDS = st.one_of(
    st.sampled_from(
        ["n1", "n2", "slots=4", "max_slots=8", "slots = 2", ":4", "#", "-x", "user@n1", "::1", "[::1]:4", "\ufeff"]
    ),
    st.sampled_from(
        ["slots=" + "9" * 5000, "slots=0", "slots=-1", "slots=٣", "n1,n2", "$(id)", "\x00", "\x1b[2J", "x" * 300]
    ),
    TEXTS,
)
LINES = st.lists(WORDS, max_size=4).map(" ".join)


def check_hostfile(lines: list[str], folder: Path) -> bool:
    """Read it; what is accepted can be no option of a command, and has slots."""
    path = folder / "hosts"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    read: list[dict[str, int]] = []
    if not reads_only(lambda: read.append(read_hostfile(path)), folder, ["--hostfile"]):
        return False
    if not all(NAME.fullmatch(host) and slots > 0 for host, slots in read[0].items()):
        raise Violation(f"accepted: {read[0]}")
    return True


MANAGER = [
    "PMI_FD",
    "PMI_RANK",
    "PMI_SIZE",
    "PMIX_RANK",
    "PMIX_SERVER_URI3",
    "PMIX_SERVER_TMPDIR",
    "OMPI_COMM_WORLD_RANK",
]
VARIABLES = [*MANAGER, *left_over.HOST_LISTS, "SLURM_JOB_ID"]
VALUES = st.one_of(
    TEXTS, st.sampled_from(["0", "7", "x;tcp4://127.0.0.1:1", "x;tcp6://[::1]:99999999", "/dev/null", "9" * 5000])
)


def check_variables(environment: dict[str, str], folder: Path) -> bool:
    """Variables of launchers that are not there."""

    def start() -> None:
        left_over.check_process_manager(environment)
        left_over.check_host_lists(environment)

    return reads_only(start, folder, list(environment))


SEALS = [Seal(b"0123456789abcdef", number, 4) for number in range(2)]


def check_datagram(case: tuple[int, bytes, bool], folder: Path) -> bool:
    """Only what a host has sealed is opened: with other bytes from a place on, or of another length, it is nothing."""
    place, bytes_, cut = case
    whole = SEALS[1].seal(0, b"beat")
    changed = whole[:place] + bytes_ + (b"" if cut else whole[place + len(bytes_) :])
    opened = SEALS[0].open(changed)
    if (opened == (1, b"beat")) != (changed == whole):
        raise Violation(f"opened as {opened}: {changed!r}")
    return opened is not None


def check_owner(data: bytes, folder: Path) -> bool:
    """A folder that is held is refused, whatever the file says of its owner."""
    path = folder / ownership.FILE
    path.write_bytes(data)
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if ownership.holder_of(folder) == "":
            raise Violation("is held, and said to be free")
        return reads_only(lambda: ownership.claim(folder, "new", wait_s=0.0), folder, ["output"])


def check_site_key(case: tuple[bytes, int], folder: Path) -> bool:
    """A key that is short, long or open to others is refused, and stays as it is."""
    data, mode = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(site_key.STATE, str(folder))
        path = site_key.key_path()
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
        path.chmod(mode)
        accepted = accepts(lambda: site_key.key_of("a"), [site_key.STATE])
        if path.read_bytes() != data or accepted != (len(data) == site_key.BYTES and not mode & 0o077):
            raise Violation(f"accepted {accepted}")
    return accepted


OWNERS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"[" * 100_000, b"{" * 3000, b"[" * 1500, b"\xff\xfe", b"null", b'{"run_id": "a\\u001b[2J"}']),
    st.fixed_dictionaries(dict.fromkeys(("run_id", "pid", "host", "since"), TEXTS)).map(
        lambda d: repr(d).replace("'", '"').encode("utf-8", "replace")
    ),
)
SURFACES = [
    Surface("hostfile", st.lists(LINES, max_size=4), check_hostfile, share=1),
    Surface("variables", st.dictionaries(st.sampled_from(VARIABLES), VALUES, max_size=4), check_variables, share=0.5),
    Surface("datagram", st.tuples(st.integers(0, 60), st.binary(max_size=8), st.booleans()), check_datagram, share=1),
    Surface("owner", OWNERS, check_owner, share=0.5),
    Surface(
        "site_key",
        st.tuples(
            st.one_of(st.binary(max_size=40), st.binary(min_size=32, max_size=32)),
            st.sampled_from([0o600, 0o400, 0o644, 0o660]),
        ),
        check_site_key,
        share=0.3,
    ),
]
