"""Draw the cohort of a round: the clients that take part. Pure functions of seed and round, the same on all ranks."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, RootModel, ValidationError

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_text
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.messages import one_line

STREAM = 3  # of the random numbers that are drawn from the experiment's seed
MOST_BYTES = 2**26  # of a file of availability
Ranges = list[Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]]


class _Availability(RootModel):
    """By client the first and last round of each time that it is there."""

    root: dict[str, Ranges]


class Cohorts:
    """The cohort of each round.

    Args:
        exp: the experiment.
        rows: training rows of each client.

    Raises:
        UserError: for a file of availability that cannot be used, or that leaves a round without clients.
    """

    def __init__(self, exp: Experiment, rows: Sequence[int]) -> None:
        self.names = [client.name for client in exp.clients]
        self.sampling, self.seed, self.rows = exp.sampling, exp.seed, np.array(rows, dtype=np.float64)
        self._left = list(range(len(self.names)))
        self._drawn: dict[int, list[int]] = {}  # of the latest round: it is asked for several times
        self._there: Mapping[str, Ranges] = {}
        if self.sampling is not None and self.sampling.availability is not None:
            self._there = _read_availability(Path(self.sampling.availability), self.names)
            empty = next((n for n in range(1, exp.train.rounds + 1) if not self._available(n)), None)
            if empty is not None:
                raise UserError(f"sampling.availability: no client is there in round {empty}; add one")

    def merged(self, number: int) -> int:
        """Return how many clients a round merges: all that are drawn, or the first that finish."""
        drawn = len(self.of_round(number))
        return drawn if self.sampling is None else min(drawn, self.sampling.size(len(self.names)))

    def of_round(self, number: int) -> list[int]:
        """Return the numbers of the clients of a round, rising; fewer than asked for where fewer are available.

        uniform and availability: without replacement, all sets alike. by_rows: without replacement, each draw in
        proportion to the rows of the clients that are left. round_robin: the next ones, in the order of the config.
        """
        if number not in self._drawn:
            self._drawn = {number: self._draw(number)}
        return list(self._drawn[number])

    def _draw(self, number: int) -> list[int]:
        pool = self._available(number)
        if self.sampling is None:
            return pool
        count = min(self.sampling.drawn(len(self.names)), len(pool))
        if self.sampling.by == "round_robin":
            return sorted(pool[(count * (number - 1) + place) % len(pool)] for place in range(count))
        rng = np.random.default_rng([self.seed, STREAM, number])
        share = self.rows[pool] / self.rows[pool].sum() if self.sampling.by == "by_rows" else None
        return sorted(pool[place] for place in rng.choice(len(pool), size=count, replace=False, p=share).tolist())

    def lose(self, clients: Collection[int]) -> None:
        """Draw no cohort with these clients from now on."""
        self._left, self._drawn = [client for client in self._left if client not in clients], {}

    def _available(self, number: int) -> list[int]:
        """Return the clients that are there in a round, and not lost."""
        if not self._there:
            return self._left
        return [client for client in self._left if _is_there(self._there.get(self.names[client]), number)]


def _is_there(ranges: Ranges | None, number: int) -> bool:
    """Return whether a client is there in a round; one that the file does not name always is."""
    return ranges is None or any(first <= number <= last for first, last in ranges)


def _read_availability(path: Path, names: Sequence[str]) -> dict[str, Ranges]:
    """Read the file; raise UserError if it is not one."""
    key = "sampling.availability"
    try:
        found = _Availability.model_validate_json(read_text(path, MOST_BYTES)).root
    except ValidationError as error:
        raise UserError(one_line(error, _Availability, within=key)) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); check the path") from error
    unknown = next((name for name in found if name not in names), None)
    if unknown is not None:
        raise UserError(f"{key}: {path} names {unknown!r}, which is no client; correct it")
    return found
