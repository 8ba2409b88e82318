"""Tests run on the CPU, from the repository's root, whatever the machine has; those in tests/gpu are the exception."""

import os
import signal
import tempfile

import pytest

from tests.support.jobs import OWN_SERVER, SHORT, TRAIN, run
from tests.support.ranks import REPO

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if "gpu" not in os.environ.get("UBSMOE_DS_REQUIRE", "").split():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are tests of the CPU, also where there are fewer devices than ranks
# a shell starts background jobs with SIGINT ignored, and all that the tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
# the key of a site is kept in the user's folder; tests leave no trace there
STATE = tempfile.TemporaryDirectory(prefix="ubsmoe_ds-tests-")
os.environ["XDG_STATE_HOME"] = STATE.name
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# threads that wait for cores which ranks and other tests need spin: the same tests took 15 times as long
os.environ.setdefault("OMP_NUM_THREADS", "1")


# what tests that need something say where it is missing
REASONS = {
    "slurm": ("no Slurm here",),
    "hosts": ("network namespaces", "apt-get install iproute2"),
    "openmpi": ("no Open MPI", "make openmpi"),
    "gpu": ("no CUDA device",),
}
REQUIRED = [reason for name in os.environ.get("UBSMOE_DS_REQUIRE", "").split() for reason in REASONS[name]]


def pytest_collection_modifyitems(items):
    """The longest file first, or one of two workers would end long before the other."""
    items.sort(key=lambda item: "tests/soak/test_chaos.py" not in item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where UBSMOE_DS_REQUIRE names something, tests that are skipped for want of it fail."""
    report = yield
    if report.skipped and any(reason in str(report.longrepr) for reason in REQUIRED):
        report.outcome, report.longrepr = "failed", f"UBSMOE_DS_REQUIRE: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Folder and output of the demo, shortened, through the deepspeed launcher."""
    out = tmp_path_factory.mktemp("demo")
    code, output = run("deepspeed", TRAIN, *SHORT, f"output={out}", **OWN_SERVER)
    assert code == 0, output
    return out / "tiny", output


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(REPO)
