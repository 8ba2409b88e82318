"""Check that the methods of a comparison trained the same clients in the same rounds, so that differences are paired.

A cohort depends on seed and round alone, but a client whose turn a deadline has cut is not in the round.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ubsmoe_ds.federation.budgets import read_records
from ubsmoe_ds.studies.comparison_runs import Run

STEPS = "steps/"  # begins the names of scalars that every client of a round has


def cohort_notes(runs: Iterable[Run]) -> list[str]:
    """Return lines on populations: whether the cohorts of a seed are the same for all methods.

    Args:
        runs: finished runs.
    """
    by_seed: dict[int, dict[str, list[list[str]]]] = {}
    for run in runs:
        if run.exp.takes_turns:
            by_seed.setdefault(run.seed, {})[run.method] = cohorts(read_records(run.exp, run.exp.run_dir))
    notes, compared = [], any(len(of_methods) > 1 for of_methods in by_seed.values())
    for seed, of_methods in sorted(by_seed.items()):
        first, *others = of_methods
        different = [method for method in others if of_methods[method] != of_methods[first]]
        if different:
            notes.append(
                f"seed {seed}: the clients of some rounds are others for {', '.join(different)} than for {first} "
                "(train.round_deadline_s cuts turns), so these differences are not of the same clients"
            )
    if compared and not notes:
        notes = ["the clients of each round are the same for all methods of a seed"]
    return notes


def cohorts(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the clients that took part in each round, from a run's records."""
    names = ([key for key in record["metrics"] if key.startswith(STEPS)] for record in records)
    return [sorted(key.removeprefix(STEPS) for key in of_round) for of_round in names]
