"""Sum up figures of many clients by their budgets, for records and tables that people read."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ubsmoe_ds.config.experiment import Experiment

RECORD = "metrics.jsonl"
CLIENT_RECORD = "clients.jsonl"
MOST_SHOWN = 8  # clients that take turns and are shown one by one
PLACES = ("group", "turn")  # families of numbers of which a mean says nothing
OfClients = dict[str, dict[str, float]]  # client -> family -> value


def sums_up(exp: Experiment) -> bool:
    """Return whether a run's clients are shown by budget, and their own figures are kept in `clients.jsonl`."""
    return exp.takes_turns and len(exp.clients) > MOST_SHOWN


def by_budget(budgets: Mapping[str, str], scalars: Mapping[str, float]) -> tuple[dict[str, float], OfClients]:
    """Split scalars into (those of no client, with mean, least and most by budget; those of clients, by client).

    `family/CLIENT` becomes `family/b0.25`, the mean over the clients of that budget that have a value, and
    `family_min/b0.25` and `family_max/b0.25`.

    Args:
        budgets: by name of each client its budget, such as "b0.25".
        scalars: by name.
    """
    summed: dict[str, float] = {}
    of_clients: OfClients = {}
    of_budgets: dict[tuple[str, str], list[float]] = {}
    for key, value in scalars.items():
        family, _, name = key.partition("/")
        if name not in budgets:
            summed[key] = value
            continue
        of_clients.setdefault(name, {})[family] = value
        if family in PLACES:
            continue
        of_budgets.setdefault((family, budgets[name]), []).append(value)
    for (family, budget), values in of_budgets.items():
        summed[f"{family}/{budget}"] = math.fsum(values) / len(values)
        summed[f"{family}_min/{budget}"], summed[f"{family}_max/{budget}"] = min(values), max(values)
    return summed, of_clients


def read_records(exp: Experiment, folder: Path) -> list[dict[str, Any]]:
    """Return the record of every round of a run, with the scalars of all clients."""
    records = _lines(folder / RECORD)
    if not sums_up(exp):
        return records
    of_rounds: dict[int, list[dict[str, Any]]] = {}
    for line in _lines(folder / CLIENT_RECORD):
        of_rounds.setdefault(line["round"], []).append(line)
    return [_with_clients(record, of_rounds.get(record["round"], [])) for record in records]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _with_clients(record: dict[str, Any], lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    whole = {part: dict(record[part]) for part in ("metrics", "seconds")}
    for line in lines:
        for part, scalars in whole.items():
            scalars |= {f"{family}/{line['client']}": value for family, value in line[part].items()}
    return record | whole


def budget_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row of the final table for each budget: means over its clients, of those that have a value."""
    budgets: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        budgets.setdefault(row["budget"], []).append(row)
    summed = []
    for budget, members in sorted(budgets.items()):
        row = {key: _mean(members, key) for key, value in members[0].items() if isinstance(value, int | float)}
        turns = sum(member["rounds"] for member in members)
        summed.append(row | {"client": f"{len(members)} of b{budget:g}, {turns} turns"})
    return summed


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """Return the mean of what is known; NaN if nothing is."""
    known = [row[key] for row in rows if math.isfinite(row[key])]
    return math.fsum(known) / len(known) if known else math.nan
