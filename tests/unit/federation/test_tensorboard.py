"""TensorBoard's file: what is logged can be read, and a full disk does not end the run."""

import resource
import signal
import threading
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ubsmoe_ds.federation.tensorboard import TensorBoard

# TensorBoard's own thread ends with the same error
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def read(folder) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_what_is_logged_can_be_read(tmp_path):
    log = TensorBoard(tmp_path, None)
    log.scalars({"eval/loss": 0.5, "steps/a": 3.0}, 2)
    log.text("refused/a", "layers.0.router", 2)
    log.image("heat", torch.zeros(3, 4, 5), 2)
    log.close()
    log.scalars({"eval/loss": 9.0}, 3)  # after the end: nothing
    events = read(tmp_path)
    assert {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]} == {
        "eval/loss": [0.5],
        "steps/a": [3.0],
    }
    assert events.Tags()["images"] == ["heat"] and events.Images("heat")[0].width == 5


def test_what_is_logged_is_soon_in_the_file_while_nobody_asks(tmp_path, monkeypatch):
    """A round does not wait for it, and a run that is killed later leaves it.

    Files are buffered as TensorFlow's are, which TensorBoard writes by where it is installed.
    """
    monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.tf.io.gfile.GFile", open)
    log = TensorBoard(tmp_path, None)
    deadline = time.monotonic() + 30
    for name in ("eval/loss", "train/loss"):  # the first is written at once, whatever the interval
        log.scalars({name: 0.5}, 2)
        while name not in read(tmp_path).Tags()["scalars"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    log.close()


@pytest.fixture
def small_disk():
    """Let no file grow beyond 4,000 bytes; it needs neither root nor a mount."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, small_disk, capfd):
    before = set(threading.enumerate())
    log = TensorBoard(tmp_path / "tensorboard", None)
    for step in range(4):
        log.scalars({f"name/{number}": 1.0 for number in range(100)}, step)
        log.flush()
    log.text("a", "b", 5)
    log.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1 and f"{tmp_path / 'tensorboard'}: TensorBoard's log ends here (File too large)" in lines[0]


def test_a_folder_that_cannot_be_made_is_said_once(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("a file")
    log = TensorBoard(tmp_path / "tensorboard", None)
    log.scalars({"x": 1.0}, 0)
    log.flush()
    log.close()
    assert capfd.readouterr().err.count("TensorBoard's log ends here") == 1
