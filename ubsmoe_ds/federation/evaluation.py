"""Evaluate the models of all clients; clients that hold the same model share a view and divide its rows.

Shapes: G views, L layers, E experts, X = E + 1.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ubsmoe_ds.aggregation.dmr import coefficient_of_variation
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.evaluation import FIELDS, Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.metrics import evaluation_scalars
from ubsmoe_ds.mpi.world import World

Part = tuple[np.ndarray, np.ndarray]  # sums [G, tasks, fields] in the order of FIELDS, routed tokens [G, L, X]


def evaluate_part(
    exp: Experiment, world: World, client: Client, evaluator: Evaluator, stop: Callable[[], bool]
) -> Part:
    """Evaluate this rank's share of the rows on its client's view (a collective over the client's group).

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        client: this rank's client.
        evaluator: holds the evaluation rows.
        stop: see `Evaluator.sums`.
    """
    views = list(dict.fromkeys(exp.views))
    view, (worker, workers) = sharers_of(exp, world)
    sums_G = np.zeros((len(views), len(evaluator.tasks), len(FIELDS)))
    counts_GLX = np.zeros((len(views), len(client.model.layers), exp.num_experts + 1))
    client.reset_counts()
    sums_G[view] = evaluator.sums(client, client.k, worker, workers, stop)
    counts_GLX[view] = client.routed_counts().numpy()
    return sums_G, counts_GLX


def sharers_of(exp: Experiment, world: World) -> tuple[int, tuple[int, int]]:
    """Return (number of this rank's view, (its place among the ranks of all clients with this view, their number))."""
    view_of_client = exp.views
    mine = view_of_client[world.client]
    sharers = [c for c, view in enumerate(view_of_client) if view == mine]
    ranks = [(c, r) for c in sharers for r in range(exp.clients[c].ranks)]
    place = ranks.index((world.client, world.group_rank)), len(ranks)
    return list(dict.fromkeys(view_of_client)).index(mine), place


def view_scalars(
    exp: Experiment, world: World, evaluator: Evaluator, weights: Sequence[float], part: Part
) -> dict[str, float]:
    """Sum all ranks' parts and name the results (a collective).

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        evaluator: holds the evaluation rows.
        weights: w_c of all clients; utilisation is weighted by them, as in training.
        part: the result of `evaluate_part`.
    """
    view_of_client = exp.views
    views = list(dict.fromkeys(view_of_client))
    sums_G, counts_GLX = world.sum(part[0]), world.sum(part[1])
    utilisation_GLE = counts_GLX[..., :-1] / np.maximum(counts_GLX[..., -1:], 1)
    pairs = zip(weights, view_of_client, strict=True)
    utilisation_LE = sum(weight * utilisation_GLE[views.index(view)] for weight, view in pairs)
    cv = float(coefficient_of_variation(torch.as_tensor(utilisation_LE)).mean())
    names = [client.name for client in exp.clients]
    return evaluation_scalars(names, view_of_client, weights, evaluator.tasks, sums_G, cv)
