"""Declare the sections of a run's course: training, checkpoints, evaluation; see sections.py. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ubsmoe_ds.config.messages import BelowKeyError
from ubsmoe_ds.config.sections import Count, NotNegative, Positive, PositiveInt, Section


class TrainConfig(Section):
    """Rounds and local steps. Batch size, learning rate, clipping and ZeRO stage are in the DeepSpeed JSON."""

    rounds: PositiveInt = Field(5, description="rounds of the run")
    local_steps: PositiveInt | None = Field(
        10, description="optimiser steps of a client in a round; null where `local_epochs` is given"
    )
    local_epochs: Positive | None = Field(
        None, description="passes of a client over its own rows in a round, in whole steps, rounded up"
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="how the learning rate falls from round to round; docs/training.md has the formulas"
    )
    warmup_rounds: Count = Field(0, description="first rounds, in which the learning rate rises in equal steps")
    weights: Literal["rows", "tokens", "equal"] = Field(
        "rows", description="what a client's weight in the merge is proportional to; tokens: those of its answers"
    )
    optimizer_state: Literal["reset", "keep"] = Field(
        "reset", description="keep a client's optimiser moments between rounds, or reset them"
    )
    kept_states_gb: NotNegative = Field(
        4.0,
        description="GB of a host's memory for what clients keep between their rounds where they take turns (see "
        "`optimizer_state`), and for SCAFFOLD; what goes beyond is in files of the run's folder",
    )
    prox_mu: NotNegative = Field(
        0.0, description="mu of FedProx: local steps add mu / 2 ||w - w_t||^2 to the loss; docs/training.md; 0: none"
    )
    scaffold: bool = Field(
        False, description="correct local gradients by SCAFFOLD's control variates; docs/training.md"
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep only the decoder layers' inputs, and what attention and the experts give; backward computes "
        "the rest again",
    )
    save_every: Count = Field(0, description="rounds between saved adapters; 0: only at the end")
    schedule_by: Literal["flops", "measured"] = Field(
        "flops",
        description="what turns cost in the schedule of groups. flops: the model's count, so that a run repeats to the "
        "bit; measured: that over each group's speed in the rounds before, for devices that are not alike",
    )
    round_deadline_s: Positive | None = Field(
        None,
        description="seconds after which a client stops and merges what it has, and turns that have not begun are left "
        "out; null: none",
    )
    patience: PositiveInt | None = Field(
        None, description="evaluations without a lower `eval/loss_weighted` after which the run ends; null: never"
    )
    save_best: bool = Field(False, description="keep the adapter of the best evaluation; with `patience` it always is")
    max_bad_steps: Count = Field(
        3, description="steps of a round skipped for NaN or Inf, beyond which a client sits the round out"
    )

    @property
    def keeps_best(self) -> bool:
        """Return whether the adapter of the best evaluation is kept."""
        return self.save_best or self.patience is not None

    @model_validator(mode="before")
    @classmethod
    def _epochs_in_place_of_steps(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("local_epochs") is None:
            return value
        if value.get("local_steps") is not None:
            raise BelowKeyError(
                f"local_epochs: {value['local_epochs']!r} excludes local_steps, which is {value['local_steps']!r}; "
                "leave one of them out, or set it to null"
            )
        return value | {"local_steps": None}

    @model_validator(mode="after")
    def _steps_or_epochs(self) -> TrainConfig:
        if self.local_steps is None and self.local_epochs is None:
            raise BelowKeyError("local_steps: null needs local_epochs; give one of them")
        if self.warmup_rounds >= self.rounds:
            raise BelowKeyError(
                f"warmup_rounds: {self.warmup_rounds} leaves none of {self.rounds} rounds for the full learning rate; "
                "use fewer"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved, from which a job resumes after it was stopped or died; see checkpoint/."""

    every: Count = Field(1, description="rounds between checkpoints; 0: only when the job is asked to stop")
    keep: PositiveInt = Field(2, description="number of newest checkpoints to keep")
    grace_s: Positive | None = Field(
        None, description="seconds from SIGTERM or SIGUSR1 to the end, saved or not; null: as long as saving takes"
    )


class EvalConfig(Section):
    """Evaluation on all evaluation rows, once for each distinct client model."""

    every: PositiveInt = Field(
        1, description="rounds between evaluations; the first state and the last round always are"
    )
    batch_size: PositiveInt = Field(16, description="rows that a rank evaluates at a time")
    generate: Count = Field(
        0, description="evaluation rows, the first ones, that are also answered in text, into `samples.jsonl`"
    )
