"""The sections of an experiment, one class each: keys, defaults and the checks that need no other section."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ZERO_STAGES = (0, 1, 2)

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]  # of a folder


class Section(BaseModel):
    """Base of every section: unknown keys, NaN and silent type changes are refused, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ClientConfig(Section):
    """One federated client: its own DeepSpeed world of `ranks` processes."""

    name: Name
    budget: Fraction  # beta: K_c = max(1, floor(K_max * beta)), or the LoRA rank likewise; see `budget_scales`
    ranks: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # None: no token is dropped
    share: Annotated[float, Field(gt=0)] = 1.0  # of the training rows, relative to the other clients
    # rows of its own, read on its hosts alone; None: a share of data.source
    source: Annotated[str, Field(pattern=r"^(jsonl:.+|hub:.+)$")] | None = None
    lora_rank: PositiveInt | None = None  # None: from the budget where it scales ranks, else lora.rank
    hosts: Annotated[list[str], Field(min_length=1)] | None = None  # where its ranks must be; None: anywhere

    @model_validator(mode="after")
    def _whole_expert_groups(self) -> ClientConfig:
        if self.ranks % self.expert_parallel:
            raise ValueError(
                f"client {self.name!r} has ranks {self.ranks}, not a multiple of its expert_parallel "
                f"{self.expert_parallel}; every expert group needs all its ranks"
            )
        return self


class ModelConfig(Section):
    """Which checkpoint, and how many experts the richest client activates."""

    path: str = "builtin:tiny_olmoe"  # an HF folder with its tokenizer, or hub:NAME[@REVISION]
    k_max: PositiveInt | None = None  # None: the checkpoint's num_experts_per_tok
    min_capacity: Annotated[int, Field(ge=1)] = 4  # DeepSpeed's floor of an expert's token slots


class LoraConfig(Section):
    """LoRA on the experts' gate, up and down projections, and on attention if asked."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    attention: bool = False
    # HetLoRA's self-pruning; 0 means none
    prune_penalty: Annotated[float, Field(ge=0)] = 0.0  # lambda of sum ||B[:, tail]|| ||A[tail, :]||
    prune_gamma: Annotated[float, Field(gt=0, lt=1)] = 0.99  # the tail is what lies beyond floor(gamma r)
    prune_min_rank: PositiveInt = 1


class RouterConfig(Section):
    """The gate's own weights, and how those of few active experts are scaled; see moe/gate.py."""

    trainable: bool = True
    aux_loss: Annotated[float, Field(ge=0)] = 0.0  # coefficient of DeepSpeed's load-balancing loss
    gate_rescale: Literal["none", "power", "sum_to_one", "ratio", "learned"] = "none"
    gamma: Annotated[float, Field(ge=0)] = 0.5  # of gate_rescale power


class DmrConfig(Section):
    """Dynamic Modulated Routing (paper); the clamps and the reading of N_p are documented in moe/gate.py."""

    enabled: bool = False
    modulate: Literal["weights", "selection"] = "weights"  # selection: phi chooses, softmax(s) weighs
    candidates: PositiveInt | None = None  # N_p; None: 2 K_max, at most the number of experts
    phi_min: float = -1.0
    phi_max: float = 1.0
    penalty: Annotated[float, Field(ge=0)] = 0.1  # lambda of the range penalty
    zeta: Annotated[float, Field(ge=0, le=1)] = 0.7  # server momentum
    eps: Annotated[float, Field(gt=0)] = 1e-6

    @model_validator(mode="after")
    def _range(self) -> DmrConfig:
        if self.phi_min >= self.phi_max:
            raise ValueError(f"phi_min {self.phi_min} must be below phi_max {self.phi_max}")
        return self


class PseudoGradientConfig(Section):
    """Universal Pseudo-Gradient: the estimator, rho, its scale, and how much of a step it is computed from."""

    estimator: Literal["none", "expert_mean", "token_weighted", "linearised", "dense_oracle"] = "none"
    rho: Literal["sparsity"] | Annotated[float, Field(gt=0)] = "sparsity"  # sparsity: 1 - K_c / M
    tokens_per_expert: Annotated[int, Field(ge=1)] | None = None  # drawn from each micro-batch; null: all of them
    moment_share: Fraction = 1.0  # share of the experts' rows that the moments of `linearised` are taken from


class MergeConfig(Section):
    """What owners do with the clients' updates; see federation/merge.py and federation/server.py."""

    rule: Literal[
        "fedavg", "activation", "median", "trimmed_mean", "zero_pad", "hetlora", "flexlora", "flora", "florist"
    ] = "fedavg"
    temperature: Annotated[float, Field(ge=0)] = 1.0  # t of activation: weight ~ n_c f^t
    pseudo_weight: Annotated[float, Field(ge=0)] = 0.0  # of activation: what a pseudo-update counts as in f
    trim: Annotated[float, Field(gt=0, lt=0.5)] = 0.25  # of trimmed_mean: share cut off at either end
    energy: Fraction = 0.9  # tau of florist
    clip_norm: Annotated[float, Field(gt=0)] | None = None  # largest L2 norm of a client's update of a unit
    payload: Literal["fp32", "bf16"] = "fp32"
    server_optimizer: Literal["none", "momentum", "adam"] = "none"  # FedOpt, arXiv 2003.00295
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    server_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    server_eps: Annotated[float, Field(gt=0)] = 1e-3  # the paper's tau

    @field_validator("server_betas", mode="before")
    @classmethod
    def _betas_from_yaml(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class DataConfig(Section):
    """Where rows come from, and how they are dealt to the clients."""

    source: Annotated[str, Field(pattern=r"^(synthetic|jsonl:.+|hub:.+)$")] = "synthetic"
    eval_source: Annotated[str, Field(pattern=r"^(jsonl:.+|hub:.+)$")] | None = (
        None  # None: held-out questions of source
    )
    # instruction: as the rows have it; cloze: the question alone, answered by the text of a choice
    format: Literal["instruction", "cloze"] = "instruction"
    partition: Literal["iid", "dirichlet", "by_task"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0)] = 0.5  # of the Dirichlet; small is unequal
    rows: PositiveInt | None = None  # at most so many rows in all; for synthetic None means 4,000
    eval_rows: PositiveInt = 400  # at most so many evaluation rows
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the questions, where eval_source is None
    max_length: Annotated[int, Field(ge=8)] = 256  # tokens of a row; longer prompts lose their beginning


class TrainConfig(Section):
    """Rounds and local steps. Batch size, learning rate, clipping and ZeRO stage stand in the DeepSpeed JSON."""

    rounds: PositiveInt = 5
    local_steps: PositiveInt = 10
    optimizer_state: Literal["reset", "keep"] = "reset"  # between rounds
    save_every: Annotated[int, Field(ge=0)] = 0  # rounds between saved adapters; 0: only those of the end
    # seconds of local steps after which a client stops at the next step boundary and merges what it has
    round_deadline_s: Annotated[float, Field(gt=0)] | None = None
    max_bad_steps: Annotated[int, Field(ge=0)] = (
        3  # steps of a round with NaN or Inf, beyond which a client sits it out
    )


class CheckpointConfig(Section):
    """What a job can go on from after it was stopped or died; see checkpoint.py."""

    every: Annotated[int, Field(ge=0)] = 1  # rounds between checkpoints; 0: only when the job is asked to stop
    keep: PositiveInt = 2  # the newest so many are left
    grace_s: Annotated[float, Field(gt=0)] | None = None  # from SIGTERM or SIGUSR1 to the end, saved or not


class EvalConfig(Section):
    """Evaluation on all evaluation rows at each distinct K of the clients."""

    every: PositiveInt = 1  # rounds; the first state and the last round are always evaluated
    batch_size: PositiveInt = 16  # rows a rank takes at a time


class DeepSpeedConfig(Section):
    """The DeepSpeed JSON: the keys this program relies on, and those it passes on as they are (None: not given)."""

    train_batch_size: PositiveInt  # rows a client takes in one optimiser step, over all its ranks
    gradient_accumulation_steps: PositiveInt = 1
    gradient_clipping: Annotated[float, Field(ge=0)] = 0.0
    optimizer: dict[str, Any]
    zero_optimization: dict[str, Any] = {}
    bf16: dict[str, Any] = {}
    fp16: dict[str, Any] = {}
    scheduler: dict[str, Any] | None = None
    data_types: dict[str, Any] | None = None
    communication_data_type: str | None = None
    prescale_gradients: bool | None = None
    gradient_predivide_factor: float | None = None
    zero_allow_untested_optimizer: bool | None = None
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool | None = None
    memory_breakdown: bool | None = None
    dump_state: bool | None = None
    flops_profiler: dict[str, Any] | None = None
    comms_logger: dict[str, Any] | None = None

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
        """ZeRO stage: 0, 1 or 2."""
        return int(self.zero_optimization.get("stage", 0))

    @property
    def use_bf16(self) -> bool:
        """Whether weights and activations are bfloat16 (masters stay fp32)."""
        return bool(self.bf16.get("enabled", False))
