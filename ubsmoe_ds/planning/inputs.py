"""Inputs of a plan: the experiment, its model's sizes, the lengths of its rows; and the setup of a rank they lead to.

Pure functions; nothing is read here.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ubsmoe_ds.config.deepspeed_json import FP32
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import ClientConfig
from ubsmoe_ds.models.cost import ModelShape
from ubsmoe_ds.moe.estimators import ESTIMATORS
from ubsmoe_ds.planning.rank_setup import Batch, RankSetup, copies, with_lora_rank

REDUCE_BUCKET = 5e8  # elements of ZeRO's gradient buffer, DeepSpeed's default


class RowLengths(NamedTuple):
    """Lengths of a client's rows in tokens, padding included.

    length: of a sequence of the largest micro-batch; answers: positions asked for per sequence, at most; mean_*: of an
    average row. sequences: of the largest micro-batch, over its rows; mean_context: tokens of an average sequence.
    Without packing each row is a sequence.
    eval_*: of packed evaluation rows; eval_rows: their number; own_rows: those of them that are the client's own, the
    others are the same for all.
    text_bytes: of all rows that a rank of the client reads; rows: the client trains on.
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
    rows: int = 1
    sequences: float = 1.0
    mean_context: float = 0.0
    own_rows: int = 0


LINEAR_KEPT = 3  # updates of a group under linear rules: the two longest, and the sum of the others


@dataclass(frozen=True)
class PlanInput:
    """An experiment with the sizes of its model and the lengths of its rows.

    shape: at the LoRA rank of the whole model; row_lengths: of each client; on_cpu: whether the model runs on the CPU.
    """

    exp: Experiment
    shape: ModelShape
    row_lengths: Sequence[RowLengths]
    on_cpu: bool

    def changed(self, number: int, **changes: object) -> "PlanInput":
        """Return a copy with other settings of one client."""
        clients = list(self.exp.clients)
        clients[number] = clients[number].model_copy(update=changes)
        return replace(self, exp=self.exp.model_copy(update={"clients": clients}))

    def accumulating(self, steps: int, number: int = 0) -> "PlanInput":
        """Return a copy with another number of gradient accumulation steps, where a client has its number from."""
        if self.exp.clients[number].gradient_accumulation_steps is not None:
            return self.changed(number, gradient_accumulation_steps=steps)
        deepspeed = self.exp.deepspeed.model_copy(update={"gradient_accumulation_steps": steps})
        return replace(self, exp=self.exp.model_copy(update={"deepspeed": deepspeed}))

    def evaluating(self, batch_size: int) -> "PlanInput":
        """Return a copy with another number of rows in an evaluation batch."""
        evaluation = self.exp.evaluation.model_copy(update={"batch_size": batch_size})
        return replace(self, exp=self.exp.model_copy(update={"evaluation": evaluation}))


def rank_setup(inputs: PlanInput, number: int, group: int | None = None, turns: int = 1) -> RankSetup:
    """Return the setup of a client's ranks.

    Args:
        inputs: of the plan.
        number: of the client.
        group: that trains it, where clients take turns; None: its own.
        turns: most turns of a group in a round.
    """
    exp, lengths = inputs.exp, inputs.row_lengths[number]
    client = exp.trained_by(number, number if group is None else group)
    settings = exp.settings(client)
    micro = settings.gradient_accumulation_steps
    rows = max(1, settings.train_batch_size // (client.ranks * micro))
    eval_rows = min(exp.evaluation.batch_size, math.ceil(lengths.eval_rows / _sharers(exp, number, client)))
    held_rank = exp.lora.rank if exp.takes_turns else exp.lora_rank(client)
    sequences = max(1, round(rows * lengths.sequences))
    training = Batch(sequences, lengths.length, math.ceil(sequences * lengths.answers))
    setup = RankSetup(
        shape=replace(inputs.shape, lora_rank=held_rank),
        k=exp.active_experts(client),
        ranks=client.ranks,
        expert_parallel=client.expert_parallel,
        capacity=client.capacity_factor,
        min_capacity=exp.model.min_capacity,
        bf16=settings.use_bf16,
        quantize=exp.model.quantize,
        fp32_gradients=settings.use_bf16 and (settings.data_types or {}).get("grad_accum_dtype") in FP32,
        zero_stage=settings.zero_stage,
        # what corrects drift lies beside the masters like moments, see client/drift.py
        moments=settings.moments + bool(exp.train.prox_mu) + 2 * exp.train.scaffold,
        reduce_bucket=float(settings.zero_optimization.get("reduce_bucket_size", REDUCE_BUCKET)),
        router=exp.router.trainable,
        modulated=exp.dmr.enabled,
        **_pseudo_gradients(exp, training.tokens),
        training=training,
        packed=exp.data.packing,
        micro_batches=micro,
        evaluation=Batch(eval_rows, lengths.eval_length, math.ceil(eval_rows * lengths.eval_answers)),
        kept_updates=_kept_updates(exp, turns),
        clients=len(exp.trainers) if exp.takes_turns and exp.merge.is_linear else exp.cohort_size,
        world=exp.world_size,
        receivers=0.0,
        reply_rank=sum(sorted(exp.lora_ranks)[-exp.cohort_size :]) if exp.merge.row.stacking else held_rank,
        reducible=_is_reducible(exp),
        text_bytes=lengths.text_bytes,
        on_cpu=inputs.on_cpu,
        recomputing=exp.train.activation_checkpointing,
        controls=exp.train.scaffold,
    )
    reply = with_lora_rank(setup, setup.reply_rank)
    layouts = Counter((other.ranks, other.expert_parallel) for other in exp.trainers)
    return replace(setup, receivers=sum(count * copies(reply, *layout) for layout, count in layouts.items()))


def _sharers(exp: Experiment, number: int, client: ClientConfig) -> int:
    """Return how many ranks share the evaluation rows of a client's view: all that hold it."""
    if exp.takes_turns:  # every group becomes each view, but a client's own rows are one group's
        return exp.world_size if client.eval_source is None else client.ranks
    views = exp.views
    return sum(other.ranks for other, view in zip(exp.clients, views, strict=True) if view == views[number])


def _kept_updates(exp: Experiment, turns: int) -> int:
    """Return how many updates a group keeps until the merge: under linear rules the longest and a sum, else all."""
    if not exp.takes_turns:
        return 0
    return min(turns, LINEAR_KEPT) if exp.merge.is_linear else turns


def _pseudo_gradients(exp: Experiment, tokens: int) -> dict[str, Any]:
    """Return what the estimator of pseudo-gradients keeps, for a micro-batch of so many tokens."""
    config = exp.pseudo_gradient
    if config.estimator == "none":
        return {"pseudo_gradients": False, "drawn_tokens": 0, "mixture": False, "pooled_moments": False}
    estimator = ESTIMATORS[config.estimator]
    drawn = tokens if config.tokens_per_expert is None else config.tokens_per_expert
    return {
        "pseudo_gradients": True,
        "drawn_tokens": 0 if estimator.from_sums else drawn,
        "mixture": estimator.mixture,
        "pooled_moments": estimator.moments,
    }


def _is_reducible(exp: Experiment) -> bool:
    """Return whether updates are summed on the way to the owners, see `Exchange.is_reducible`."""
    alike = all(trainer.ranks == 1 for trainer in exp.trainers)
    alike = alike and (exp.takes_turns or len(set(exp.lora_ranks)) == 1)  # turns have one shared LoRA rank
    return alike and exp.merge.is_linear and exp.merge.payload == "fp32"
