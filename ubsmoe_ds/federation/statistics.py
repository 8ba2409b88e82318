"""Sum the counts of all ranks' local steps over the job: routed tokens, moments, LoRA ranks, norms of the updates.

All ranks end with the same numbers, so owners need not send them along with their units.
Shapes: C clients, L layers, E experts, F expert width, X = E + 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.screening import excess
from ubsmoe_ds.aggregation.server import Usage
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.mpi.world import World


class RoundStatistics(NamedTuple):
    """Statistics of a round, the same on all ranks.

    usage: see `Usage`.
    lora_ranks: each client's LoRA rank after the round.
    work_C: part of the round's work that each client did, 0 to 1; 0 as well for a client that is left out.
    norm_C: L2 norm of each client's update; NaN or Inf if the update holds such a value.
    excess_C: see `screening.excess`.
    left_out_C: whether a client is left out because of its excess.
    moments_LEX: see `sum_moments`.
    routed_CLE: tokens that each client routed to each expert.
    squares_CLE2: squared norms of each client's (real, pseudo) gradients of each expert; None without pseudo-gradients.
    """

    usage: Usage
    lora_ranks: list[int]
    work_C: np.ndarray
    norm_C: np.ndarray
    excess_C: np.ndarray
    left_out_C: np.ndarray
    moments_LEX: Tensor | None
    routed_CLE: Tensor
    squares_CLE2: Tensor | None

    @property
    def nonfinite(self) -> np.ndarray:
        """Return whether each client's update holds NaN or Inf."""
        return ~np.isfinite(self.norm_C)


class OwnPart(NamedTuple):
    """One rank's part of what `gather` sums.

    squares: sum of squares of the update as far as this rank sends it.
    lora_rank: the client's LoRA rank after the round.
    work: part of the round's work that the client did, 0 to 1.
    """

    squares: float
    lora_rank: int
    work: float


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
        screen_factor: excess from which a client is left out; None: nobody is.
    """
    # one table carries everything: each rank adds its counts to its client's row
    counts_LX = client.routed_counts().double()
    table = np.zeros((len(weights), counts_LX.numel() + len(part)))
    if world.group_rank > 0:  # these two are the client's: count them once
        part = part._replace(lora_rank=0, work=0.0)
    table[world.client] = [*counts_LX.reshape(-1).tolist(), *part]
    table = world.sum(table)
    counts_CLX = torch.from_numpy(table[:, : -len(part)]).view(len(weights), *counts_LX.shape)
    routed_CLE = counts_CLX[..., :-1]
    share_CLE = routed_CLE / counts_CLX[..., -1:].clamp_min(1)
    squares_C, rank_C, work_C = table[:, -len(part) :].T
    norm_C = np.sqrt(squares_C)
    excess_C = excess(norm_C, work_C)
    left_out_C = excess_C > (np.inf if screen_factor is None else screen_factor)
    work_C = np.where(left_out_C, 0.0, work_C)
    counted_C = np.where(np.isfinite(norm_C), work_C, 0.0)
    weight_C = torch.tensor(weights, dtype=torch.float64) * torch.from_numpy(counted_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), share_CLE)
    moments_LEX = sum_moments(world, client, weights[world.client] if counted_C[world.client] > 0 else 0.0)
    squares_CLE2 = sum_squares(world, client, len(weights))
    usage = Usage(share_CLE, utilisation_LE.float())
    ranks = [int(rank) for rank in rank_C]
    return RoundStatistics(usage, ranks, work_C, norm_C, excess_C, left_out_C, moments_LEX, routed_CLE, squares_CLE2)


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


def sum_squares(world: World, client: Client, clients: int) -> Tensor | None:
    """Return the squared norms of each client's expert gradients, summed over its ranks (a collective).

    Returns:
        [C, L, E, 2] like `Client.gradient_squares`; None without pseudo-gradients.
    """
    squares_LE2 = client.gradient_squares()
    if squares_LE2 is None:
        return None
    table = np.zeros((clients, *squares_LE2.shape))
    table[world.client] = squares_LE2.numpy()
    return torch.from_numpy(world.sum(table))


def count_refused(world: World, refused: Sequence[tuple[int, int]], clients: int, units: int) -> list[tuple[int, int]]:
    """Return (client, unit number) of every refused update, the same on all ranks (a collective)."""
    table = np.zeros((clients, units))
    for client, unit in refused:
        table[client, unit] = 1
    return [(int(c), int(u)) for c, u in np.argwhere(world.sum(table) > 0)]
