"""Resumable progress of a run, and its form in the checkpoint manifest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ubsmoe_ds.base.files import finite_or_null
from ubsmoe_ds.config.sections import Count, NotNegative, Section
from ubsmoe_ds.config.training import TrainConfig

Scalars = dict[str, float | None]  # None: not finite, which JSON cannot express


class SavedPending(Section):
    """`Progress.pending` as stored in a manifest."""

    metrics: Scalars
    seconds: Scalars
    utilisation: list[list[float | None]] | None


class SavedProgress(Section):
    """`Progress` as stored in a manifest; `steps_taken` is in `SavedClient`."""

    round: Count
    merged: bool
    before: Scalars
    after: Scalars
    pending: SavedPending
    lost: dict[str, int]
    sound_round: int = -1
    run_id: str = ""
    best_round: int = -1
    best_loss: float | None = None
    stale: Count = 0
    started_from: dict[str, str] = {}
    measured: dict[str, Annotated[list[NotNegative], Field(min_length=2, max_length=2)]] = {}

    @property
    def is_sound(self) -> bool:
        """Return whether the shared state was evaluated, and its loss is finite."""
        return not self.merged and self.sound_round == self.round - 1


class SavedClient(Section):
    """A client's entry in a manifest.

    layout: ranks and expert parallelism of the group that trained it last.
    lora_rank: current LoRA rank.
    steps_taken: local steps in the whole run.
    steps, bad_steps, seconds: local steps taken and skipped in the current round, and their wall time.
    turn: where clients take turns, whether its turn of the current round has begun or is done; group, place: the
        group that gave it, and its place among that group's turns; added_up: whether it is in that group's sum.
    scales: what its gates have learned for it alone.
    """

    layout: Annotated[list[Count], Field(min_length=2, max_length=2)]
    lora_rank: Count
    steps_taken: Count
    steps: Count
    bad_steps: Count
    seconds: NotNegative = 0.0
    turn: Literal["", "begun", "done"] = ""
    group: Count = 0
    place: Count = 0
    added_up: bool = False
    scales: list[float] | None = None


class Record(NamedTuple):
    """The record of a round; number 0 is the state before training.

    metrics: scalars by "group/name", the same on every run of the same seed and layout.
    seconds: wall times by name, kept apart because they never repeat.
    utilisation_LE: global utilisation in the round; None for round 0.
    """

    number: int
    metrics: dict[str, float]
    seconds: dict[str, float]
    utilisation_LE: Tensor | None


def _nothing_pending() -> dict[str, Any]:
    return {"metrics": {}, "seconds": {}, "utilisation": None}


@dataclass
class Progress:
    """Progress of a run; but for `pending` and `steps_taken` of clients in the current round the same on all ranks.

    round: the current round; 0 is the evaluation before training.
    merged: whether the round is merged, so that only its evaluation and record are missing.
    before, after: scalars of the first and of the latest evaluation.
    pending: scalars of the merged round that are not recorded yet; ranks without records have its evaluation's alone.
    steps_taken: by client its local steps in the whole run, and so its position in its data: this rank's client alone,
        or all clients where they take turns.
    scales: by client what its gates have learned for it alone, [L], where clients take turns.
    lost: clients that lost a rank, and the round in which they did.
    sound_round: the latest round whose evaluation was finite; -1: none yet.
    run_id: identifies the run in all that it writes.
    best_round, best_loss: of the evaluation with the lowest weighted loss; -1 and None before the first.
    stale: evaluations since then.
    started_from: the earlier adapter that the run started from, see adapters/start.py; empty: none.
    measured: see `Roster`.
    within: whether the run was resumed within the current round, which it then completes.
    """

    round: int = 0
    merged: bool = True
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    pending: dict[str, Any] = field(default_factory=_nothing_pending)
    steps_taken: dict[int, int] = field(default_factory=dict)
    scales: dict[int, Tensor] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    sound_round: int = -1
    run_id: str = ""
    best_round: int = -1
    best_loss: float | None = None
    stale: int = 0
    started_from: dict[str, str] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    within: bool = False

    def note_merge(self, metrics: dict[str, float], seconds: dict[str, float], utilisation_LE: list) -> None:
        """Note that the round is merged, and keep what its record will hold."""
        self.pending = {"metrics": metrics, "seconds": seconds, "utilisation": utilisation_LE}
        self.merged = True

    def is_over(self, train: TrainConfig) -> bool:
        """Return whether no round is left, or the run has run out of patience."""
        return self.round > train.rounds or self.is_out_of_patience(train)

    def is_out_of_patience(self, train: TrainConfig) -> bool:
        """Return whether as many evaluations as `train.patience` brought no lower loss."""
        return train.patience is not None and not self.within and self.stale >= train.patience

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Return whether the scalars of an evaluation are better than all before."""
        loss = metrics["eval/loss_weighted"]
        return math.isfinite(loss) and (self.best_loss is None or loss < self.best_loss)

    def note_evaluation(self, metrics: dict[str, float]) -> None:
        """Add the scalars of the round's evaluation."""
        self.stale += 1
        if self.improves(metrics):
            self.best_round, self.best_loss, self.stale = self.round, metrics["eval/loss_weighted"], 0
        self.pending["metrics"] |= metrics
        self.after = metrics
        if self.round == 0:
            self.before = metrics

    def record(self) -> Record:
        """Return the record of the round."""
        utilisation = self.pending["utilisation"]
        utilisation_LE = None if utilisation is None else torch.tensor(utilisation)
        return Record(self.round, self.pending["metrics"], self.pending["seconds"], utilisation_LE)

    def next_round(self) -> None:
        """Move on to the next round, once this one is recorded."""
        self.round, self.merged, self.within = self.round + 1, False, False
        self.pending = _nothing_pending()

    def saved(self) -> dict[str, Any]:
        """Return the progress as JSON types for the manifest."""
        return {key: finite_or_null(getattr(self, key)) for key in SavedProgress.model_fields}


def restored(saved: SavedProgress, steps_taken: dict[int, int], within: bool = False) -> Progress:
    """Return the `Progress` that a manifest holds; clients that were lost take part again.

    Args:
        saved: progress from the manifest.
        steps_taken: see `Progress`.
        within: whether the current round has begun.
    """
    values = saved.model_dump() | {"lost": {}}
    pending = {key: _from_json(value) for key, value in values["pending"].items() if value is not None}
    values |= {key: _from_json(values[key]) for key in ("before", "after")}
    return Progress(**values | {"pending": {"utilisation": None} | pending}, steps_taken=steps_taken, within=within)


def _from_json(value: Any) -> Any:
    """Turn `null`, which JSON has in place of NaN and Inf, back into NaN."""
    if isinstance(value, dict):
        return {key: _from_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_from_json(part) for part in value]
    return math.nan if value is None else value
