"""Compute and name the scalars of a round from tables that every rank has, so that all ranks get the same numbers.

Names read "family/name" in TensorBoard and `metrics.jsonl`, and "family/CLIENT" where each client has its own value.
docs/evaluation.md says of each mean what it counts: clients, rows, tokens, routes or steps.
Shapes: C clients, L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ubsmoe_ds.aggregation.dmr import coefficient_of_variation
from ubsmoe_ds.client.engine import LocalStats
from ubsmoe_ds.client.evaluation import scores
from ubsmoe_ds.federation.fairness import fairness_scalars

LEAST_TOKENS = (
    8  # tokens in a round from which an expert's real gradient says something; with fewer it is starved [ours]
)


class RoundSeconds(NamedTuple):
    """Wall seconds of a client's first rank: local steps, waiting for others, packing and moving updates, merging."""

    local: float
    wait: float
    exchange: float
    merge: float


def evaluation_scalars(
    clients: Sequence[str],
    views: Sequence[str],
    weights: Sequence[float],
    tasks: Sequence[str],
    sums: np.ndarray,
    weighted_cv: float,
    own_CF: np.ndarray | None = None,
) -> dict[str, float]:
    """Return the scores of each view, per task, per client, and overall: plain and weighted mean over clients.

    There is no accuracy where no row has choices, and no overall one where a client has none. Fairness is that of the
    clients with evaluation rows of their own.

    Args:
        clients: names of the clients.
        views: view of each client, see `Experiment.views`.
        weights: w_c of each client, summing to one.
        tasks: names of the tasks.
        sums: [distinct views in order of appearance, tasks, fields] in the order of `client.evaluation.FIELDS`.
        weighted_cv: coefficient of variation of the experts' utilisation on the evaluation rows.
        own_CF: sums over each client's own evaluation rows; zeros for a client without, which is scored on the common
            ones. None: no client has any.
    """
    scalars: dict[str, float] = {}
    of_views = {}
    for view, of_view in zip(dict.fromkeys(views), sums, strict=True):
        of_views[view] = scores(of_view.sum(0))
        for name, part in zip(["all", *tasks], [of_view.sum(0), *of_view], strict=True):
            scalars |= {f"eval_{view}/{field}_{name}": value for field, value in scores(part).items()}
    of_clients = [of_views[view] for view in views]
    if own_CF is not None:
        of_own = [scores(own) for own in own_CF]
        scalars |= fairness_scalars([own["loss"] for own in of_own if own])
        of_clients = [own or common for own, common in zip(of_own, of_clients, strict=True)]
    for field in ("loss", "perplexity", "accuracy"):
        found = {name: part[field] for name, part in zip(clients, of_clients, strict=True) if field in part}
        scalars |= {f"eval_{field}/{name}": value for name, value in found.items()}
        if len(found) == len(clients):
            of_client = list(found.values())
            scalars[f"eval/{field}"] = sum(of_client) / len(of_client)
            scalars[f"eval/{field}_weighted"] = math.fsum(
                w * value for w, value in zip(weights, of_client, strict=True)
            )
    scalars["eval/utilisation_cv"] = weighted_cv
    return scalars


def training_scalars(
    clients: Sequence[str],
    stats: Sequence[LocalStats],
    bytes_C: np.ndarray,
    utilisation_LE: Tensor,
    ranks: Sequence[int],
    refused_C: Sequence[int],
) -> dict[str, float]:
    """Return scalars of the local steps and of the exchange; overall ones are over all clients' tokens or routes.

    Args:
        clients: names of the clients.
        stats: each client's sums over its ranks.
        bytes_C: bytes that each client's ranks sent to other ranks.
        utilisation_LE: global utilisation in the round.
        ranks: each client's LoRA rank after the round.
        refused_C: units of each client that held NaN or Inf.
    """
    scalars: dict[str, float] = {}
    for name, sums, sent, rank, refused in zip(clients, stats, bytes_C, ranks, refused_C, strict=True):
        scalars[f"lora_rank/{name}"] = rank
        scalars[f"refused_units/{name}"] = refused
        scalars[f"bad_steps/{name}"] = sums.bad_steps
        scalars[f"steps/{name}"] = sums.steps
        if sums.answer_tokens:
            scalars[f"train_loss/{name}"] = sums.nll / sums.answer_tokens
        scalars[f"dropped_share/{name}"] = sums.dropped_routes / max(sums.routed_routes, 1)
        scalars[f"gradient_norm/{name}"] = sums.gradient_norm / max(sums.steps, 1)
        scalars[f"tokens/{name}"] = sums.used_tokens
        scalars[f"megabytes_sent/{name}"] = float(sent) / 1e6
    total = LocalStats(*np.sum(stats, axis=0))
    if total.answer_tokens:
        scalars["train/loss"] = total.nll / total.answer_tokens
    scalars["train/dropped_share"] = total.dropped_routes / max(total.routed_routes, 1)
    scalars["exchange/megabytes"] = float(bytes_C.sum()) / 1e6
    scalars["utilisation/cv"] = float(coefficient_of_variation(utilisation_LE).mean())
    return scalars


def expert_scalars(clients: Sequence[str], routed_CLE: Tensor, squares_CLE2: Tensor | None) -> dict[str, float]:
    """Return how many experts each client starved, and how much its pseudo-gradient (PG) outweighs the real one.

    `pseudo_over_real_norm` is the median, over the experts of all layers that are not starved, of ||PG|| / ||real||,
    both norms over all steps of the round and all LoRA factors of the expert; 0 without PG. A starved expert has no
    real gradient to speak of, so it does not count; where all are starved there is no ratio.

    Args:
        clients: names of the clients.
        routed_CLE: tokens that each client routed to each expert in the round.
        squares_CLE2: squared norms of the (real, pseudo) gradients; None without PG.
    """
    scalars: dict[str, float] = {}
    for c, (name, routed_LE) in enumerate(zip(clients, routed_CLE, strict=True)):
        fed_LE = routed_LE >= LEAST_TOKENS
        scalars[f"starved_experts/{name}"] = int((~fed_LE).sum())
        if squares_CLE2 is None:
            scalars[f"pseudo_over_real_norm/{name}"] = 0.0
        elif fed_LE.any():
            real_N, pseudo_N = squares_CLE2[c][fed_LE].sqrt().numpy().T
            scalars[f"pseudo_over_real_norm/{name}"] = float(np.median(pseudo_N / np.maximum(real_N, 1e-12)))
    ratios = [value for key, value in scalars.items() if key.startswith("pseudo_over_real_norm/")]
    if ratios:
        scalars["train/pseudo_over_real_norm"] = max(ratios)
    return scalars


def merge_scalars(
    clients: Sequence[str],
    stats: Sequence[LocalStats],
    rows: Mapping[str, int],
    weights: Sequence[float],
    norms: Sequence[float],
    learning_rates: Sequence[float],
) -> dict[str, float]:
    """Return what each client brings to the merge, and the training loss weighted as the merge weighs the clients.

    Args:
        clients: names of the clients.
        stats: each client's sums over its ranks.
        rows: number of training rows by client.
        weights: weight of each client that the merge rule gets in this round: w_c times the part of its work done.
        norms: L2 norm of each client's update.
        learning_rates: each client's learning rate after its last step.
    """
    scalars: dict[str, float] = {}
    trained: list[tuple[float, float]] = []
    for name, sums, weight, norm, rate in zip(clients, stats, weights, norms, learning_rates, strict=True):
        scalars[f"rows/{name}"] = rows[name]
        scalars[f"merge_weight/{name}"] = weight
        scalars[f"update_norm/{name}"] = norm
        scalars[f"learning_rate/{name}"] = rate
        if sums.answer_tokens:
            trained.append((weight, sums.nll / sums.answer_tokens))
    total = math.fsum(weight for weight, _ in trained)
    if total:
        scalars["train/loss_weighted"] = math.fsum(weight * loss for weight, loss in trained) / total
    return scalars


def seconds_scalars(
    clients: Sequence[str], stats: Sequence[LocalStats], seconds: Sequence[RoundSeconds]
) -> dict[str, float]:
    """Return wall times per client and of the slowest, and tokens per second; these differ from run to run.

    `complete_seconds` adds the stages that come after the merge.
    """
    scalars = {}
    for field in RoundSeconds._fields:
        of_client = [getattr(times, field) for times in seconds]
        scalars[f"seconds/{field}"] = max(of_client)
        scalars |= {f"seconds_{field}/{name}": value for name, value in zip(clients, of_client, strict=True)}
    for name, sums, time in zip(clients, stats, seconds, strict=True):
        scalars[f"tokens_per_second/{name}"] = sums.used_tokens / time.local
    scalars["train/tokens_per_second"] = sum(sums.used_tokens for sums in stats) / scalars["seconds/local"]
    scalars["seconds/round"] = max(sum(times) for times in seconds)
    return scalars


def turn_seconds(
    clients: Sequence[str],
    stats: Sequence[LocalStats],
    local_C: Sequence[float],
    groups: Sequence[str],
    seconds: Sequence[RoundSeconds],
) -> dict[str, float]:
    """Return the same where clients take turns: stages are of groups, local steps and tokens per second of clients too.

    Args:
        clients: names of the clients of the round.
        stats: their sums.
        local_C: wall seconds of their local steps.
        groups: names of the groups.
        seconds: wall seconds of each group; local: of all its turns together.
    """
    scalars = {f"seconds_local/{name}": local for name, local in zip(clients, local_C, strict=True)}
    for field in RoundSeconds._fields:
        of_group = [getattr(times, field) for times in seconds]
        scalars[f"seconds/{field}"] = max(of_group)
        scalars |= {f"seconds_{field}/{name}": value for name, value in zip(groups, of_group, strict=True)}
    for name, sums, local in zip(clients, stats, local_C, strict=True):
        scalars[f"tokens_per_second/{name}"] = sums.used_tokens / max(local, 1e-9)
    scalars["train/tokens_per_second"] = sum(sums.used_tokens for sums in stats) / scalars["seconds/local"]
    scalars["seconds/round"] = max(sum(times) for times in seconds)
    return scalars


def complete_seconds(
    scalars: dict[str, float], clients: Sequence[str], apply_C: np.ndarray, evaluation_C: np.ndarray
) -> None:
    """Add the stages after the merge to the result of `seconds_scalars`.

    Args:
        scalars: changed in place.
        clients: names of the clients, or of the groups where clients take turns.
        apply_C: seconds that each client took to write the merge into its model; they count as "exchange".
        evaluation_C: seconds that each client took for evaluation.
    """
    scalars["seconds/evaluation"] = float(evaluation_C.max())
    for name, apply, evaluation in zip(clients, apply_C.tolist(), evaluation_C.tolist(), strict=True):
        exchange = scalars.get(f"seconds_exchange/{name}", 0.0)  # missing for a client that came back on resume
        scalars[f"seconds_exchange/{name}"] = exchange + apply
        scalars[f"seconds_evaluation/{name}"] = evaluation
    scalars["seconds/exchange"] = max(scalars[f"seconds_exchange/{name}"] for name in clients)
    scalars["seconds/round"] += scalars["seconds/evaluation"] + float(apply_C.max())


def training_speed(records: Sequence[Mapping[str, Any]], client: str) -> dict[str, float]:
    """Return a client's measured training speed, averaged over the recorded rounds; NaN if it took no step.

    The wall time is that of local steps alone; it depends on what else runs on the same cores.

    Args:
        records: lines of `metrics.jsonl`; rounds without the client do not count.
        client: the client's name.

    Returns:
        tokens_per_second: tokens without padding, of the steps taken; seconds_per_step: skipped steps count too.
    """
    # a client's own group, of the same name, has seconds in rounds without the client too
    rounds = [record for record in records if f"tokens/{client}" in record["metrics"]]
    seconds = math.fsum(record["seconds"][f"seconds_local/{client}"] for record in rounds)
    tokens = math.fsum(record["metrics"][f"tokens/{client}"] for record in rounds)
    steps = math.fsum(record["metrics"][f"{name}/{client}"] for record in rounds for name in ("steps", "bad_steps"))
    if not steps:
        return {"tokens_per_second": math.nan, "seconds_per_step": math.nan}
    return {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}
