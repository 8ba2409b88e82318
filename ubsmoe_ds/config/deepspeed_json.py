"""Declare the keys of the DeepSpeed JSON: type, default, bounds and meaning, like the sections in sections.py.

What DeepSpeed would refuse on every rank is refused here, before a process starts.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, field_validator, model_validator

from ubsmoe_ds.config.messages import BelowKeyError, check, did_you_mean, one_of, short
from ubsmoe_ds.config.optimizers import (
    DEEPSPEED_OPTIMIZERS,
    DEEPSPEED_SCHEDULERS,
    TORCH_OPTIMIZERS,
    TORCH_SCHEDULERS,
    UNSUPPORTED,
    Parameters,
)
from ubsmoe_ds.config.sections import NotNegative, Positive, PositiveInt, Section

ZERO_STAGES = (0, 1, 2)
FP32 = ("fp32", "float32", "float", "torch.float32")  # DeepSpeed's names of dtypes
BF16 = ("bf16", "bfloat16", "torch.bfloat16")


def _whole(value: Any) -> Any:
    """Return a float such as 5e8 as the whole number that DeepSpeed takes it for."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**63)]


def _section(name: str, flags: str, wholes: str = "", others: dict[str, Any] | None = None) -> type[Section]:
    """Return a section of DeepSpeed's, declared by the names of its keys."""
    fields: dict[str, Any] = dict.fromkeys(flags.split(), (bool, None))
    fields |= dict.fromkeys(wholes.split(), (Whole, None))
    return create_model(name, __base__=Section, **fields | {key: (kind, None) for key, kind in (others or {}).items()})


ZERO = _section(
    "zero_optimization",
    """contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions
    compute_grad_norm elastic_checkpoint legacy_stage1 load_from_fp32_weights stage3_gather_fp16_weights_on_model_save
    stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save
    ignore_unused_parameters round_robin_gradients parameter_alignment zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint
    override_module_apply log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory""",
    """stage allgather_bucket_size sub_group_size stage3_prefetch_bucket_size stage3_param_persistence_threshold
    stage3_model_persistence_threshold stage3_max_live_parameters stage3_max_reuse_distance
    stage3_module_granularity_threshold zero_hpz_partition_size""",
    {
        "reduce_bucket_size": Annotated[int, BeforeValidator(_whole), Field(gt=0, lt=2**63)],
        **dict.fromkeys(("offload_optimizer", "offload_param", "leaf_module"), dict[str, Any] | None),
        **dict.fromkeys(("overlap_comm", "cpu_offload", "cpu_offload_param"), bool | None),
        "cpu_offload_use_pin_memory": bool | None,
    },
)
NO = Literal[False]
BF16_KEYS = _section(
    "bf16",
    "enabled immediate_grad_update check_grad_overflow",
    others={"bf16_master_weights_and_grads": NO, "bf16_optimizer_states": NO},  # masters are fp32 here
)
FP16_KEYS = _section(
    "fp16",
    "enabled auto_cast consecutive_hysteresis fp16_master_weights_and_grads",
    "initial_scale_power loss_scale_window hysteresis min_loss_scale",
    {"loss_scale": NotNegative},
)
PROFILER = _section(
    "flops_profiler",
    "enabled detailed",
    "profile_step top_modules",
    {"recompute_fwd_factor": NotNegative, "module_depth": Annotated[int, Field(ge=-1)], "output_file": str | None},
)
COMMS = _section("comms_logger", "enabled prof_all verbose debug", others={"prof_ops": list[str]})
DTYPE = Literal["fp32", "float32", "float", "torch.float32", "bf16", "bfloat16", "torch.bfloat16"] | None
DATA_TYPES = _section(
    "data_types",
    "",
    others={
        **dict.fromkeys(("grad_accum_dtype", "param_dtype", "buffer_dtype"), DTYPE),
        "keep_in_fp32_modules": Literal["auto"] | list[str],
    },
)


class DeepSpeedConfig(Section):
    """The DeepSpeed JSON: keys that this program relies on, and keys that it passes on (null: not given)."""

    train_batch_size: PositiveInt = Field(description="rows of one optimiser step of a client, over all its ranks")
    gradient_accumulation_steps: PositiveInt = Field(1, description="micro-batches of a step")
    gradient_clipping: NotNegative = Field(0.0, description="largest norm of a client's gradient; 0: no clipping")
    optimizer: dict[str, Any] = Field(
        description="`type` (Adam, AdamW, Adagrad, SGD, Adadelta, Adamax, ASGD, NAdam, RAdam, RMSprop, Rprop), and "
        "`params` such as `lr`; a parameter that is not given is DeepSpeed's"
    )
    zero_optimization: dict[str, Any] = Field({}, description="DeepSpeed's: `stage` 0, 1 or 2")
    bf16: dict[str, Any] = Field({}, description="`enabled`: weights in bfloat16, fp32 masters")
    fp16: dict[str, Any] = Field({}, description="must not be enabled")
    scheduler: dict[str, Any] | None = Field(
        None,
        description="`type` (LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR, or a plain one "
        "of torch), and `params`",
    )
    data_types: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = Field(None, description="DeepSpeed's, passed on")
    prescale_gradients: bool | None = Field(None, description="DeepSpeed's, passed on")
    gradient_predivide_factor: Positive | None = Field(None, description="DeepSpeed's, passed on")
    zero_allow_untested_optimizer: bool | None = Field(None, description="DeepSpeed's, passed on")
    steps_per_print: PositiveInt | None = Field(None, description="DeepSpeed's, passed on; null: never")
    wall_clock_breakdown: bool | None = Field(None, description="DeepSpeed's, passed on")
    memory_breakdown: bool | None = Field(None, description="DeepSpeed's, passed on")
    dump_state: bool | None = Field(None, description="DeepSpeed's, passed on")
    flops_profiler: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")
    comms_logger: dict[str, Any] | None = Field(None, description="DeepSpeed's, passed on")

    @field_validator("optimizer")
    @classmethod
    def _optimizer(cls, value: dict[str, Any]) -> dict[str, Any]:
        kind, params = _named(value, "an optimiser, such as AdamW")
        known = _optimizer_table(kind)
        if known is None and kind.lower() in UNSUPPORTED:
            raise ValueError(f"type {kind!r} is not supported: {UNSUPPORTED[kind.lower()]}; use AdamW")
        if known is None:
            names = ["Adam", "AdamW", "Adagrad", *TORCH_OPTIMIZERS]
            raise ValueError(f"type {kind!r} is no optimiser that works here; {one_of(kind, names)}")
        if params.get("torch_adam") is False and kind.lower() in ("adam", "adamw"):
            raise BelowKeyError(
                "params.torch_adam: false is not supported: DeepSpeed's Adam keeps its step as a number that a "
                "checkpoint cannot restore; leave it out"
            )
        if "max_grad_norm" in params:
            raise BelowKeyError("params.max_grad_norm: is no parameter; use deepspeed.gradient_clipping")
        return value | ({"params": check(known, params, "params")} if "params" in value else {})

    @field_validator("scheduler")
    @classmethod
    def _scheduler(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        kind, params = _named(value, "a scheduler, such as WarmupLR")
        known = DEEPSPEED_SCHEDULERS | TORCH_SCHEDULERS
        if kind not in known:
            raise ValueError(f"type {kind!r} is no scheduler that works here; {one_of(kind, known)}")
        return value | {"params": check(known[kind], params, "params")}

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
        for key in ("offload_optimizer", "offload_param"):
            if value.get(key) not in (None, {}, {"device": "none"}) or value.get("cpu_offload"):
                raise ValueError(f"{key} is not supported (adapters are small); remove it")
        if value.get("compute_grad_norm") is False:
            raise ValueError(
                "compute_grad_norm false is not supported: the norm is logged and scales the pseudo-gradient"
            )
        return check(ZERO, value, "")

    @field_validator("fp16")
    @classmethod
    def _no_fp16(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("enabled"):
            raise ValueError(
                "enabled true is not supported (loss scaling would scale the pseudo-gradient); use bf16 or fp32"
            )
        return check(FP16_KEYS, value, "")

    @field_validator("bf16")
    @classmethod
    def _bf16_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        return check(BF16_KEYS, value, "")

    @field_validator("flops_profiler", "comms_logger", "data_types")
    @classmethod
    def _passed_on(cls, value: dict[str, Any] | None, info: Any) -> dict[str, Any] | None:
        sections = {"flops_profiler": PROFILER, "comms_logger": COMMS, "data_types": DATA_TYPES}
        return None if value is None else check(sections[info.field_name], value, "")

    @model_validator(mode="after")
    def _plain(self) -> DeepSpeedConfig:
        """Refuse what DeepSpeed replaces by another, or cannot make, unless it trains in fp32 and without ZeRO."""
        schedule = (self.scheduler or {}).get("type")
        plain_only = {
            "optimizer": self.optimizer["type"].lower() == "adagrad" and self.optimizer["type"],
            "scheduler": schedule in TORCH_SCHEDULERS and schedule,
        }
        for key, kind in plain_only.items():
            if kind and (self.zero_stage > 0 or self.use_bf16):
                raise BelowKeyError(f"{key}: type {kind!r} works in fp32 and at ZeRO stage 0 only; use another one")
        return self

    @model_validator(mode="after")
    def _together(self) -> DeepSpeedConfig:
        kind, types = self.optimizer["type"], self.data_types or {}
        adam = kind.lower() in ("adam", "adamw")
        if self.zero_stage > 0 and not adam and not self.zero_allow_untested_optimizer:
            raise BelowKeyError(
                f"optimizer: type {kind!r} is untested with ZeRO; set deepspeed.zero_allow_untested_optimizer=true, "
                "or zero_optimization.stage=0"
            )
        own = BF16 if self.use_bf16 else FP32
        strict = ("param_dtype", "grad_accum_dtype") if self.zero_stage == 0 else ("param_dtype",)
        for key in strict:
            if types.get(key) is not None and types[key] not in own:
                raise BelowKeyError(
                    f"data_types.{key}: {types[key]!r} does not go with weights in {own[0]} at ZeRO stage "
                    f"{self.zero_stage}; use {own[0]}, or leave it out"
                )
        return self

    @property
    def moments(self) -> int:
        """Return how many values the optimiser keeps for each weight."""
        table, params = _optimizer_table(self.optimizer["type"]), self.optimizer.get("params", {})
        assert table is not None  # `_optimizer` has refused other names
        return table.kept + sum(bool(params.get(name)) for name in table.keeps_more)

    @property
    def zero_stage(self) -> int:
        """Return the ZeRO stage: 0, 1 or 2."""
        return int(self.zero_optimization.get("stage", 0))

    @property
    def use_bf16(self) -> bool:
        """Return whether weights and activations are bfloat16 (masters stay fp32)."""
        return bool(self.bf16.get("enabled", False))


def _optimizer_table(kind: str) -> type[Parameters] | None:
    return DEEPSPEED_OPTIMIZERS.get(kind.lower()) or TORCH_OPTIMIZERS.get(kind)


def _named(value: dict[str, Any], what: str) -> tuple[str, dict[str, Any]]:
    """Return `type` and `params` of a mapping that holds nothing else."""
    for key in value:
        if key not in ("type", "params"):
            raise BelowKeyError(f"{key}: unknown key; it holds type and params{did_you_mean(key, ('type', 'params'))}")
    kind, params = value.get("type"), value.get("params", {})
    if not isinstance(kind, str):
        raise ValueError(f"type {kind!r} must name {what}")
    if not isinstance(params, dict):
        raise ValueError(f"params {short(params)} must be key: value pairs")
    return kind, params
