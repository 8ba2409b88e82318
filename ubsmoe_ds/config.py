"""The whole experiment as typed objects, validated once; no other module probes options.

A YAML file holds the experiment, a DeepSpeed JSON beside it the optimiser, ZeRO stage, precision and batch size, and
the model folder's `config.json` the number of experts. `config_file.py` reads them. Nothing here imports torch,
so that a bad key fails in milliseconds, before any process is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ubsmoe_ds.errors import UserError

BUILTIN_MODELS = {"builtin:tiny_olmoe": Path(__file__).parent / "models" / "tiny_olmoe"}
ZERO_STAGES = (0, 1, 2)

Fraction = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of every section: unknown keys, NaN and silent type changes are refused, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ClientConfig(Section):
    """One federated client: its own DeepSpeed world of `ranks` processes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    budget: Fraction  # beta: K_c = max(1, floor(K_max * beta))
    ranks: PositiveInt = 1
    expert_parallel: PositiveInt = 1
    capacity_factor: Annotated[float, Field(gt=0)] | None = None  # None: no token is dropped
    share: Annotated[float, Field(gt=0)] = 1.0  # of the training rows, relative to the other clients

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

    path: str = "builtin:tiny_olmoe"  # an HF folder of an OlmoeForCausalLM, with its tokenizer
    k_max: PositiveInt | None = None  # None: the checkpoint's num_experts_per_tok
    min_capacity: Annotated[int, Field(ge=1)] = 4  # DeepSpeed's floor of an expert's token slots


class LoraConfig(Section):
    """LoRA on the experts' gate, up and down projections, and on attention if asked."""

    rank: PositiveInt = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    attention: bool = False


class RouterConfig(Section):
    """The gate's own weights."""

    trainable: bool = True
    aux_loss: Annotated[float, Field(ge=0)] = 0.0  # coefficient of DeepSpeed's load-balancing loss


class DmrConfig(Section):
    """Dynamic Modulated Routing (paper); the clamps and the reading of N_p are documented in moe/gate.py."""

    enabled: bool = True
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
    """Universal Pseudo-Gradient: the estimator, and rho, its scale."""

    estimator: Literal["none", "expert_mean", "token_weighted", "dense_oracle"] = "token_weighted"
    rho: Literal["sparsity"] | Annotated[float, Field(gt=0)] = "sparsity"  # sparsity: 1 - K_c / M


class DataConfig(Section):
    """Where rows come from, and how they are dealt to the clients."""

    source: Annotated[str, Field(pattern=r"^(synthetic|jsonl:.+|hub:.+)$")] = "synthetic"
    eval_source: Annotated[str, Field(pattern=r"^(jsonl:.+|hub:.+)$")] | None = (
        None  # None: held-out questions of source
    )
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
        return value

    @field_validator("zero_optimization")
    @classmethod
    def _zero_stage(cls, value: dict[str, Any]) -> dict[str, Any]:
        stage = value.get("stage", 0)
        if stage not in ZERO_STAGES:
            raise ValueError(
                f"stage {stage!r} is not one of 0, 1, 2: DeepSpeed-MoE's experts cannot be partitioned further"
            )
        if value.get("offload_optimizer", {}).get("device", "none") != "none" or value.get("cpu_offload"):
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


class Experiment(Section):
    """Everything a run needs. `config_file.load_experiment` makes one; build one directly only in tests."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    output: str = "runs"
    overwrite: bool = False  # replace the folder of an earlier run of the same name
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    oversubscribe: bool = False  # several ranks may share one accelerator
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    router: RouterConfig = RouterConfig()
    dmr: DmrConfig = DmrConfig()
    pseudo_gradient: PseudoGradientConfig = PseudoGradientConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    deepspeed: DeepSpeedConfig
    clients: Annotated[list[ClientConfig], Field(min_length=1)]
    # read from the model folder, not from the YAML
    num_experts: PositiveInt
    k_max: PositiveInt

    @property
    def world_size(self) -> int:
        """Ranks of all clients together."""
        return sum(client.ranks for client in self.clients)

    @property
    def run_dir(self) -> Path:
        """Where this run writes."""
        return Path(self.output) / self.name

    @property
    def model_dir(self) -> Path:
        """The checkpoint's folder."""
        return model_folder(self.model.path)

    @property
    def candidates(self) -> int:
        """N_p, the experts per token whose logits phi may move. Ours: 2 K_max by default, clamped to the experts."""
        return self.dmr.candidates or min(2 * self.k_max, self.num_experts)

    def active_experts(self, client: ClientConfig) -> int:
        """K_c = max(1, floor(K_max * beta)) (paper; the clamp to 1 is ours)."""
        # the small term undoes binary rounding: floor(10 * 0.7) must be 7 although 10 * 0.7 < 7 in some formats
        return max(1, int(self.k_max * client.budget + 1e-9))

    def rho(self, client: ClientConfig) -> float:
        """Scale of the pseudo-gradient: the client's sparsity 1 - K_c / M, or the configured constant."""
        if self.pseudo_gradient.rho == "sparsity":
            return 1.0 - self.active_experts(client) / self.num_experts
        return self.pseudo_gradient.rho

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        for problem in _problems(self):
            raise ValueError(problem)
        return self


def _problems(exp: Experiment) -> list[str]:
    """Rules that span sections, each as one line naming key, value and remedy."""
    found = []
    names = [client.name for client in exp.clients]
    if len(set(names)) < len(names):
        repeated = sorted({n for n in names if names.count(n) > 1})
        found.append(f"clients: name {repeated[0]!r} appears more than once; names must differ")
    if exp.k_max > exp.num_experts:
        found.append(
            f"model.k_max: {exp.k_max} exceeds the model's {exp.num_experts} experts; use at most {exp.num_experts}"
        )
    if exp.dmr.candidates is not None and not exp.k_max <= exp.dmr.candidates <= exp.num_experts:
        found.append(
            f"dmr.candidates: {exp.dmr.candidates} (N_p) must lie between K_max {exp.k_max} and the "
            f"{exp.num_experts} experts of the model"
        )
    micro_batches = exp.deepspeed.gradient_accumulation_steps
    for i, client in enumerate(exp.clients):
        if exp.num_experts % client.expert_parallel:
            found.append(
                f"clients.{i}.expert_parallel: {client.expert_parallel} does not divide the model's {exp.num_experts} "
                f"experts (client {client.name!r})"
            )
        if exp.deepspeed.train_batch_size % (client.ranks * micro_batches):
            found.append(
                f"deepspeed.train_batch_size: {exp.deepspeed.train_batch_size} is not a multiple of ranks "
                f"{client.ranks} x gradient_accumulation_steps {micro_batches} of client {client.name!r}"
            )
    return found


def model_folder(path: str) -> Path:
    """The folder that `model.path` names: built in, or on disk."""
    if path.startswith("builtin:") and path not in BUILTIN_MODELS:
        raise UserError(f"model.path: {path!r} is not built in; use one of {sorted(BUILTIN_MODELS)} or a folder")
    return BUILTIN_MODELS.get(path, Path(path))
