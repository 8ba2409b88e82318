"""Check that bad input does no harm: hostile files, options and disks against every surface that a user touches.

    python tests/soak/fuzz.py --cases 10000 --seed 0
    python tests/soak/fuzz.py --cases 300 --only rows adapter

A case is accepted, or refused by `UserError`: one short line that names the thing. All else is a violation: any other
exception, a line that names nothing, a file written or lost, code that was run, a case that takes `SECONDS` or more, or
one that takes much memory. Exit code 1 if there was a violation. The cases depend on the seed alone; `test_fuzz.py`
runs some of them.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings

ROOT = Path(__file__).resolve().parent.parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.soak.fuzz_cases import Surface, Violation  # noqa: E402 - needs the path above

SECONDS = 30  # wall clock; the machine may be busy, and the first case imports
MEGABYTES = 512
SHOWN = 1500  # characters of a case


class Kind(NamedTuple):
    """One kind of violation: how often it occurred, its message, and the first case."""

    count: int
    message: str
    case: str


class Tally(NamedTuple):
    """Results of a surface's cases; kinds of violations by the place in the code that they come from."""

    cases: int
    accepted: int
    refused: int
    kinds: dict[str, Kind]

    def line(self, name: str, seconds: float) -> str:
        violations = sum(kind.count for kind in self.kinds.values())
        return (
            f"{name:12s} {self.cases:6d} cases  {self.accepted:6d} accepted  {self.refused:6d} refused  "
            f"{violations:4d} violations  {seconds:6.1f} s"
        )


def run_surface(surface: Surface, cases: int, seed_number: int) -> Tally:
    """Generate cases and check them.

    Args:
        surface: the one to try.
        cases: their largest number; fewer are run where there are no more different ones.
        seed_number: determines the cases.
    """
    verdicts = {True: 0, False: 0}
    kinds: dict[str, Kind] = {}

    @seed(seed_number)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(surface.cases)
    def check(case: object) -> None:
        with _case_folder() as folder:
            try:
                with _bounded():
                    verdicts[surface.check(case, folder)] += 1
            except (Exception, SystemExit) as error:
                key = _place(error)
                earlier = kinds.get(key, Kind(0, f"{type(error).__name__}: {str(error)[:SHOWN]}", repr(case)[:SHOWN]))
                kinds[key] = earlier._replace(count=earlier.count + 1)

    check()
    total = sum(verdicts.values()) + sum(kind.count for kind in kinds.values())
    return Tally(total, verdicts[True], verdicts[False], kinds)


@contextmanager
def _case_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def _bounded() -> Iterator[None]:
    """Interrupt a case that hangs; raise `Violation` for one that took much memory."""

    def too_long(number: int, frame: object) -> None:
        raise Violation(f"took more than {SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if grown > MEGABYTES:
        raise Violation(f"took {grown:.0f} MB of memory")


def _place(error: BaseException) -> str:
    """Return the place in the project's code that an error came from, so that like violations count as one kind."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT / "ubsmoe_ds"))]
    frames = frames or [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))]
    where = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "outside"
    return f"{where} {str(error).partition(':')[0] if isinstance(error, Violation) else type(error).__name__}"


def surfaces() -> dict[str, Surface]:
    """Return all surfaces by name."""
    from transformers.utils import logging as transformers_logging

    from tests.soak import (
        fuzz_checkpoints,
        fuzz_commands,
        fuzz_config,
        fuzz_models,
        fuzz_rows,
        fuzz_starting,
        fuzz_writers,
    )

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    modules = (fuzz_config, fuzz_rows, fuzz_models, fuzz_checkpoints, fuzz_commands, fuzz_writers, fuzz_starting)
    return {surface.name: surface for module in modules for surface in module.SURFACES}


def main(arguments: Sequence[str]) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10000, help="of all surfaces together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of surfaces")
    options = parser.parse_args(arguments)
    chosen = {name: surface for name, surface in surfaces().items() if not options.only or name in options.only}
    whole = sum(surface.share for surface in chosen.values())
    failed = 0
    for name, surface in chosen.items():
        start = time.perf_counter()
        cases = max(1, round(options.cases * surface.share / whole))
        tally = run_surface(surface, cases, options.seed)
        print(tally.line(name, time.perf_counter() - start), flush=True)
        for place, kind in tally.kinds.items():
            failed += kind.count
            print(f"  VIOLATION {place} ({kind.count} times): {kind.message}", flush=True)
            print(f"    --only {name}, case {kind.case}", flush=True)
    print(f"{failed} violations" if failed else "no violation")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
