"""Fuzz of writing: a disk that fills up, a folder that cannot be made, a rename that fails.

The process's limit on the size of its files stands for the full disk; it needs neither root nor a mount.
"""

import argparse
import contextlib
import errno
import io
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch import compare, prepare
from tests.soak import fuzz_commands, fuzz_models
from tests.soak.fuzz_cases import Surface, Violation, accepts, snapshot
from tests.support import tiny
from ubsmoe_ds.adapters.adapter import read_adapter, save_adapter
from ubsmoe_ds.adapters.merged import write_merged


class Writer(NamedTuple):
    """Writes a result to a path, may or may not replace an earlier one, and can read it."""

    write: Callable[[Path], object]
    replaces: bool
    read: Callable[[Path], object]


def _save(rule: str) -> Callable[[Path], object]:
    model = str(fuzz_models.prepared() / "single")
    exp = tiny.experiment(model, [{"budget": 1.0}], method="flora" if rule == "flora" else "ub_smoe")
    state = read_adapter(fuzz_models.prepared() / "adapter").state
    return lambda out: save_adapter(
        exp, out, state, lora_rank=fuzz_models.RANK, scaling=3.0, k=2, about={"run_id": "r"}
    )


def _merge(out: Path) -> None:
    adapter = read_adapter(fuzz_models.prepared() / "adapter")
    write_merged(fuzz_models.prepared() / "sharded", adapter.state, adapter.scaling, out, whole=True)


def _upcycle(out: Path) -> None:
    dense = str(fuzz_commands.prepared() / "dense")
    prepare.make_upcycled(argparse.Namespace(model=dense, experts=2, k=1, seed=0, out=out))


def _results(out: Path) -> None:
    """Write a comparison's tables; its pictures take too long to draw in every case."""
    import pandas as pd

    frame = pd.DataFrame({"method": ["topk"], "loss": [0.5]})
    with mock.patch.object(compare, "collect", return_value=(frame, frame)):
        with mock.patch.object(compare, "markdown", return_value="x" * 5000):
            with mock.patch.object(compare, "picture") as picture:
                picture.return_value.savefig = lambda path, dpi: Path(path).write_bytes(b"\x89PNG" * 999)
                with contextlib.redirect_stdout(io.StringIO()):
                    compare.write_results([], out, "headline")


def _same_results(out: Path) -> None:
    if len((out / "results.md").read_text()) != 5000:
        raise Violation("half a table passes for one")


WRITERS = {
    "adapter": Writer(lambda out: _save("ub_smoe")(out), True, read_adapter),
    "flora": Writer(lambda out: _save("flora")(out), True, read_adapter),
    "merge": Writer(_merge, False, AutoModelForCausalLM.from_pretrained),
    "upcycle": Writer(_upcycle, False, AutoTokenizer.from_pretrained),
    "compare": Writer(_results, True, _same_results),
}


@contextlib.contextmanager
def _full_disk(room: int) -> Iterator[None]:
    """Let no file grow beyond `room` bytes in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def check(case: tuple[str, bool, str, int], folder: Path) -> bool:
    """Check that a failed write leaves what was there before, and nothing else."""
    name, earlier, trouble, number = case
    fuzz_models.prepared(), fuzz_commands.prepared()  # before a disk is full
    writer = WRITERS[name]
    out = folder / "out"
    if earlier and writer.replaces:
        writer.write(out)
        writer.read(out)
    if trouble == "below a file":
        (folder / "file").write_text("mine")
        out = folder / "file" / "out"
    elif trouble == "in use" and not out.exists():
        out.write_text("mine")
    elif trouble == "loop" and not out.exists():
        out.symlink_to("out")
    before = snapshot(folder)
    answer = accepts(lambda: _write(writer, out, trouble, number), [str(folder), "--out", "--merge"])
    if answer:
        writer.read(out)
        if any("unfinished" in path for path in snapshot(folder)):
            raise Violation("something unfinished was left")
    elif snapshot(folder) != before:
        raise Violation(f"a write that failed changed {sorted(before.items() ^ snapshot(folder).items())[:3]}")
    return answer


def _write(writer: Writer, out: Path, trouble: str, number: int) -> None:
    if trouble == "full":
        with _full_disk(number):
            writer.write(out)
    elif trouble == "read-only":
        with mock.patch.object(Path, "replace", side_effect=OSError(errno.EROFS, "Read-only file system")):
            writer.write(out)
    else:
        writer.write(out)


TROUBLES = ["full"] * 6 + ["read-only", "below a file", "in use", "loop", "none"]
ROOM = st.one_of(st.integers(0, 60_000), st.sampled_from([0, 1, 100, 4096, 200_000, 10**7]))
SURFACES = [
    Surface(
        "writers", st.tuples(st.sampled_from(sorted(WRITERS)), st.booleans(), st.sampled_from(TROUBLES), ROOM), check
    ),
]
