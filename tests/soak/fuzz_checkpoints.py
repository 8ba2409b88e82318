"""Fuzz of checkpoints: a damaged one must be named and skipped, and values that are read must be those written.

A damaged checkpoint has an older whole one behind it, which must be used instead; if that is damaged too, a refusal.
"""

import contextlib
import functools
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hypothesis import strategies as st
from mpi4py import MPI

from tests.soak.fuzz_cases import DAMAGES, VALUES, Surface, Violation, accepts, damaged, mutations
from tests.support import tiny
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.search import CheckpointFinder
from ubsmoe_ds.checkpoint.storage import Piece

WEIGHT = torch.arange(40, dtype=torch.float32)
CLIENT = {"layout": [1, 1], "lora_rank": 3, "steps_taken": 4, "steps": 0, "bad_steps": 0}


def _finder(run_dir: Path) -> CheckpointFinder:
    """Return the search of a job of one rank."""
    exp = tiny.experiment("unused", [{"budget": 0.5}], output=str(run_dir.parent), name=run_dir.name)
    alone = mock.Mock(rank=0, comm=MPI.COMM_SELF)
    alone.sum = np.asarray
    return CheckpointFinder(exp, alone, "rows")


@functools.cache
def _written() -> Path:
    """Make a run with two checkpoints; return its folder."""
    run_dir = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-")) / "test"
    content = {
        "progress": Progress().saved(),
        "clients": {"c0": CLIENT},
        "config": _finder(run_dir).exp.model_dump(mode="json"),
        "data": "rows",
    }
    for serial in (1, 2):
        folder = storage.begin(run_dir, serial)
        pieces = [[Piece("weight", "c0", "w", 20 * rank, WEIGHT[20 * rank :][:20])] for rank in range(2)]
        by_name = {storage.rank_file(rank): part for rank, part in enumerate(pieces)}
        files = {name: storage.write_pieces(folder / name, part) for name, part in by_name.items()}
        storage.commit(run_dir, serial, f"round-{serial}", files, content)
    return run_dir


def _look(run_dir: Path, both: bool, touched: bool) -> bool:
    """Find the newest whole checkpoint and read it; return whether it is the newest of all."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        chosen = _finder(run_dir).find("auto")
    if chosen is None:
        raise Violation("found nothing, which would start the run anew")
    if not torch.equal(chosen.reader.read("weight", "c0", "w"), WEIGHT):
        raise Violation(f"{chosen.folder} holds other values than were written")
    newest = chosen.folder.name.startswith("000002")
    if newest == bool(said.getvalue()) or (not newest and "000002-round-2 is damaged" not in said.getvalue()):
        raise Violation(f"{chosen.folder}, said: {said.getvalue()!r}")
    if both and touched and not newest:
        raise Violation(f"{chosen.folder} is damaged too")
    return newest


def check(case: tuple[str, tuple, bool], folder: Path) -> bool:
    """Damage a file of the newest checkpoint, or of both."""
    name, how, both = case
    run_dir = folder / "test"
    shutil.copytree(_written(), run_dir)
    whole = (run_dir / storage.FOLDER / "000002-round-2" / name).read_bytes()
    for number in ("000002-round-2", "000001-round-1")[: 1 + both]:
        path = run_dir / storage.FOLDER / number / name
        path.write_bytes(damaged(path.read_bytes(), *how))
    touched = damaged(whole, *how) != whole
    newest: list[bool] = []
    if not accepts(lambda: newest.append(_look(run_dir, both, touched)), ["damaged"]):
        return False
    if not newest[0] and not touched:
        raise Violation("refused what is whole")
    return newest[0]


def check_manifest(manifest: Any, folder: Path) -> bool:
    """Write a manifest of any content with a right checksum, as a hostile hand could, and damage could not."""
    run_dir = folder / "test"
    shutil.copytree(_written(), run_dir)
    if isinstance(manifest, dict):
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        manifest = {**body, "sha256": digest}
    (run_dir / storage.FOLDER / "000002-round-2" / storage.MANIFEST).write_text(json.dumps(manifest))
    newest: list[bool] = []
    names = ["damaged", "--resume", "checkpoint"]
    return accepts(lambda: newest.append(_look(run_dir, both=False, touched=True)), names) and newest[0]


def _manifest() -> dict:
    return json.loads((_written() / storage.FOLDER / "000002-round-2" / storage.MANIFEST).read_text())


NAMES = ["rank-00000.safetensors", "rank-00001.safetensors", storage.MANIFEST]
HOSTILE = st.sampled_from(["../../secret", "/etc/passwd", "rank-00001.safetensors/../x", "rank-1.safetensors", ""])


def _renamed(name: str) -> dict:
    manifest = _manifest()
    manifest["files"][name] = manifest["files"].pop("rank-00001.safetensors")
    return manifest


SURFACES = [
    Surface("checkpoint", st.tuples(st.sampled_from(NAMES), DAMAGES, st.booleans()), check, share=1),
    Surface(
        "manifest",
        st.one_of(st.deferred(lambda: mutations(_manifest(), most=2, values=VALUES)), HOSTILE.map(_renamed)),
        check_manifest,
        share=1,
    ),
]
