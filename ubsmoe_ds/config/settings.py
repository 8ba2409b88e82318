"""Declare the sections and keys of an experiment, and compute what follows from them. Nothing here imports torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from ubsmoe_ds.config.deepspeed_json import DeepSpeedConfig
from ubsmoe_ds.config.population import GroupConfig, SamplingConfig, Trainer, may_train
from ubsmoe_ds.config.sections import (
    ClientConfig,
    DataConfig,
    DmrConfig,
    Folder,
    LoraConfig,
    MergeConfig,
    ModelConfig,
    Name,
    PositiveInt,
    PseudoGradientConfig,
    RouterConfig,
    Section,
)
from ubsmoe_ds.config.training import CheckpointConfig, EvalConfig, TrainConfig
from ubsmoe_ds.models.hub import model_folder


class Settings(Section):
    """Hold everything a run needs, and what follows from it. `Experiment` checks that it fits together."""

    name: Name = Field(description="the run writes to the folder `output`/`name`")
    method: str = Field("ub_smoe", description="preset of config/methods.py, laid under everything else")
    budget_scales: Literal["experts", "lora_rank"] = Field(
        "experts", description="experts: K_c = floor(K_max beta); lora_rank: rank_c = floor(rank beta), K_max experts"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(0, description="seed of all random draws")
    output: Folder = Field("runs", description="folder of runs")
    overwrite: bool = Field(False, description="replace the folder of an earlier run of the same name")
    accelerator: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA where there is one")
    oversubscribe: bool = Field(False, description="let several ranks share one accelerator")
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
    fault_tolerance: Literal["abort", "shrink"] = Field(
        "abort",
        description="when a rank dies: abort ends the job; shrink continues without its client, or group (Open MPI)",
    )
    min_clients: PositiveInt = Field(1, description="with shrink: end the job when fewer clients are left")
    host_timeout_s: Annotated[float, Field(ge=1)] = Field(
        60, description="end a job on several hosts when one of them is silent for this many seconds"
    )
    hang_timeout_s: Annotated[float, Field(ge=1)] | None = Field(
        1200,
        description="end a job of which a rank makes no progress for this many seconds; null: nobody watches",
    )
    deepspeed: DeepSpeedConfig
    clients: Annotated[list[ClientConfig], Field(min_length=1)]
    groups: Annotated[list[GroupConfig], Field(min_length=1)] | None = Field(
        None, description="DeepSpeed worlds that train clients in turn; null: one for each client"
    )
    sampling: SamplingConfig | None = Field(None, description="clients that take part in a round; null: all")
    num_experts: PositiveInt = Field(description="experts of a layer; read from the model folder, cannot be set")
    k_max: PositiveInt = Field(description="K_max; `model.k_max` or the model's, cannot be set here")

    @property
    def trainers(self) -> Sequence[Trainer]:
        """Return what a DeepSpeed world is made for: each of the groups, or each client where there are none."""
        return self.clients if self.groups is None else self.groups

    @property
    def takes_turns(self) -> bool:
        """Return whether a group may train several clients, or a client be out of a round."""
        return self.groups is not None or self.sampling is not None

    @property
    def cohort_size(self) -> int:
        """Return the most clients of a round."""
        return len(self.clients) if self.sampling is None else self.sampling.size(len(self.clients))

    def trained_by(self, client: int, group: int) -> ClientConfig:
        """Return a client's section with the ranks and expert parallelism of the group that trains it."""
        if not self.takes_turns:
            return self.clients[client]
        trainer = self.trainers[group]
        changes = {"ranks": trainer.ranks, "expert_parallel": trainer.expert_parallel}
        return self.clients[client].model_copy(update=changes)

    def allowed_groups(self, client: int) -> list[int]:
        """Return the numbers of the groups that may train a client."""
        if self.groups is None:
            return [client]
        return [number for number, group in enumerate(self.groups) if may_train(group, self.clients[client])]

    @property
    def clients_left(self) -> list[int]:
        """Return the clients that some group may train: all, but for those that deaths have cut off (`without`)."""
        return [client for client in range(len(self.clients)) if self.allowed_groups(client)]

    def clients_for(self, group: int) -> list[int]:
        """Return the clients that a group may train."""
        return [client for client in range(len(self.clients)) if group in self.allowed_groups(client)]

    def clients_of(self, group: int) -> list[int]:
        """Return the clients for whose rows a group answers before the first round: each client has one such group."""
        allowed = (self.allowed_groups(client) for client in range(len(self.clients)))
        return [client for client, groups in enumerate(allowed) if groups[client % len(groups)] == group]

    def without(self, lost: Collection[int]) -> Self:
        """Return what is left of the experiment when groups of these numbers have died (`fault_tolerance: shrink`).

        Where all clients take part in every round, each with a group of its own, they go with their groups. Where
        clients take turns all of them stay, under the numbers that rows, cohorts and checkpoints know them by; one that
        no group left may train has no `allowed_groups`.
        """
        left = [trainer for number, trainer in enumerate(self.trainers) if number not in lost]
        if not self.takes_turns:
            return self.model_copy(update={"clients": left})
        if self.groups is not None:
            return self.model_copy(update={"groups": left})
        keys = ("name", "ranks", "expert_parallel", "hosts")
        groups = [GroupConfig(**{key: getattr(client, key) for key in keys}) for client in left]
        clients = [client.model_copy(update={"groups": [client.name]}) for client in self.clients]
        return self.model_copy(update={"groups": groups, "clients": clients})

    @property
    def world_size(self) -> int:
        """Return the number of ranks of all groups together."""
        return sum(trainer.ranks for trainer in self.trainers)

    @property
    def run_dir(self) -> Path:
        """Return the folder that this run writes to."""
        return Path(self.output) / self.name

    @property
    def model_dir(self) -> Path:
        """Return the model's folder with config and tokenizer; a model from the hub may lack its weights there."""
        return model_folder(self.model.path)

    @property
    def weights_dir(self) -> Path:
        """Return the model's folder with its weights, which are downloaded first if need be."""
        return model_folder(self.model.path, weights=True)

    @property
    def candidates(self) -> int:
        """Return N_p, the experts per token whose logits phi moves [ours: 2 K_max by default, at most all experts]."""
        return self.dmr.candidates or min(2 * self.k_max, self.num_experts)

    def active_experts(self, client: ClientConfig) -> int:
        """Return K_c = max(1, floor(K_max beta)) [paper; clamp to 1: ours]; K_max where budgets scale LoRA ranks."""
        return _share(self.k_max, client.budget) if self.budget_scales == "experts" else self.k_max

    def lora_rank(self, client: ClientConfig) -> int:
        """Return a client's first LoRA rank: its own key, else from its budget where budgets scale LoRA ranks."""
        if client.lora_rank is not None:
            return client.lora_rank
        return _share(self.lora.rank, client.budget) if self.budget_scales == "lora_rank" else self.lora.rank

    def lora_alpha(self, lora_rank: int) -> float:
        """Return the alpha with which alpha / LoRA rank is the scaling at this LoRA rank, rsLoRA or not."""
        return self.lora.alpha * math.sqrt(lora_rank) if self.lora.rslora else self.lora.alpha

    @property
    def lora_ranks(self) -> list[int]:
        """Return the first LoRA rank of each client."""
        return [self.lora_rank(client) for client in self.clients]

    def settings(self, client: ClientConfig) -> DeepSpeedConfig:
        """Return the DeepSpeed section with a client's own batch and learning rate."""
        keys = ("train_batch_size", "gradient_accumulation_steps")
        changes = {key: getattr(client, key) for key in keys if getattr(client, key) is not None}
        if client.lr is not None:
            optimizer = self.deepspeed.optimizer
            changes["optimizer"] = optimizer | {"params": optimizer.get("params", {}) | {"lr": client.lr}}
        return self.deepspeed.model_copy(update=changes)

    def local_steps(self, client: ClientConfig, rows: int) -> int:
        """Return the local steps of a client with so many training rows in a round.

        Passes over its rows become whole steps, rounded up: the last one goes on into the next pass.
        """
        steps = client.local_steps or self.train.local_steps
        if steps is not None:
            return steps
        assert self.train.local_epochs is not None  # `TrainConfig` asks for one of them
        # the small term undoes binary rounding: 0.1 epochs of 160 rows are two batches of 8
        return max(1, math.ceil(self.train.local_epochs * rows / self.settings(client).train_batch_size - 1e-9))

    @property
    def views(self) -> list[str]:
        """Return the name of each client's view, the model that it evaluates.

        Clients of one K hold the same model after a merge and share a view, such as "k4". A client has its own view,
        under its name, if it learns something for itself alone or has its own LoRA rank. Where clients take turns,
        those of one K and one LoRA rank share a view, such as "k4-r2".
        """
        own_ranks = len(set(self.lora_ranks)) > 1
        own_model = self.router.gate_rescale == "learned" or self.lora.prune_penalty > 0
        if own_model or (own_ranks and not self.takes_turns):
            return [client.name for client in self.clients]
        ks, ranks = [self.active_experts(client) for client in self.clients], self.lora_ranks
        return [f"k{k}-r{rank}" if own_ranks else f"k{k}" for k, rank in zip(ks, ranks, strict=True)]

    def rho(self, client: ClientConfig) -> float:
        """Return the weight of the pseudo-gradient: scale (1 - K_c / M), or scale times a constant."""
        config = self.pseudo_gradient
        rho = 1.0 - self.active_experts(client) / self.num_experts if config.rho == "sparsity" else config.rho
        return config.scale * rho


def _share(whole: int, budget: float) -> int:
    """Return max(1, floor(whole * budget))."""
    # the small term undoes binary rounding: floor(10 * 0.7) must be 7, although 10 * 0.7 < 7 in some formats
    return max(1, int(whole * budget + 1e-9))
