"""Tests run on the CPU, from the repository's root, whatever the machine has."""

import os

import pytest

from tests.ranks import REPO

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(REPO)
