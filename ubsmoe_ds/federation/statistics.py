"""Sum the counts of all ranks' local steps over the job: routed tokens, moments, LoRA ranks, norms of the updates.

All ranks end with the same numbers, so owners need not send them along with their units.
Shapes: C clients, L layers, E experts, F expert width, X = E + 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.screening import outliers
from ubsmoe_ds.aggregation.server import Usage
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.mpi.world import World


class RoundStatistics(NamedTuple):
    """Statistics of a round, the same on all ranks.

    usage: see `Usage`.
    lora_ranks: each client's LoRA rank after the round.
    nonfinite_C: whether a client's update holds NaN or Inf.
    work_C: part of the round's work that each client did, 0 to 1; 0 as well for a client that is left out.
    norm_C: L2 norm of each client's update.
    left_out_C: whether a client's update is out of proportion to the others', see `outliers`.
    moments_LEX: see `sum_moments`.
    """

    usage: Usage
    lora_ranks: list[int]
    nonfinite_C: np.ndarray
    work_C: list[float]
    norm_C: np.ndarray
    left_out_C: np.ndarray
    moments_LEX: Tensor | None


class OwnPart(NamedTuple):
    """One rank's part of what `gather` sums.

    lora_rank: the client's LoRA rank after the round.
    work: part of the round's work that the client did, 0 to 1.
    finite: whether this rank's update is finite.
    squares: sum of squares of the update as far as this rank sends it.
    """

    lora_rank: int
    work: float
    finite: bool
    squares: float


def gather(
    world: World, client: Client, weights: Sequence[float], part: OwnPart, screen_factor: float | None
) -> RoundStatistics:
    """Sum a round's counts over the job (a collective); change nothing on this rank.

    The utilisation of a client with NaN or Inf in its update does not count, because its routing means nothing.

    Args:
        world: this rank's place in the job.
        client: this rank's client.
        weights: w_c of all clients.
        part: this rank's part.
        screen_factor: see `outliers`.
    """
    # one table carries everything: each rank adds its counts and flags to its client's row
    counts_LX = client.routed_counts().double()
    table = np.zeros((len(weights), counts_LX.numel() + len(part)))
    flags = [not part.finite, part.squares]
    flags += [part.lora_rank, part.work] if world.group_rank == 0 else [0, 0]  # the client's: count them once
    table[world.client] = [*counts_LX.reshape(-1).tolist(), *flags]
    table = world.sum(table)
    counts_CLX = torch.from_numpy(table[:, : -len(flags)]).view(len(weights), *counts_LX.shape)
    routed_CLE = counts_CLX[..., :-1] / counts_CLX[..., -1:].clamp_min(1)
    nonfinite, squares_C, rank_C, work_C = table[:, -len(flags) :].T
    nonfinite_C, norm_C = nonfinite > 0, np.sqrt(squares_C)
    left_out_C = outliers(norm_C, work_C, screen_factor)
    work_C = np.where(left_out_C, 0.0, work_C)
    weight_C = torch.tensor(weights, dtype=torch.float64) * torch.from_numpy(~nonfinite_C * work_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), routed_CLE)
    counts = part.finite and work_C[world.client] > 0
    moments_LEX = sum_moments(world, client, weights[world.client] if counts else 0.0)
    usage = Usage(routed_CLE, utilisation_LE.float())
    ranks = [int(rank) for rank in rank_C]
    return RoundStatistics(usage, ranks, nonfinite_C, work_C.tolist(), norm_C, left_out_C, moments_LEX)


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
