"""Find the finished runs that earlier commands left in a comparison's folder, so that no table drops them unsaid.

Imports no torch.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.studies.comparison_runs import Run, collect, is_complete, other_config, other_inputs

RUN_FOLDER = re.compile(r"(?P<label>.+)-seed(?P<seed>0|[1-9][0-9]*)")


class Earlier(NamedTuple):
    """Runs of earlier commands: those that belong into the tables, and a line for each kind that is left out."""

    runs: list[Run]
    left_out: list[str]


def earlier_runs(folder: Path, asked: Sequence[Run], as_asked: Callable[[str, int], Run]) -> Earlier:
    """Return the finished runs of a folder beside those that a command asks for, method by method.

    A run belongs to the comparison if this command would have made it: the same config, weights and rows.

    Args:
        folder: where the jobs write.
        asked: the command's own runs.
        as_asked: makes the run that this command stands for, of a label and a seed.

    Raises:
        UserError: for weights or rows of now that cannot be read.
    """
    own = {(run.method, run.seed) for run in asked}
    runs: list[Run] = []
    reasons: dict[str, list[str]] = {}
    for label, seed in _finished(folder):
        if (label, seed) in own:
            continue
        try:
            run = as_asked(label, seed)
            reason = _reason_against(run)
        except UserError as error:  # this config does not go with that method
            reason = str(error)
        if reason is None:
            runs.append(run)
        else:
            reasons.setdefault(reason, []).append(f"{label}-seed{seed}")
    return Earlier(runs, [f"left out of the tables: {', '.join(names)} ({why})" for why, names in reasons.items()])


def _finished(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield label and seed of the finished runs in a folder, in the order of the methods, then of the seeds."""
    labels = [*PRESETS, *ABLATIONS]
    matches = (RUN_FOLDER.fullmatch(path.name) for path in folder.glob("*") if is_complete(path))
    found = [(match["label"], int(match["seed"])) for match in matches if match and match["label"] in labels]
    yield from sorted(found, key=lambda run: (labels.index(run[0]), run[1]))


def _reason_against(run: Run) -> str | None:
    """Return why a finished run is not one of this command's comparison; None if it is."""
    difference = other_config(run.exp)
    if difference is not None:
        key, old, new = difference
        return f"made with {key}={old!r}, this command has {new!r}"
    meaning = next((meaning for _, meaning in other_inputs([run])), None)
    if meaning is not None:
        return f"made with other {meaning} than there are now"
    try:
        collect([run])
    except UserError:
        return "their files are damaged"
    return None
