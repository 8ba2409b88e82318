"""What an experiment needs, before it is started: memory, FLOPs and bytes of each client, and who is waited for.

Pure functions on the config, the model's sizes and the lengths of rows; nothing is read or started here.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig, DeepSpeedConfig
from ubsmoe_ds.models.cost import ModelShape, flops_per_token, step_flops
from ubsmoe_ds.planning.memory_model import REDUCE_BUCKET, phases
from ubsmoe_ds.planning.rank_load import FP32, Batch, RankLoad, at_rank, expert_rows, model_elements, trained_elements


class Workload(NamedTuple):
    """Lengths of a client's rows in tokens, padding included.

    length: of the longest step; answers: positions asked for a row, at most; mean_*: of an average row
    eval_*: of packed evaluation rows, the same for all clients; eval_rows: how many there are
    text_bytes: of all rows that are read
    """

    length: int
    answers: float
    mean_length: float
    mean_answers: float
    eval_length: int
    eval_answers: float
    eval_mean_length: float
    eval_rows: int
    text_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """An experiment with what is known of its model and rows.

    shape: at the LoRA rank of the whole; workloads: of each client; on_cpu: whether the model runs on the CPU.
    """

    exp: Experiment
    shape: ModelShape
    workloads: Sequence[Workload]
    on_cpu: bool

    def changed(self, number: int, **changes: object) -> "Job":
        """The same with other settings of one client."""
        clients = list(self.exp.clients)
        clients[number] = clients[number].model_copy(update=changes)
        return replace(self, exp=self.exp.model_copy(update={"clients": clients}))

    def accumulating(self, steps: int) -> "Job":
        """The same with other gradient accumulation."""
        deepspeed = self.exp.deepspeed.model_copy(update={"gradient_accumulation_steps": steps})
        return replace(self, exp=self.exp.model_copy(update={"deepspeed": deepspeed}))


class ClientPlan(NamedTuple):
    """Of one client: bytes by phase on each of its ranks, FLOPs of all its ranks, bytes that one rank sends in a step,
    and that all its ranks send and get in a round; `time` is its round over that of the fastest client.
    """

    phases: dict[str, float]
    step_flops: float
    round_flops: float
    step_bytes: float
    sent_bytes: float
    got_bytes: float
    time: float


def rank_load(job: Job, number: int) -> RankLoad:
    """What the memory of a client's rank depends on."""
    exp, workload = job.exp, job.workloads[number]
    client, settings = exp.clients[number], exp.deepspeed
    micro = settings.gradient_accumulation_steps
    rows = max(1, settings.train_batch_size // (client.ranks * micro))
    workers = sum(c.ranks for c, view in zip(exp.clients, exp.views, strict=True) if view == exp.views[number])
    eval_rows = min(exp.evaluation.batch_size, math.ceil(workload.eval_rows / workers))
    shape = replace(job.shape, lora_rank=exp.lora_rank(client))
    load = RankLoad(
        shape=shape,
        k=exp.active_experts(client),
        ranks=client.ranks,
        expert_parallel=client.expert_parallel,
        capacity=client.capacity_factor,
        min_capacity=exp.model.min_capacity,
        bf16=settings.use_bf16,
        zero_stage=settings.zero_stage,
        moments=_moments(settings),
        reduce_bucket=float(settings.zero_optimization.get("reduce_bucket_size", REDUCE_BUCKET)),
        router=exp.router.trainable,
        modulated=exp.dmr.enabled,
        estimator=exp.pseudo_gradient.estimator,
        tokens_per_expert=exp.pseudo_gradient.tokens_per_expert,
        training=Batch(rows, workload.length, math.ceil(rows * workload.answers)),
        micro_batches=micro,
        evaluation=Batch(eval_rows, workload.eval_length, math.ceil(eval_rows * workload.eval_answers)),
        clients=len(exp.clients),
        world=exp.world_size,
        receivers=0.0,
        reply_rank=sum(exp.lora_ranks) if exp.merge.row.stacking else exp.lora_rank(client),
        reducible=_is_reducible(exp),
        text_bytes=workload.text_bytes,
        on_cpu=job.on_cpu,
    )
    reply = at_rank(load, load.reply_rank)
    return replace(load, receivers=sum(_copies(reply, other) for other in exp.clients))


def _moments(settings: DeepSpeedConfig) -> int:
    """Values that the optimiser keeps of each weight."""
    if str(settings.optimizer["type"]).lower() == "sgd":
        return int(bool(settings.optimizer.get("params", {}).get("momentum")))
    return 2


def _is_reducible(exp: Experiment) -> bool:
    """Whether sums are formed on the way to the owners, see `Exchange.is_reducible` and `MergeConfig.is_linear`."""
    alike = all(client.ranks == 1 for client in exp.clients) and len(set(exp.lora_ranks)) == 1
    return alike and exp.merge.is_linear and exp.merge.payload == "fp32"


def _copies(load: RankLoad, client: ClientConfig) -> float:
    """Ranks of a client that hold an average element of the model."""
    dense, experts = trained_elements(replace(load, expert_parallel=1, ranks=1))
    return (dense * client.ranks + experts * client.ranks / client.expert_parallel) / (dense + experts)


def plan(job: Job) -> list[ClientPlan]:
    """Of every client."""
    loads = [rank_load(job, number) for number in range(len(job.exp.clients))]
    flops = [_round_flops(job, number, load) for number, load in enumerate(loads)]
    fastest = min(whole / load.ranks for (_, whole), load in zip(flops, loads, strict=True))
    found = []
    for number, (load, (step, whole)) in enumerate(zip(loads, flops, strict=True)):
        sent, got = _exchanged(job, number, loads)
        time = whole / load.ranks / fastest
        found.append(ClientPlan(phases(load), step, whole, step_bytes(load), sent, got, time))
    return found


def straggler(plans: Sequence[ClientPlan]) -> tuple[int, float, float]:
    """The client whose round takes longest on equal devices, and its time over the fastest's and the median's."""
    times = [one.time for one in plans]
    slowest = max(range(len(times)), key=times.__getitem__)
    return slowest, times[slowest], times[slowest] / statistics.median(times)


def _round_flops(job: Job, number: int, load: RankLoad) -> tuple[float, float]:
    """FLOPs of a client: of a step, and of a round with its share of the evaluation."""
    exp, workload, shape = job.exp, job.workloads[number], load.shape
    rows = exp.deepspeed.train_batch_size
    tokens, answers = round(rows * workload.mean_length), round(rows * workload.mean_answers)
    step = step_flops(shape, load.k, tokens, round(workload.mean_length), answers)
    sharers = [c for c, view in zip(exp.clients, exp.views, strict=True) if view == exp.views[number]]
    eval_rows = workload.eval_rows * load.ranks / sum(client.ranks for client in sharers)
    head = 2 * shape.hidden * shape.vocab
    token = flops_per_token(shape, load.k, round(workload.eval_mean_length)) - head
    evaluation = eval_rows * (workload.eval_mean_length * token + workload.eval_answers * head)
    return step, exp.train.local_steps * step + evaluation / exp.evaluation.every


def step_bytes(load: RankLoad) -> float:
    """Bytes that a rank sends in one step inside its client.

    Sums over data-parallel ranks as a ring does them, 2 (p - 1) / p of the payload; and all-to-alls of expert
    parallelism: two forward, two backward for each layer and micro-batch, and what pseudo-gradients have drawn.
    """
    dense, experts = trained_elements(load)
    replicas = load.ranks // load.expert_parallel
    pseudo = FP32 * experts * (load.estimator not in ("none", "expert_mean"))
    sent = 2 * (load.ranks - 1) / load.ranks * load.width * dense
    sent += 2 * (replicas - 1) / replicas * (load.width * experts + pseudo)
    if load.expert_parallel == 1:
        return sent
    s, away = load.shape, (load.expert_parallel - 1) / load.expert_parallel
    slots = expert_rows(load, load.training.tokens, load.k, dropping=True)
    mixture = load.estimator == "token_weighted"
    micro = slots * load.width * (4 * s.hidden + 3 * s.expert_width * mixture)
    if load.estimator not in ("none", "expert_mean"):
        count = load.training.tokens if load.tokens_per_expert is None else load.tokens_per_expert
        micro += s.num_experts * count * load.width * (2 * s.hidden + 3 * s.expert_width * mixture)
    return sent + away * load.sparse_layers * load.micro_batches * micro


def _exchanged(job: Job, number: int, loads: Sequence[RankLoad]) -> tuple[float, float]:
    """Bytes that all ranks of a client send to other ranks, and get from them, in a round.

    Units are owned evenly by all ranks of the job. A rank sends its part of its client's update to the owners, and what
    it owns, merged, to every rank that holds it.
    """
    exp, world = job.exp, job.exp.world_size
    width = 2 if exp.merge.payload == "bf16" else FP32
    replies = [at_rank(load, load.reply_rank) for load in loads]
    updates = [model_elements(load) for load in loads]
    back = [model_elements(reply) * _copies(reply, client) for reply, client in zip(replies, exp.clients, strict=True)]
    own, ranks = updates[number], exp.clients[number].ranks
    kept = back[number] / world  # what its ranks own and hold themselves
    sent = own * (1 - 1 / world) + ranks / world * sum(back) - kept
    got = back[number] - kept + (ranks * sum(updates) - own) / world
    return width * sent, width * got
