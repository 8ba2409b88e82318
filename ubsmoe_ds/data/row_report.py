"""Report how many rows of a run are kept, cut and dropped: printed before the first round, kept in `summary.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.lengths import Lengths, by_client, by_name, length_lines


@dataclass(frozen=True)
class RowReport:
    """Numbers of rows.

    training: of each client by name; evaluation: of the rows common to all; unscored: ids of those that were dropped.
    """

    training: Mapping[str, Lengths]
    evaluation: Lengths
    unscored: Sequence[str]

    @property
    def kept(self) -> dict[str, int]:
        """Return the number of rows that each client trains on."""
        return {name: lengths.kept for name, lengths in self.training.items()}

    def lines(self, data: DataConfig) -> Iterator[str]:
        """Yield a line for each way in which rows lost something."""
        setting = f"data.max_length={data.max_length}"
        total = Lengths(*map(sum, zip(*self.training.values(), strict=True)))
        cut = by_client({name: lengths.cut for name, lengths in self.training.items()})
        dropped = by_client({name: lengths.dropped for name, lengths in self.training.items()})
        yield from length_lines(setting, "training", total, cut, dropped)
        yield from length_lines(setting, "evaluation", self.evaluation, dropped_of=by_name(self.unscored))

    def record(self) -> dict[str, Any]:
        """Return the numbers for `summary.json`."""
        training = {name: lengths._asdict() for name, lengths in self.training.items()}
        return {"training": training, "evaluation": self.evaluation._asdict()}
