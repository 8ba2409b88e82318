"""What the memory, FLOPs and messages of one rank depend on, as plain numbers, and what follows from them directly.

Tokens T, rows of experts N (routes, or slots under expert parallelism).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ubsmoe_ds.models.cost import ModelShape

FP32 = 4  # bytes
FULLEST_EXPERT = 1.75  # its load over the mean where nothing is dropped: assumed, from the built-in model's routing


class Batch(NamedTuple):
    """What a rank computes at a time: padded rows, and the positions whose logits are asked for."""

    rows: int
    length: int
    answers: int

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class RankLoad:
    """All that the memory of one rank depends on.

    shape: with the client's own LoRA rank; k: active experts.
    capacity: slots of an expert over the mean load, None: nothing is dropped; min_capacity: least slots.
    moments: values that the optimiser keeps of a weight; reduce_bucket: elements, of ZeRO.
    router, modulated: whether the router and phi are trained.
    estimator, tokens_per_expert: of pseudo-gradients.
    training: a micro-batch; micro_batches: of a step; evaluation: a batch of packed rows.
    clients, world: of the job, and its ranks; receivers: those that get a copy of an average unit back, whose LoRA
    then has reply_rank: FLoRA's stack of all.
    reducible: whether sums are formed on the way to owners; text_bytes: of all rows, which every rank reads.
    """

    shape: ModelShape
    k: int
    ranks: int
    expert_parallel: int
    capacity: float | None
    min_capacity: int
    bf16: bool
    zero_stage: int
    moments: int
    reduce_bucket: float
    router: bool
    modulated: bool
    estimator: str
    tokens_per_expert: int | None
    training: Batch
    micro_batches: int
    evaluation: Batch
    clients: int
    world: int
    receivers: float
    reply_rank: int
    reducible: bool
    text_bytes: float
    on_cpu: bool

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.bf16 else FP32

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return self.shape.layers - self.shape.dense_layers

    @property
    def local_experts(self) -> int:
        """Of each layer, on this rank."""
        return self.shape.num_experts // self.expert_parallel


class Trained(NamedTuple):
    """Trainable elements of one rank."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Both."""
        return self.dense + self.experts


def trained_elements(load: RankLoad) -> Trained:
    """The router, phi and attention LoRA on every rank; the experts' LoRA on those that hold them."""
    s = load.shape
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    dense = load.sparse_layers * (s.num_experts * s.hidden * load.router + s.num_experts * load.modulated)
    if s.lora_attention:
        dense += s.layers * s.lora_rank * (2 * (s.hidden + q) + 2 * (s.hidden + kv))
    experts = load.sparse_layers * load.local_experts * 3 * s.lora_rank * (s.hidden + s.expert_width)
    return Trained(dense, experts)


def at_rank(load: RankLoad, rank: int) -> RankLoad:
    """The same with another LoRA rank."""
    return replace(load, shape=replace(load.shape, lora_rank=rank))


def expert_rows(load: RankLoad, tokens: int, k: int, dropping: bool) -> int:
    """Rows that the experts of one rank compute for a batch of so many tokens on each rank."""
    experts, routes = load.shape.num_experts, tokens * k
    slots = routes
    if dropping and load.capacity is not None:
        slots = max(math.ceil(tokens / experts * load.capacity * k), load.min_capacity)
        if load.expert_parallel == 1:
            return min(routes, slots * experts)
    elif load.expert_parallel == 1:
        return routes
    else:
        slots = min(tokens, math.ceil(FULLEST_EXPERT * routes / experts))
    return slots * experts  # on each of P ranks E / P experts with slots for P ranks


def model_elements(load: RankLoad) -> float:
    """Trainable elements of the whole model at this client's LoRA rank."""
    dense, experts = trained_elements(load)
    return dense + experts * load.expert_parallel
