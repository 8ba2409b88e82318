"""Define the whole experiment as typed objects, validated once. No other file probes options.

`loading.py` reads it: a YAML file holds the experiment, a DeepSpeed JSON beside it the optimiser, ZeRO stage, precision
and batch size, and the model folder's `config.json` the number of experts. Nothing here imports torch, so a bad key
fails in milliseconds, before any process is started.
"""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from ubsmoe_ds.config.consistency import problems
from ubsmoe_ds.config.messages import one_of
from ubsmoe_ds.config.methods import PRESETS, with_preset
from ubsmoe_ds.config.population import written_out
from ubsmoe_ds.config.settings import Settings


class Experiment(Settings):
    """Hold everything a run needs. `loading.load_experiment` makes one; build one directly only in tests."""

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        whole = with_preset(written_out(value))
        own, train = value.get("train") or {}, whole.get("train")
        takes_turns = value.get("groups") is not None or value.get("sampling") is not None
        if takes_turns and isinstance(own, dict) and isinstance(train, dict) and "optimizer_state" not in own:
            whole["train"] = train | {"optimizer_state": "reset"}  # in place of what the preset says
        return whole

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"{value!r} is not a method; {one_of(value, PRESETS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for problem in problems(self):
            raise ValueError(problem)
        return self
