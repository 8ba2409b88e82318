"""Hostfiles: what other launchers write is read with their meaning, or refused with the true reason."""

import codecs
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.launching.hostfile import NAME, read_hostfile


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("hostfiles") / "hosts"


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("# the cluster\nn0 slots=4\n\nn1   slots=2  # smaller\nn2:8\n", {"n0": 4, "n1": 2, "n2": 8}),
        (
            "n1 slots=2 max_slots=4\nn0.site.org max-slots=8 slots = 8\n10.0.0.1 : 3\r\n",
            {"n1": 2, "n0.site.org": 8, "10.0.0.1": 3},
        ),
        ("n1\nn1\nn0\nn1\n", {"n1": 3, "n0": 1}),
        ("n0\nn1 slots=2\nn0\n", {"n0": 2, "n1": 2}),
    ],
    ids=["deepspeed and mpich", "open mpi", "pbs", "mixed"],
)
def test_hostfiles_of_each_launcher_are_read(path, text, slots):
    for encoded in (text.encode(), codecs.BOM_UTF8 + text.encode()):
        path.write_bytes(encoded)
        assert list(read_hostfile(path).items()) == list(slots.items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("n0 slots=4\nn0 slots=2\n", "line 2: 'n0' stands there twice"),
        ("n0 slots=4\nn0\n", "line 2: 'n0' stands there twice"),
        ("n0\nn0:2\n", "line 2: 'n0' stands there twice"),
        ("n0 slots=0\n", "line 1: slots=0 must be a whole number from 1"),
        ("n0:0\n", "slots=0 must be a whole number from 1"),
        ("n0 slots=-1\n", "slots=-1 must be a whole number"),
        (f"n0 slots={'9' * 5000}\n", "slots=99999999999999999999 must be a whole number"),
        (f"n0:{'9' * 5000}\n", "slots=99999999999999999999 must be a whole number"),
        ("n0 slots=٤\n", "must be a whole number"),
        ("n0 slots=4 slots=5\n", "needs slots= once"),
        ("n0:4 slots=4\n", "needs slots= once"),
        ("n0 max_slots=4\n", "needs slots= once"),
        ("n0 slots=4 port=22\n", "port= has no effect here"),
        ("me@n0 slots=4\n", "names a user"),
        ("fe80::1 slots=2\n", "address of IPv6"),
        ("[fe80::1]:2\n", "address of IPv6"),
        ("-x slots=2\n", "'-x' is no name of a host"),
        ("-oProxyCommand=sh:1\n", "is no name of a host"),
        ("n0,n1 slots=2\n", "is no name of a host"),
        ("$(id) slots=2\n", "is no name of a host"),
        ("n0;id slots=2\n", "is no name of a host"),
        ("n0 4\n", "'n0 4' is no line of a hostfile"),
        ("n0 slots=\n", "'n0 slots=' is no line of a hostfile"),
        ("# none\n", "names no host"),
    ],
)
def test_bad_hostfiles_are_refused(path, text, reason):
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert reason in str(caught.value) and str(caught.value).startswith(f"--hostfile: {path}")


def test_a_missing_hostfile_is_refused(tmp_path):
    with pytest.raises(UserError, match="--hostfile: .*none cannot be read"):
        read_hostfile(tmp_path / "none")


@settings(deadline=None)
@given(st.text(alphabet=string.printable + "é\x00\ufeff", max_size=40))
def test_any_text_is_hosts_or_one_line(path, text):
    """No host that is read can be taken for an option or for several words."""
    path.write_text(text, encoding="utf-8")
    try:
        slots = read_hostfile(path)
    except UserError:
        return
    assert all(NAME.fullmatch(host) and count >= 1 for host, count in slots.items())
