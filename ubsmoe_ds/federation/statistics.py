"""Sum the counts of all ranks' local steps over the job: routed tokens, moments, LoRA ranks, norms of the updates.

All ranks end with the same numbers, so owners need not send them along with their units.
Shapes: C clients of the round, L layers, E experts, F expert width, X = E + 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.screening import excess
from ubsmoe_ds.aggregation.server import Usage
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.turn import OwnPart, Turn, Turns
from ubsmoe_ds.mpi.world import World

OWN_COLUMNS = len(OwnPart._fields) + 4  # of a table that sums what ranks know of turns; see `_table`


class RoundStatistics(NamedTuple):
    """Statistics of a round, the same on all ranks.

    cohort: numbers of the clients that have taken local steps, rising; the order of C.
    place_C2: the group that trained each, and its place among that group's turns.
    usage: see `Usage`.
    lora_ranks: each client's LoRA rank after the round.
    work_C: part of the round's work that each client did, 0 to 1; 0 as well for a client that is left out.
    norm_C: L2 norm of each client's update; NaN or Inf if the update holds such a value.
    excess_C: see `screening.excess`.
    left_out_C: whether a client is left out because of its excess, or that of one with which it is added up.
    added_C: whether a client's update is in the sum of its group's.
    moments_LEX: see `sum_moments`.
    routed_CLE: tokens that each client routed to each expert.
    squares_CLE2: squared norms of each client's (real, pseudo) gradients of each expert; None without pseudo-gradients.
    """

    cohort: list[int]
    place_C2: np.ndarray
    usage: Usage
    lora_ranks: list[int]
    work_C: np.ndarray
    norm_C: np.ndarray
    excess_C: np.ndarray
    left_out_C: np.ndarray
    added_C: np.ndarray
    moments_LEX: Tensor | None
    routed_CLE: Tensor
    squares_CLE2: Tensor | None

    @property
    def nonfinite(self) -> np.ndarray:
        """Return whether each client's update holds NaN or Inf."""
        return ~np.isfinite(self.norm_C)

    @property
    def merged(self) -> list[int]:
        """Return the numbers of the clients that are merged: they did some work, are not left out, and sent no NaN."""
        counts_C = (self.work_C > 0) & ~self.nonfinite
        return [client for client, counts in zip(self.cohort, counts_C, strict=True) if counts]


def gather(
    world: World,
    client: Client,
    turns: Turns,
    cohort: Sequence[int],
    weights: Sequence[float],
    screen_factor: float | None,
) -> RoundStatistics:
    """Sum a round's counts over the job (a collective); change nothing on this rank.

    The utilisation of a client with NaN or Inf in its update does not count, because its routing means nothing.

    Args:
        world: this rank's place in the job.
        client: this rank's engine, for shapes alone.
        turns: this rank's.
        cohort: numbers of the clients that should have taken part, rising.
        weights: w_c of all clients.
        screen_factor: excess from which a client is left out; None: nobody is.
    """
    layers, experts = len(client.model.layers), client.model.layers[0].num_experts
    of_routes, of_gradients = layers * (experts + 1), 2 * layers * experts * (client.gradient_hook.squares is not None)
    table = _table(world, turns.done, cohort, of_routes + of_gradients)
    taken_C = table[:, -4] > 0
    cohort, table = [number for number, taken in zip(cohort, taken_C, strict=True) if taken], table[taken_C]
    counts, of_experts, own = np.split(table, [of_routes, -OWN_COLUMNS], axis=1)
    counts_CLX = torch.from_numpy(counts).view(len(cohort), layers, experts + 1)
    routed_CLE = counts_CLX[..., :-1]
    share_CLE = routed_CLE / counts_CLX[..., -1:].clamp_min(1)
    squares_C, rank_C, work_C = own[:, :-4].T
    place_C2, added_C = own[:, -3:-1].astype(int), own[:, -1] > 0
    norm_C = np.sqrt(squares_C)
    excess_C = excess(norm_C, work_C)
    left_out_C = excess_C > (np.inf if screen_factor is None else screen_factor)
    # a sum cannot be taken apart again
    left_out_C |= added_C & np.isin(place_C2[:, 0], place_C2[left_out_C & added_C, 0])
    work_C = np.where(left_out_C, 0.0, work_C)
    counted_C = np.where(np.isfinite(norm_C), work_C, 0.0)
    own_C = np.array([weights[number] for number in cohort])
    weight_C = torch.from_numpy(own_C) * torch.from_numpy(counted_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), share_CLE)
    counted = dict(zip(cohort, np.where(counted_C > 0, own_C, 0.0).tolist(), strict=True))
    parts = [(turn.sums_LEX, counted[turn.client]) for turn in turns.done if turn.sums_LEX is not None]
    if turns.total_LEX is not None:
        parts.append((turns.total_LEX, 0.0 if is_left_out(turns, cohort, left_out_C) else 1.0))
    return RoundStatistics(
        cohort=cohort,
        place_C2=place_C2,
        usage=Usage(share_CLE, utilisation_LE.float()),
        lora_ranks=[int(rank) for rank in rank_C],
        work_C=work_C,
        norm_C=norm_C,
        excess_C=excess_C,
        left_out_C=left_out_C,
        added_C=added_C,
        moments_LEX=sum_moments(world, client, parts),
        routed_CLE=routed_CLE,
        squares_CLE2=torch.from_numpy(of_experts).view(-1, layers, experts, 2) if of_gradients else None,
    )


def _table(world: World, turns: Sequence[Turn], cohort: Sequence[int], numel: int) -> np.ndarray:
    """Return [C, ...]: counts, squares, `OwnPart`, whether it took steps, its group and place, whether added up."""
    # one table carries everything: each rank adds its counts to the rows of the clients that it has trained
    table = np.zeros((len(cohort), numel + OWN_COLUMNS))
    for turn in turns:
        part, place = turn.part, [1.0, world.group, turn.slot, turn.update is None]
        if world.group_rank > 0:  # these are the client's: count them once
            part, place = part._replace(lora_rank=0, work=0.0), [0.0, 0.0, 0.0, 0.0]
        squares = [] if turn.squares_LE2 is None else [turn.squares_LE2.reshape(-1).numpy()]
        counts = [turn.routed_LX.reshape(-1).numpy(), *squares, np.array([*part, *place])]
        np.concatenate(counts, out=table[cohort.index(turn.client)])
    return world.sum(table)


def is_left_out(turns: Turns, cohort: Sequence[int], left_out_C: np.ndarray) -> bool:
    """Return whether the sum of this group's clients is left out: all that are added up are, or none."""
    return any(left_out_C[cohort.index(turn.client)] for turn in turns.done if turn.update is None)


def without_left_out(turns: Turns, statistics: RoundStatistics) -> Turns:
    """Return the turns with zero for what is left out; the given ones stay as they are: a merge may be repeated."""
    out = {client for client, left in zip(statistics.cohort, statistics.left_out_C, strict=True) if left}
    done = [
        replace(turn, update=torch.zeros_like(turn.update)) if turn.client in out and turn.update is not None else turn
        for turn in turns.done
    ]
    whole = not is_left_out(turns, statistics.cohort, statistics.left_out_C)
    return replace(turns, done=done, total=turns.total if whole else None)


def sum_moments(world: World, client: Client, parts: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """Sum the experts' moments over the active tokens of all clients, weighted like their utilisation (a collective).

    Args:
        world: this rank's place in the job.
        client: this rank's engine.
        parts: for each client that this rank has trained the result of `moment_sums` and w_c; 0 leaves its tokens out.

    Returns:
        The argument of `ExpertMoments.update`; None if no pseudo-gradient (PG) estimator needs moments.
    """
    if client.moments is None:
        return None
    first = parts[0][0] if parts else client.moments.sums()
    total_LEX = torch.zeros_like(first)
    for sums_LEX, weight in parts:
        total_LEX += weight * sums_LEX
    return torch.from_numpy(world.sum(total_LEX.numpy()))


def count_refused(world: World, refused: Sequence[tuple[int, int]], clients: int, units: int) -> list[tuple[int, int]]:
    """Return (place in the cohort, unit number) of every refused update, the same on all ranks (a collective)."""
    table = np.zeros((clients, units))
    for client, unit in refused:
        table[client, unit] = 1
    return [(int(c), int(u)) for c, u in np.argwhere(world.sum(table) > 0)]
