"""The whole experiment as typed objects, validated once; no other module probes options.

A YAML file holds the experiment, a DeepSpeed JSON beside it the optimiser, ZeRO stage, precision and batch size, and
the model folder's `config.json` the number of experts. `config_file.py` reads them. Nothing here imports torch,
so that a bad key fails in milliseconds, before any process is started.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ubsmoe_ds.config.methods import PRESETS, with_preset
from ubsmoe_ds.config.sections import (
    CheckpointConfig,
    ClientConfig,
    DataConfig,
    DeepSpeedConfig,
    DmrConfig,
    EvalConfig,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    Name,
    PositiveInt,
    PseudoGradientConfig,
    RouterConfig,
    Section,
    TrainConfig,
)
from ubsmoe_ds.models.hub import model_folder

ELEMENTWISE_RULES = ("fedavg", "activation", "median", "trimmed_mean")  # need one LoRA rank for all clients


class Experiment(Section):
    """Everything a run needs. `config_file.load_experiment` makes one; build one directly only in tests."""

    name: Name
    method: str = "ub_smoe"  # a preset of methods.py, laid under everything else
    budget_scales: Literal["experts", "lora_rank"] = "experts"  # what a client's budget cuts down
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
    merge: MergeConfig = MergeConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    fault_tolerance: Literal["abort", "shrink"] = "abort"  # when a rank dies; shrink: the other clients go on
    min_clients: PositiveInt = 1  # of shrink: fewer survivors end the job
    host_timeout_s: Annotated[float, Field(ge=1)] = 60  # a host that is not heard from for longer ends the job
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
        """K_c = max(1, floor(K_max * beta)) (paper; the clamp to 1 is ours); K_max where budgets scale ranks."""
        return _share(self.k_max, client.budget) if self.budget_scales == "experts" else self.k_max

    def lora_rank(self, client: ClientConfig) -> int:
        """LoRA rank of a client at the start: its own key, else from its budget where budgets scale ranks."""
        if client.lora_rank is not None:
            return client.lora_rank
        return _share(self.lora.rank, client.budget) if self.budget_scales == "lora_rank" else self.lora.rank

    @property
    def lora_ranks(self) -> list[int]:
        """Rank of each client at the start."""
        return [self.lora_rank(client) for client in self.clients]

    @property
    def views(self) -> list[str]:
        """Name of the model that each client evaluates: "k4" where K tells them apart, else the client's own name.

        A client's model is its own where it has learned something for itself alone, or where its LoRA rank is.
        """
        alone = self.router.gate_rescale == "learned" or len(set(self.lora_ranks)) > 1 or self.lora.prune_penalty > 0
        return [client.name if alone else f"k{self.active_experts(client)}" for client in self.clients]

    def rho(self, client: ClientConfig) -> float:
        """Scale of the pseudo-gradient: the client's sparsity 1 - K_c / M, or the configured constant."""
        if self.pseudo_gradient.rho == "sparsity":
            return 1.0 - self.active_experts(client) / self.num_experts
        return self.pseudo_gradient.rho

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, value: Any) -> Any:
        return with_preset(value) if isinstance(value, dict) else value

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"{value!r} is no method; use one of {', '.join(PRESETS)}")
        return value

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
    if exp.min_clients > len(exp.clients):
        found.append(f"min_clients: {exp.min_clients} exceeds the {len(exp.clients)} clients; use at most that")
    without = [client.name for client in exp.clients if client.source is None]
    if 0 < len(without) < len(exp.clients):
        found.append(
            f"clients: {', '.join(without)} have no source of their own, the others have; give all clients one, or none"
        )
    if not without and exp.data.eval_source is None:
        found.append(
            "data.eval_source: not set, and no client's rows may serve all clients as evaluation rows; set it to rows "
            "that all may read"
        )
    found += _merge_problems(exp)
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


def _merge_problems(exp: Experiment) -> list[str]:
    """Which rules go with which ranks and options."""
    found = []
    rule, ranks = exp.merge.rule, exp.lora_ranks
    if rule in ELEMENTWISE_RULES and (len(set(ranks)) > 1 or exp.lora.prune_penalty):
        ranks_text = " ".join(map(str, ranks)) + (" and pruning" if exp.lora.prune_penalty else "")
        found.append(
            f"merge.rule: {rule!r} needs equal LoRA ranks, the clients have {ranks_text}; use zero_pad, hetlora, "
            "flexlora, flora or florist"
        )
    if exp.lora.prune_penalty and rule == "flora":
        found.append("lora.prune_penalty: flora starts its adapters anew each round, there is no rank to prune; set 0")
    if rule not in ELEMENTWISE_RULES and exp.merge.clip_norm is not None:
        found.append(
            f"merge.clip_norm: {exp.merge.clip_norm} does not go with merge.rule {rule!r}, whose factors are no "
            f"update; leave it out, or use one of {', '.join(ELEMENTWISE_RULES)}"
        )
    if rule not in ELEMENTWISE_RULES and exp.merge.server_optimizer != "none":
        found.append(
            f"merge.server_optimizer: {exp.merge.server_optimizer!r} does not go with merge.rule {rule!r}, whose "
            f"factors change their basis each round; use none, or one of {', '.join(ELEMENTWISE_RULES)}"
        )
    if max(ranks) > exp.lora.rank:
        found.append(f"clients: lora_rank {max(ranks)} exceeds lora.rank {exp.lora.rank}, the rank of the whole")
    return found


def _share(whole: int, budget: float) -> int:
    """max(1, floor(whole * budget))."""
    # the small term undoes binary rounding: floor(10 * 0.7) must be 7 although 10 * 0.7 < 7 in some formats
    return max(1, int(whole * budget + 1e-9))
