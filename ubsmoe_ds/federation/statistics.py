"""Sum what all ranks know of a round's turns over the job: counts of local steps, norms of the updates, LoRA ranks.

All ranks end with the same numbers, so owners need not send them along with their units.
Shapes: C clients of the round, G groups, L layers, E experts, F expert width, X = E + 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.screening import excess
from ubsmoe_ds.aggregation.server import Usage
from ubsmoe_ds.client.engine import Client, LocalStats
from ubsmoe_ds.client.turn import Turn, Turns
from ubsmoe_ds.federation.metrics import RoundSeconds
from ubsmoe_ds.mpi.world import World


class RoundStatistics(NamedTuple):
    """Statistics of a round, the same on all ranks.

    cohort: numbers of the clients that have taken local steps, rising; the order of C.
    place_C2: the group that trained each, and its place among that group's turns.
    stats_C: sums over each client's local steps.
    seconds_C, rate_C, taken_C: see `Turn.seconds`, `Turn.learning_rate`, `Turn.steps_taken`.
    scales_CL: see `Turn.scales_L`; [C, 0] without.
    usage: see `Usage`.
    lora_ranks: each client's LoRA rank after the round.
    work_C: part of the round's work that each client did, 0 to 1; 0 as well for a client that is left out.
    norm_C: L2 norm of each client's update; NaN or Inf if the update holds such a value.
    excess_C: see `screening.excess`.
    left_out_C: whether a client is left out because of its excess, or that of one with which it is added up.
    added_C: whether a client's update is in the sum of its group's.
    routed_CLE: tokens that each client routed to each expert.
    squares_CLE2: squared norms of each client's (real, pseudo) gradients of each expert; None without pseudo-gradients.
    """

    cohort: list[int]
    place_C2: np.ndarray
    stats_C: list[LocalStats]
    seconds_C: np.ndarray
    rate_C: np.ndarray
    taken_C: np.ndarray
    scales_CL: np.ndarray
    usage: Usage
    lora_ranks: list[int]
    work_C: np.ndarray
    norm_C: np.ndarray
    excess_C: np.ndarray
    left_out_C: np.ndarray
    added_C: np.ndarray
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
    stop: bool = False,
) -> RoundStatistics | None:
    """Sum what ranks know of a round over the job (a collective); change nothing on this rank.

    The utilisation of a client with NaN or Inf in its update does not count, because its routing means nothing.

    Args:
        world: this rank's place in the job.
        client: this rank's engine, for shapes alone.
        turns: this rank's.
        cohort: numbers of the clients that should have taken part, rising.
        weights: w_c of all clients.
        screen_factor: excess from which a client is left out; None: nobody is.
        stop: whether this rank is asked to stop.

    Returns:
        None on all ranks if one is asked to stop.
    """
    table_C = _table(world, turns.done, cohort, _row(client), stop)
    if table_C is None:
        return None
    there_C = table_C["there"] > 0
    cohort, table_C = [number for number, there in zip(cohort, there_C, strict=True) if there], table_C[there_C]
    routed_CLE, tokens_CL1 = torch.from_numpy(table_C["routed"]).tensor_split([-1], dim=-1)
    share_CLE = routed_CLE / tokens_CL1.clamp_min(1)
    place_C2 = np.stack([table_C["group"], table_C["slot"]], axis=1).astype(int)
    norm_C, added_C = np.sqrt(table_C["square"]), table_C["added"] > 0
    excess_C = excess(norm_C, table_C["work"])
    left_out_C = excess_C > (np.inf if screen_factor is None else screen_factor)
    # a sum cannot be taken apart again
    left_out_C |= added_C & np.isin(place_C2[:, 0], place_C2[left_out_C & added_C, 0])
    work_C = np.where(left_out_C, 0.0, table_C["work"])
    counted_C = np.where(np.isfinite(norm_C), work_C, 0.0)
    weight_C = torch.from_numpy(np.array([weights[number] for number in cohort]) * counted_C)
    utilisation_LE = torch.einsum("c,cle->le", weight_C / weight_C.sum().clamp_min(1e-12), share_CLE)
    return RoundStatistics(
        cohort=cohort,
        place_C2=place_C2,
        stats_C=[LocalStats(*row) for row in table_C["stats"].tolist()],
        seconds_C=table_C["seconds"],
        rate_C=table_C["learning_rate"],
        taken_C=table_C["steps_taken"].astype(int),
        scales_CL=table_C["scales"],
        usage=Usage(share_CLE, utilisation_LE.float()),
        lora_ranks=table_C["lora_rank"].astype(int).tolist(),
        work_C=work_C,
        norm_C=norm_C,
        excess_C=excess_C,
        left_out_C=left_out_C,
        added_C=added_C,
        routed_CLE=routed_CLE,
        squares_CLE2=torch.from_numpy(table_C["squares"]) if client.gradient_hook.squares is not None else None,
    )


def _row(client: Client) -> np.dtype:
    """Return the dtype of a turn's row in the table that is summed over the job: fp64 throughout.

    All ranks of a group have parts of `routed`, `squares` (of gradients), `stats` and `square` (of the update); the
    rest is told by its first rank.
    """
    layers, experts = len(client.model.layers), client.model.layers[0].num_experts
    shapes: dict[str, tuple[int, ...]] = {
        "routed": (layers, experts + 1),
        "squares": (layers, experts, 2) if client.gradient_hook.squares is not None else (0,),
        "stats": (len(LocalStats._fields),),
        "scales": (layers if client.learns_scales else 0,),
    }
    told = ("lora_rank", "work", "seconds", "learning_rate", "steps_taken", "there", "group", "slot", "added")
    return np.dtype([(name, np.float64, shapes.get(name, ())) for name in (*shapes, "square", *told)])


def _table(world: World, turns: Sequence[Turn], cohort: Sequence[int], row: np.dtype, stop: bool) -> np.ndarray | None:
    """Sum the rows of all clients of the cohort over the job, [C]; None if a rank is asked to stop (a collective)."""
    # one table carries everything: each rank adds its counts to the rows of the clients that it has trained
    table_C = np.zeros(len(cohort), row)
    for turn in turns:
        at, stats, first = table_C[cohort.index(turn.client)], turn.stats, world.group_rank == 0
        at["routed"], at["square"] = turn.routed_LX.numpy(), turn.part.squares
        if turn.squares_LE2 is not None:
            at["squares"] = turn.squares_LE2.numpy()
        # norm and steps are the client's, times its first rank's: count them once
        at["stats"] = stats if first else stats._replace(gradient_norm=0.0, steps=0.0, bad_steps=0.0)
        if not first:
            continue
        at["lora_rank"], at["work"], at["seconds"] = turn.part.lora_rank, turn.part.work, turn.seconds
        at["learning_rate"], at["steps_taken"], at["there"] = turn.learning_rate, turn.steps_taken, 1
        at["group"], at["slot"], at["added"] = world.group, turn.slot, turn.update is None
        if turn.scales_L is not None:
            at["scales"] = turn.scales_L.numpy()
    whole = world.sum(np.append(table_C.view(np.float64), stop))
    return None if whole[-1] else whole[:-1].view(row)


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


def own_moments(client: Client, turns: Turns, statistics: RoundStatistics, weights: Sequence[float]) -> Tensor | None:
    """Return this rank's part of the experts' moments over the active tokens of all clients, to be summed over the job.

    They are weighted like utilisation.

    Args:
        client: this rank's engine.
        turns: this rank's.
        statistics: of the round.
        weights: w_c of all clients.

    Returns:
        See `weigh_moments`.
    """
    merged = set(statistics.merged)
    parts = [
        (turn.sums_LEX, weights[turn.client] if turn.client in merged else 0.0)
        for turn in turns.done
        if turn.sums_LEX is not None
    ]
    if turns.total_LEX is not None:
        out = is_left_out(turns, statistics.cohort, statistics.left_out_C)
        parts.append((turns.total_LEX, 0.0 if out else 1.0))
    return weigh_moments(client, parts)


def weigh_moments(client: Client, parts: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    """Return the sum of weights times moments, fp64; None if no pseudo-gradient (PG) estimator needs them.

    Summed over the job it is the argument of `ExpertMoments.update`.

    Args:
        client: this rank's engine.
        parts: for each client that this rank has trained the result of `moment_sums` and w_c; 0 leaves its tokens out.
    """
    if client.moments is None:
        return None
    total_LEX = torch.zeros_like(parts[0][0] if parts else client.moments.sums())
    for sums_LEX, weight in parts:
        total_LEX += weight * sums_LEX
    return total_LEX


class MergeSums(NamedTuple):
    """Hold what ranks sum over the job at the end of a merge; the same on all ranks.

    seconds_G: of each group's first rank. bytes_G: sent by each group's ranks to others.
    moments_LEX: the argument of `ExpertMoments.update`; None without moments.
    """

    seconds_G: list[RoundSeconds]
    bytes_G: np.ndarray
    moments_LEX: Tensor | None


def sum_up(world: World, groups: int, seconds: RoundSeconds, sent: int, moments_LEX: Tensor | None) -> MergeSums:
    """Sum over the job what ranks know at the end of a merge (a collective).

    Args:
        world: this rank's place in the job.
        groups: their number.
        seconds: of this rank.
        sent: bytes that this rank has sent to others.
        moments_LEX: this rank's part, see `own_moments`.
    """
    table_G5 = np.zeros((groups, 1 + len(seconds)))
    table_G5[world.group] = [sent, *(seconds if world.group_rank == 0 else np.zeros(len(seconds)))]
    moments = np.zeros(0) if moments_LEX is None else moments_LEX.numpy().reshape(-1)
    whole = world.sum(np.concatenate([table_G5.reshape(-1), moments]))
    table_G5, moments = whole[: table_G5.size].reshape(table_G5.shape), whole[table_G5.size :]
    return MergeSums(
        [RoundSeconds(*row) for row in table_G5[:, 1:].tolist()],
        table_G5[:, 0],
        None if moments_LEX is None else torch.from_numpy(moments).view(moments_LEX.shape),
    )


def count_refused(world: World, refused: Sequence[tuple[int, int]], clients: int, units: int) -> list[tuple[int, int]]:
    """Return (place in the cohort, unit number) of every refused update, the same on all ranks (a collective)."""
    table = np.zeros((clients, units))
    for client, unit in refused:
        table[client, unit] = 1
    return [(int(c), int(u)) for c, u in np.argwhere(world.sum(table) > 0)]
