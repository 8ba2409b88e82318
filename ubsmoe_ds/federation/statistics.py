"""Sum the counts of all ranks' local steps over the job: routed tokens, moments, LoRA ranks, clients gone astray.

All ranks end with the same numbers, so owners need not send them along with their units. A client has gone astray if
its update holds NaN or Inf.
Shapes: C clients, L layers, E experts, F expert width, X = E + 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.server import Usage
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.mpi.world import World


class RoundStatistics(NamedTuple):
    """Statistics of a round, the same on all ranks.

    usage: see `Usage`.
    lora_ranks: each client's LoRA rank after the round.
    astray_C: whether a client's update holds NaN or Inf.
    worked_C: part of the round's work that each client did, 0 to 1.
    moments_LEX: see `sum_moments`.
    """

    usage: Usage
    lora_ranks: list[int]
    astray_C: np.ndarray
    worked_C: list[float]
    moments_LEX: Tensor | None


def gather(
    world: World, client: Client, weights: Sequence[float], *, lora_rank: int, finite: bool, worked: float
) -> RoundStatistics:
    """Sum a round's counts over the job (a collective); change nothing on this rank.

    The utilisation of a client gone astray does not count: with NaN in its weights its routing means nothing.

    Args:
        world: this rank's place in the job.
        client: this rank's client.
        weights: w_c of all clients.
        lora_rank: the client's LoRA rank after the round.
        finite: whether this rank's update is finite.
        worked: part of the round's work that the client did, 0 to 1.
    """
    # one table carries everything: each rank adds its counts and flags to its client's row
    counts_LX = client.routed_counts().double()
    table = np.zeros((len(weights), counts_LX.numel() + 3))
    first = world.group_rank == 0
    flags = [not finite, lora_rank if first else 0, worked if first else 0]
    table[world.client] = [*counts_LX.reshape(-1).tolist(), *flags]
    table = world.sum(table)
    counts_CLX = torch.from_numpy(table[:, :-3]).view(len(weights), *counts_LX.shape)
    routed_CLE = counts_CLX[..., :-1] / counts_CLX[..., -1:].clamp_min(1)
    astray_C, worked_C = table[:, -3] > 0, table[:, -1]
    weight_C = torch.tensor(weights, dtype=torch.float64) * torch.from_numpy(~astray_C * worked_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), routed_CLE)
    moments_LEX = sum_moments(world, client, weights[world.client] if finite and worked else 0.0)
    usage = Usage(routed_CLE, utilisation_LE.float())
    return RoundStatistics(usage, [int(rank) for rank in table[:, -2]], astray_C, worked_C.tolist(), moments_LEX)


def sum_moments(world: World, client: Client, weight: float) -> Tensor | None:
    """Sum the experts' moments over the active tokens of all clients, weighted like their utilisation (a collective).

    Args:
        world: this rank's place in the job.
        client: this rank's client.
        weight: w_c of this client; 0 leaves its tokens out.

    Returns:
        The argument of `ExpertMoments.update`; None if no pseudo-gradient (PG) estimator needs moments.
    """
    if client.moments is None:
        return None
    sums_LEX = client.moments.sums()
    valid_LE1 = torch.isfinite(sums_LEX).all(dim=-1, keepdim=True)
    return torch.from_numpy(world.sum((weight * torch.where(valid_LE1, sums_LEX, 0.0)).numpy()))


def count_refused(world: World, refused: Sequence[tuple[int, int]], clients: int, units: int) -> list[tuple[int, int]]:
    """Return (client, unit number) of every refused update, the same on all ranks (a collective)."""
    table = np.zeros((clients, units))
    for client, unit in refused:
        table[client, unit] = 1
    return [(int(c), int(u)) for c, u in np.argwhere(world.sum(table) > 0)]
