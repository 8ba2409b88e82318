"""The scalars of a round, from tables that every rank has: the same numbers, with the same names, everywhere.

Names are "group/name" for TensorBoard and `metrics.jsonl`; "group/CLIENT" where each client has its own.
Shapes: C clients, L layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ubsmoe_ds.aggregation.dmr import coefficient_of_variation
from ubsmoe_ds.client.engine import LocalStats


class RoundSeconds(NamedTuple):
    """Wall seconds of one client's first rank: local steps, waiting for others, packing and moving updates, merging."""

    local: float
    wait: float
    exchange: float
    merge: float


def evaluation_scalars(
    clients: Sequence[str], views: Sequence[str], tasks: Sequence[str], sums: np.ndarray, weighted_cv: float
) -> dict[str, float]:
    """Loss and accuracy of each distinct view of the model, per task, per client, and overall (clients' plain mean).

    Args:
        clients: names.
        views: of each client; clients of one view have the same K and the same model, see `views.views`.
        tasks: names of the axis of tasks.
        sums: [distinct views in order of appearance, tasks, 5] in the order of `evaluation.FIELDS`.
        weighted_cv: coefficient of variation of the experts' utilisation on the evaluation rows.
    """
    found: dict[str, float] = {}
    for view, of_view in zip(dict.fromkeys(views), sums, strict=True):
        for name, part in zip(["all", *tasks], [of_view.sum(0), *of_view], strict=True):
            nll, tokens, correct, correct_norm, rows = part
            found[f"eval_{view}/loss_{name}"] = nll / tokens
            found[f"eval_{view}/accuracy_{name}"] = correct / rows
            found[f"eval_{view}/accuracy_norm_{name}"] = correct_norm / rows
    for field in ("loss", "accuracy"):
        of_client = [found[f"eval_{view}/{field}_all"] for view in views]
        found |= {f"eval_{field}/{client}": value for client, value in zip(clients, of_client, strict=True)}
        found[f"eval/{field}"] = sum(of_client) / len(of_client)
    found["eval/utilisation_cv"] = weighted_cv
    return found


def training_scalars(
    clients: Sequence[str],
    stats: Sequence[LocalStats],
    bytes_C: np.ndarray,
    utilisation_LE: Tensor,
    ranks: Sequence[int],
    refused_C: Sequence[int],
) -> dict[str, float]:
    """What the local steps and the exchange did.

    Args:
        clients: names.
        stats: each client's sums over its ranks.
        bytes_C: bytes that each client's ranks sent to other ranks.
        utilisation_LE: global utilisation of the round.
        ranks: LoRA rank of each client after the round.
        refused_C: units of each client that held NaN or Inf.
    """
    found: dict[str, float] = {}
    for name, one, sent, rank, refused in zip(clients, stats, bytes_C, ranks, refused_C, strict=True):
        found[f"lora_rank/{name}"] = rank
        found[f"refused_units/{name}"] = refused
        found[f"bad_steps/{name}"] = one.bad_steps
        found[f"steps/{name}"] = one.steps
        if one.answer_tokens:
            found[f"train_loss/{name}"] = one.nll / one.answer_tokens
        found[f"dropped_share/{name}"] = one.dropped_routes / max(one.routed_routes, 1)
        found[f"gradient_norm/{name}"] = one.real_norm / max(one.steps, 1)
        found[f"pseudo_over_real_norm/{name}"] = one.pseudo_norm / max(one.real_norm, 1e-12)
        found[f"tokens/{name}"] = one.used_tokens
        found[f"megabytes_sent/{name}"] = float(sent) / 1e6
    total = LocalStats(*np.sum(stats, axis=0))
    if total.answer_tokens:
        found["train/loss"] = total.nll / total.answer_tokens
    found["train/dropped_share"] = total.dropped_routes / max(total.routed_routes, 1)
    found["train/pseudo_over_real_norm"] = total.pseudo_norm / max(total.real_norm, 1e-12)
    found["exchange/megabytes"] = float(bytes_C.sum()) / 1e6
    found["utilisation/cv"] = float(coefficient_of_variation(utilisation_LE).mean())
    return found


def seconds_scalars(
    clients: Sequence[str], stats: Sequence[LocalStats], seconds: Sequence[RoundSeconds]
) -> dict[str, float]:
    """Wall times per client and of the slowest, and tokens per second; these differ from run to run.

    What is only known later: `add_later_seconds`.
    """
    found = {}
    for field in RoundSeconds._fields:
        of_client = [getattr(one, field) for one in seconds]
        found[f"seconds/{field}"] = max(of_client)
        found |= {f"seconds_{field}/{name}": value for name, value in zip(clients, of_client, strict=True)}
    for name, one, time in zip(clients, stats, seconds, strict=True):
        found[f"tokens_per_second/{name}"] = one.used_tokens / time.local
    found["train/tokens_per_second"] = sum(one.used_tokens for one in stats) / found["seconds/local"]
    found["seconds/round"] = max(sum(one) for one in seconds)
    return found


def add_later_seconds(
    found: dict[str, float], clients: Sequence[str], taking_C: np.ndarray, evaluation_C: np.ndarray
) -> None:
    """Complete what `seconds_scalars` found.

    Args:
        found: changed in place.
        clients: names.
        taking_C: what the merge took on its way into each client's model, a part of "exchange".
        evaluation_C: what evaluation took.
    """
    found["seconds/evaluation"] = float(evaluation_C.max())
    for name, taking, evaluation in zip(clients, taking_C.tolist(), evaluation_C.tolist(), strict=True):
        found[f"seconds_exchange/{name}"] = found.get(f"seconds_exchange/{name}", 0.0) + taking  # a client may be new
        found[f"seconds_evaluation/{name}"] = evaluation
    found["seconds/exchange"] = max(found[f"seconds_exchange/{name}"] for name in clients)
    found["seconds/round"] += found["seconds/evaluation"] + float(taking_C.max())


def measured_speed(records: Sequence[Mapping[str, Any]], client: str) -> dict[str, float]:
    """Return a client's training speed, averaged over the rounds on record; NaN if it took no step.

    The wall time is of local steps alone, and depends on what else runs on the same cores.

    Args:
        records: lines of `metrics.jsonl`; rounds that the client was not part of are left out.
        client: its name.

    Returns:
        tokens_per_second: tokens without padding, of steps that were taken; seconds_per_step: skipped steps count too.
    """
    rounds = [record for record in records if f"seconds_local/{client}" in record["seconds"]]
    seconds = math.fsum(record["seconds"][f"seconds_local/{client}"] for record in rounds)
    tokens = math.fsum(record["metrics"][f"tokens/{client}"] for record in rounds)
    steps = math.fsum(record["metrics"][f"{name}/{client}"] for record in rounds for name in ("steps", "bad_steps"))
    if not steps:
        return {"tokens_per_second": math.nan, "seconds_per_step": math.nan}
    return {"tokens_per_second": tokens / seconds, "seconds_per_step": seconds / steps}
