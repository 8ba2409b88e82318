"""Where a job stands between two things that it does; a checkpoint's manifest has it."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe_ds.base.files import finite_or_null
from ubsmoe_ds.config.sections import Section

Count = Annotated[int, Field(ge=0)]
Scalars = dict[str, float | None]  # None: not finite, for which JSON has no word


class SavedPending(Section):
    """`Progress.pending` in a manifest."""

    metrics: Scalars
    seconds: Scalars
    utilisation: list[list[float | None]] | None


class SavedProgress(Section):
    """`Progress` in a manifest; `steps_taken` is in `SavedClient`."""

    round: Count
    merged: bool
    before: Scalars
    after: Scalars
    pending: SavedPending
    lost: dict[str, int]


class SavedClient(Section):
    """A client in a manifest: ranks and expert parallelism, LoRA rank, steps in the run; of the round under way steps,
    bad ones, and seconds.
    """

    layout: list[Count]
    lora_rank: Count
    steps_taken: Count
    steps: Count
    bad_steps: Count
    seconds: Annotated[float, Field(ge=0)] = 0.0


@dataclass
class Progress:
    """Where the job stands, the same on all ranks but for `steps_taken`.

    round: under way, 0 is the evaluation before training; merged: only its evaluation and record are missing.
    before, after: the first and the latest evaluation. pending: what will be recorded of a merged round.
    steps_taken: local steps of this rank's client in the whole run, so its place in its data. lost: clients that a rank
    of has died, and in which round.
    """

    round: int = 0
    merged: bool = True
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=lambda: {"metrics": {}, "seconds": {}, "utilisation": None})
    steps_taken: int = 0
    lost: dict[str, int] = field(default_factory=dict)

    def note(self, metrics: dict[str, float], seconds: dict[str, float], utilisation_LE: list[list[float]]) -> None:
        """The round is merged."""
        self.pending = {"metrics": metrics, "seconds": seconds, "utilisation": utilisation_LE}
        self.merged = True

    def evaluated(self, metrics: dict[str, float]) -> None:
        """The evaluation of the round is done."""
        self.pending["metrics"] |= metrics
        self.after = metrics
        if self.round == 0:
            self.before = metrics

    def recorded(self) -> tuple[dict[str, float], dict[str, float], Tensor | None]:
        """What to record of the round: (metrics, seconds, utilisation_LE)."""
        utilisation = self.pending["utilisation"]
        return (
            self.pending["metrics"],
            self.pending["seconds"],
            None if utilisation is None else torch.tensor(utilisation),
        )

    def next_round(self) -> None:
        """The round is recorded."""
        self.round, self.merged = self.round + 1, False
        self.pending = {"metrics": {}, "seconds": {}, "utilisation": None}

    def saved(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: finite_or_null(getattr(self, key)) for key in SavedProgress.model_fields}


def restored(found: SavedProgress, steps_taken: int) -> Progress:
    """The way back; a client that was lost is with the job again.

    Args:
        found: in the manifest.
        steps_taken: of this rank's client.
    """
    values = found.model_dump() | {"lost": {}}
    pending = {key: _from_json(value) for key, value in values["pending"].items() if value is not None}
    values |= {key: _from_json(values[key]) for key in ("before", "after")}
    return Progress(**values | {"pending": {"utilisation": None} | pending}, steps_taken=steps_taken)


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_from_json(part) for part in value]
    return math.nan if value is None else value
