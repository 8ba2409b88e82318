"""Settings of the C library."""

import ctypes
import platform
from types import SimpleNamespace

import pytest

from ubsmoe_ds.base import malloc


@pytest.mark.parametrize(("accepts", "kept"), [(1, True), (0, False)])
def test_it_is_told_whether_the_c_library_took_the_settings(accepts, kept, monkeypatch):
    settings = {}

    def mallopt(name, value):
        settings[name] = value
        return accepts

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert malloc.keep_freed_memory() is kept
    assert settings == {-4: 0, -1: 2**31 - 1, -2: 64 * 2**20}  # as numbered in glibc's malloc.h


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    assert malloc.keep_freed_memory() is False
    malloc.release_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_glibc_has_what_is_called():
    assert ctypes.CDLL(None).mallopt and ctypes.CDLL(None).malloc_trim
