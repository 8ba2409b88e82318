"""Report how many rows of a run are kept, cut and dropped: printed before the first round, kept in `summary.json`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data.lengths import Lengths, by_client, by_name, length_lines
from ubsmoe_ds.data.sources import Unused


class LeftOut(NamedTuple):
    """Count training rows that one client leaves out: as rows of its own eval_source, and over its max_rows."""

    evaluated: int
    beyond_max_rows: int


@dataclass(frozen=True)
class RowReport:
    """Numbers of rows.

    training: of each client by name; evaluation: of the rows common to all; unscored: ids of those that were dropped;
    unused: numbers of rows that were not chosen, of the common source (one item) or of each client's; left_out: of each
    client, in order; own_evaluation: of the clients with evaluation rows of their own.
    """

    training: Mapping[str, Lengths]
    evaluation: Lengths
    unscored: Sequence[str]
    unused: Sequence[Unused]
    left_out: Sequence[LeftOut] = ()
    own_evaluation: Mapping[str, Lengths] = field(default_factory=dict)

    @cached_property
    def kept(self) -> dict[str, int]:
        """Return the number of rows that each client trains on."""
        return {name: lengths.kept for name, lengths in self.training.items()}

    def lines(self, data: DataConfig) -> Iterator[str]:
        """Yield a line for each way in which rows were left out or lost something."""
        yield from self._unused_lines(data)
        setting = f"data.max_length={data.max_length}"
        total = Lengths(*map(sum, zip(*self.training.values(), strict=True)))
        cut = by_client({name: lengths.cut for name, lengths in self.training.items()})
        dropped = by_client({name: lengths.dropped for name, lengths in self.training.items()})
        yield from length_lines(setting, "training", total, cut, dropped, data.overlong)
        unscored, overlong = by_name(self.unscored), data.overlong
        yield from length_lines(setting, "evaluation", self.evaluation, dropped_of=unscored, overlong=overlong)
        own = by_client({name: lengths.dropped for name, lengths in self.own_evaluation.items()})
        total = Lengths(*map(sum, zip((0, 0, 0), *self.own_evaluation.values(), strict=True)))
        yield from length_lines(setting, "own evaluation", total, dropped_of=own, overlong=overlong)

    def _unused_lines(self, data: DataConfig) -> Iterator[str]:
        """Yield a line for each reason why rows were not chosen."""
        training, evaluation = sum(lengths.rows for lengths in self.training.values()), self.evaluation.rows
        for column, what in enumerate(("eval_source: {} training rows, rows of it too,", "max_rows: {} training rows")):
            counts = {name: part[column] for name, part in zip(self.training, self.left_out, strict=False)}
            training += sum(counts.values())
            if any(counts.values()):
                yield f"note: clients[].{what.format(sum(counts.values()))} are left out{by_client(counts)}"
        evaluated, beyond = sum(part.evaluated for part in self.unused), sum(part.beyond_rows for part in self.unused)
        asked, of_all = self.unused[0].beyond_eval_rows, training + evaluated + beyond  # evaluation rows are common
        if evaluated:
            whose = self._by_client([part.evaluated for part in self.unused])
            yield (
                f"note: data.eval_source: {evaluated} of {of_all} training rows are left out{whose}: they are "
                "evaluation rows too, with the same prompt and answer"
            )
        if beyond:
            whose = self._by_client([part.beyond_rows for part in self.unused])
            yield f"note: data.rows={data.rows}: {beyond} of {of_all} training rows are left out{whose}"
        if asked:
            yield f"note: data.eval_rows={data.eval_rows}: {asked} of {evaluation + asked} evaluation rows are left out"

    def _by_client(self, counts: Sequence[int]) -> str:
        """Name the clients whose own sources the counts are of; nobody if the source is common."""
        return by_client(dict(zip(self.training, counts, strict=True))) if len(counts) > 1 else ""

    def record(self) -> dict[str, Any]:
        """Return the numbers for `summary.json`."""
        training = {name: lengths._asdict() for name, lengths in self.training.items()}
        unused = [part._asdict() for part in self.unused]
        found = {"training": training, "evaluation": self.evaluation._asdict(), "unused": unused}
        if any(map(sum, self.left_out)):
            found["left_out"] = {n: part._asdict() for n, part in zip(self.training, self.left_out, strict=True)}
        if self.own_evaluation:
            found["own_evaluation"] = {name: lengths._asdict() for name, lengths in self.own_evaluation.items()}
        return found
