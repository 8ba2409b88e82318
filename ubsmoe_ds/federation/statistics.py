"""What is simply added up over the job after local steps: counts of routed tokens, moments, ranks, who went astray.

Every rank ends with the same numbers, so that owners need not send them along with their units.
Shapes: C clients, L layers, E experts, F expert width.
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
    """usage: see `Usage`; ranks: LoRA rank of each client from now on; astray_C: clients that sent NaN or Inf.

    worked_C: which part of its round each client did; moments_LEX: see `sum_moments`
    """

    usage: Usage
    ranks: list[int]
    astray_C: np.ndarray
    worked_C: list[float]
    moments_LEX: Tensor | None


def gather(
    world: World, client: Client, weights: Sequence[float], finite: bool, worked: float, pseudo_weight: float
) -> RoundStatistics:
    """Sum over the job (a collective); changes nothing here.

    The utilisation of a client that went astray does not count: with NaN in its weights its routing says nothing.

    Args:
        world, client: this rank's.
        weights: w_c.
        finite: whether everything this rank sends is finite.
        worked: which part of its round the client did, 0 to 1.
        pseudo_weight: what a pseudo-update counts as, beside a routed token, in `Usage.used_CLE`.
    """
    counts = torch.cat([client.routed_counts().double(), client.pseudo_mass().nan_to_num(0.0, 0.0, 0.0)], dim=1)
    layers, width = counts.shape
    experts = (width - 1) // 2
    of_client = np.zeros((len(weights), layers * width + 3))
    once = world.client_rank == 0
    own = [not finite, client.rank if once else 0, worked if once else 0]
    of_client[world.client] = [*counts.reshape(-1).tolist(), *own]
    table = world.sum(of_client)
    counts_CLX = torch.from_numpy(table[:, :-3]).view(len(weights), layers, width)
    tokens_CL1 = counts_CLX[..., experts : experts + 1].clamp_min(1)
    routed_CLE, pseudo_CLE = counts_CLX[..., :experts] / tokens_CL1, counts_CLX[..., experts + 1 :] / tokens_CL1
    astray_C, worked_C = table[:, -3] > 0, table[:, -1]
    weight_C = torch.tensor(weights, dtype=torch.float64) * torch.from_numpy(~astray_C * worked_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), routed_CLE)
    moments_LEX = sum_moments(world, client, weights[world.client] if finite and worked else 0.0)
    usage = Usage(routed_CLE + pseudo_weight * pseudo_CLE, utilisation_LE.float())
    return RoundStatistics(usage, [int(rank) for rank in table[:, -2]], astray_C, worked_C.tolist(), moments_LEX)


def sum_moments(world: World, client: Client, weight: float) -> Tensor | None:
    """Moments of the experts over the active tokens of all clients, weighted like their utilisation (a collective).

    Args:
        world, client: this rank's.
        weight: w_c of this client; 0 leaves its tokens out.

    Returns:
        What `ExpertMoments.update` takes; None where no pseudo-gradient needs moments.
    """
    if client.moments is None:
        return None
    sums_LEX = client.moments.sums()
    valid_LE1 = torch.isfinite(sums_LEX).all(dim=-1, keepdim=True)
    return torch.from_numpy(world.sum((weight * torch.where(valid_LE1, sums_LEX, 0.0)).numpy()))


def count_refused(world: World, refused: Sequence[tuple[int, int]], clients: int, units: int) -> list[tuple[int, int]]:
    """(client, unit number) of every refused update, known to all ranks (a collective)."""
    table = np.zeros((clients, units))
    for client, unit in refused:
        table[client, unit] = 1
    return [(int(c), int(u)) for c, u in np.argwhere(world.sum(table) > 0)]
