"""Evaluating the models of all clients: those that hold the same one are one view of it, and share the rows.

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


def own_part(exp: Experiment, world: World, client: Client, evaluator: Evaluator, stop: Callable[[], bool]) -> Part:
    """What this rank's share of the rows comes to (a collective over the client).

    Args:
        exp, world, client, evaluator: this rank's.
        stop: see `Evaluator.sums`.
    """
    of_client = exp.views
    distinct = list(dict.fromkeys(of_client))
    mine = distinct.index(of_client[world.client])
    sharers = [c for c, view in enumerate(of_client) if view == distinct[mine]]
    ranks = [(c, r) for c in sharers for r in range(exp.clients[c].ranks)]
    worker = ranks.index((world.client, world.client_rank))
    sums_G = np.zeros((len(distinct), len(evaluator.tasks), len(FIELDS)))
    counts_GLX = np.zeros((len(distinct), len(client.model.layers), exp.num_experts + 1))
    client.reset_counts()
    sums_G[mine] = evaluator.sums(client, client.k, worker, len(ranks), stop)
    counts_GLX[mine] = client.routed_counts().numpy()
    return sums_G, counts_GLX


def scalars_of_views(
    exp: Experiment, world: World, evaluator: Evaluator, weights: Sequence[float], own: Part
) -> dict[str, float]:
    """Of all ranks' parts (a collective); utilisation is weighted as in training, by w_c."""
    of_client = exp.views
    distinct = list(dict.fromkeys(of_client))
    sums_G, counts_GLX = world.sum(own[0]), world.sum(own[1])
    of_view = counts_GLX[..., :-1] / np.maximum(counts_GLX[..., -1:], 1)
    pairs = zip(weights, of_client, strict=True)
    utilisation_LE = sum(w * of_view[distinct.index(view)] for w, view in pairs)
    cv = float(coefficient_of_variation(torch.as_tensor(utilisation_LE)).mean())
    return evaluation_scalars([client.name for client in exp.clients], of_client, evaluator.tasks, sums_G, cv)
