"""The ranks of a host end when another host is lost, whatever starts and surrounds them."""

import errno
import os

import pytest

from ubsmoe_ds.mpi import watchdog


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSYS, "kernels before 5.3"),
        PermissionError(errno.EPERM, "old containers"),
        ProcessLookupError(errno.ESRCH, "it has ended"),
        AttributeError("a Python built on an old kernel"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_rank_without_a_handle_is_left_to_its_launcher(error, monkeypatch):
    def pidfd_open(pid):
        if pid == 2:
            raise error
        return pid

    monkeypatch.setattr(os, "pidfd_open", pidfd_open, raising=False)
    assert watchdog._handles([1, 2, 3]) == [1, 3]
