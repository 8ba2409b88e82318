"""Declare the keys of the DeepSpeed JSON: type, default, bounds and meaning, like the sections in sections.py."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from ubsmoe_ds.config.sections import NotNegative, PositiveInt, Section

ZERO_STAGES = (0, 1, 2)


class DeepSpeedConfig(Section):
    """The DeepSpeed JSON: keys that this program relies on, and keys that it passes on (null: not given)."""

    train_batch_size: PositiveInt = Field(description="rows of one optimiser step of a client, over all its ranks")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches of a step")
    gradient_clipping: NotNegative = Field(0.0, description="largest norm of a client's gradient; 0: no clipping")
    optimizer: dict[str, Any] = Field(description="DeepSpeed's: `type`, and `params` such as `lr`")
    zero_optimization: dict[str, Any] = Field({}, description="DeepSpeed's: `stage` 0, 1 or 2")
    bf16: dict[str, Any] = Field({}, description="`enabled`: weights in bfloat16, fp32 masters")
    fp16: dict[str, Any] = Field({}, description="must not be enabled")
    scheduler: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")
    data_types: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")
    communication_data_type: str | None = Field(None, description="DeepSpeed's, passed on")
    prescale_gradients: bool | None = Field(None, description="DeepSpeed's, passed on")
    gradient_predivide_factor: float | None = Field(None, description="DeepSpeed's, passed on")
    zero_allow_untested_optimizer: bool | None = Field(None, description="DeepSpeed's, passed on")
    steps_per_print: PositiveInt | None = Field(None, description="DeepSpeed's, passed on; null: never")
    wall_clock_breakdown: bool | None = Field(None, description="DeepSpeed's, passed on")
    memory_breakdown: bool | None = Field(None, description="DeepSpeed's, passed on")
    dump_state: bool | None = Field(None, description="DeepSpeed's, passed on")
    flops_profiler: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")
    comms_logger: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")

    @field_validator("optimizer")
    @classmethod
    def _optimizer_type(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("type"), str):
            raise ValueError(f"type {value.get('type')!r} must name an optimiser, such as AdamW")
        params = value.get("params", {})
        if not isinstance(params, dict):
            raise ValueError(f"params {params!r} must be key: value pairs, such as lr: 0.001")
        rate = params.get("lr", 0.001)
        if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
            raise ValueError(f"params.lr {rate!r} must be a number, at least 0")
        return value

    @field_validator("bf16", "fp16")
    @classmethod
    def _enabled(cls, value: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(value.get("enabled", False), bool):
            raise ValueError(f"enabled {value['enabled']!r} must be true or false")
        return value

    @field_validator("zero_optimization")
    @classmethod
    def _zero_stage(cls, value: dict[str, Any]) -> dict[str, Any]:
        stage = value.get("stage", 0)
        if isinstance(stage, bool) or stage not in ZERO_STAGES:
            raise ValueError(
                f"stage {stage!r} is not one of 0, 1, 2: DeepSpeed-MoE's experts cannot be partitioned further"
            )
        if value.get("offload_optimizer") not in (None, {}, {"device": "none"}) or value.get("cpu_offload"):
            raise ValueError("offload_optimizer is not supported (adapters are small); remove it")
        if value.get("compute_grad_norm") is False:
            raise ValueError(
                "compute_grad_norm false is not supported: the norm is logged and scales the pseudo-gradient"
            )
        return value

    @field_validator("fp16")
    @classmethod
    def _no_fp16(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("enabled"):
            raise ValueError(
                "enabled true is not supported (loss scaling would scale the pseudo-gradient); use bf16 or fp32"
            )
        return value

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage: 0, 1 or 2."""
        return int(self.zero_optimization.get("stage", 0))

    @property
    def use_bf16(self) -> bool:
        """Return whether weights and activations are bfloat16 (masters stay fp32)."""
        return bool(self.bf16.get("enabled", False))
