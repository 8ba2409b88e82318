"""The numbers that memory, FLOPs and messages of one rank depend on, and sizes that follow from them directly.

Shapes: T tokens, N rows of experts (routes, or slots under expert parallelism).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from ubsmoe_ds.models.cost import ModelShape

FP32 = 4  # bytes
FULLEST_EXPERT = 1.75  # its rows over the mean where nothing is dropped: assumed, from the built-in model's routing


class Batch(NamedTuple):
    """A rank's batch: padded rows, and the positions whose logits are computed."""

    rows: int
    length: int
    answers: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class RankSetup:
    """Model, client, batches and job as one rank has them.

    shape: with the client's own LoRA rank; k: active experts.
    capacity: slots of an expert over the mean of rows per expert, None: nothing is dropped; min_capacity: least slots.
    quantize: how experts and linear layers are kept; fp32_gradients: whether ZeRO sums gradients of bf16 up in fp32.
    moments: values kept for a weight, the optimiser's, FedProx's and SCAFFOLD's; reduce_bucket: elements, of ZeRO.
    router, modulated: whether the router and phi are trained.
    pseudo_gradients: whether an estimator is on; drawn_tokens: that it draws for each expert in a micro-batch, 0: none.
    mixture, pooled_moments: whether the estimator needs a `TokenMixture`, and `Moments`.
    training: a micro-batch; packed: whether its sequences hold several rows; micro_batches: of a step; evaluation: a
    batch of rows with their options.
    kept_updates: that a group keeps until the merge, where clients take turns; else 0.
    clients: whose updates of a unit its owner holds in a merge, or groups whose sums; world: number of ranks in the
    job; receivers: ranks that get a copy of an average unit back, whose LoRA rank is then reply_rank: FLoRA's stack of
    all.
    recomputing: whether backward computes the layers again. controls: whether there are SCAFFOLD's control variates.
    reducible: whether updates are summed on the way to owners; text_bytes: of all rows, which every rank reads.
    """

    shape: ModelShape
    k: int
    ranks: int
    expert_parallel: int
    capacity: float | None
    min_capacity: int
    bf16: bool
    quantize: str | None
    fp32_gradients: bool
    zero_stage: int
    moments: int
    reduce_bucket: float
    router: bool
    modulated: bool
    pseudo_gradients: bool
    drawn_tokens: int
    mixture: bool
    pooled_moments: bool
    training: Batch
    packed: bool
    micro_batches: int
    evaluation: Batch
    kept_updates: int
    clients: int
    world: int
    receivers: float
    reply_rank: int
    reducible: bool
    text_bytes: float
    on_cpu: bool
    recomputing: bool
    controls: bool

    @property
    def width(self) -> int:
        """Return the bytes of a weight and of an activation."""
        return 2 if self.bf16 else FP32

    @property
    def sparse_layers(self) -> int:
        """Return the number of layers with experts."""
        return self.shape.layers - self.shape.dense_layers

    @property
    def local_experts(self) -> int:
        """Return the number of experts of each layer on this rank."""
        return self.shape.num_experts // self.expert_parallel


class TrainedElements(NamedTuple):
    """Trainable elements of one rank."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.dense + self.experts


def trained_elements(setup: RankSetup) -> TrainedElements:
    """Count router, phi and attention LoRA, which every rank has, and the LoRA of the experts that this rank holds."""
    s = setup.shape
    dense = setup.sparse_layers * (s.num_experts * s.hidden * setup.router + s.num_experts * setup.modulated)
    if s.lora_attention:
        dense += s.lora_rank * sum(mixer.adapter_width for mixer in s.mixers)
    experts = setup.sparse_layers * setup.local_experts * 3 * s.lora_rank * (s.hidden + s.expert_width)
    return TrainedElements(dense, experts)


def model_elements(setup: RankSetup) -> float:
    """Return the trainable elements of the whole model at this client's LoRA rank."""
    dense, experts = trained_elements(setup)
    return dense + experts * setup.expert_parallel


def copies(setup: RankSetup, ranks: int, expert_parallel: int) -> float:
    """Return how many ranks of a client or group with this layout hold an average trainable element of the model."""
    dense, experts = trained_elements(replace(setup, expert_parallel=1, ranks=1))
    return (dense * ranks + experts * ranks / expert_parallel) / (dense + experts)


def with_lora_rank(setup: RankSetup, rank: int) -> RankSetup:
    """Return a copy with another LoRA rank."""
    return replace(setup, shape=replace(setup.shape, lora_rank=rank))


def expert_rows(setup: RankSetup, tokens: int, k: int, dropping: bool) -> int:
    """Return the rows that the experts of one rank compute for a batch of so many tokens on each rank.

    Args:
        setup: of the rank.
        tokens: on each rank.
        k: active experts.
        dropping: whether the capacity factor applies.
    """
    experts, routes = setup.shape.num_experts, tokens * k
    slots = routes
    if dropping and setup.capacity is not None:
        slots = max(math.ceil(tokens / experts * setup.capacity * k), setup.min_capacity)
        if setup.expert_parallel == 1:
            return min(routes, slots * experts)
    elif setup.expert_parallel == 1:
        return routes
    else:
        slots = min(tokens, math.ceil(FULLEST_EXPERT * routes / experts))
    return slots * experts  # on each of P ranks E / P experts with slots for P ranks
