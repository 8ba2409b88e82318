"""Evaluate the models of all clients; clients that hold the same model share a view and divide its rows.

Where clients take turns, every group becomes a client of each view in turn, and all ranks divide its rows. A client's
own rows are evaluated by one group.

Shapes: C clients, G views, L layers, E experts, X = E + 1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ubsmoe_ds.aggregation.dmr import coefficient_of_variation
from ubsmoe_ds.client.evaluation import FIELDS, Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.metrics import evaluation_scalars
from ubsmoe_ds.federation.texts import Evaluators
from ubsmoe_ds.federation.training import GroupTraining
from ubsmoe_ds.mpi.world import World


class Part(NamedTuple):
    """Hold one rank's summands of the evaluation; they are zero for what other ranks evaluate.

    sums_G: [G, tasks, fields] in the order of FIELDS, on the common rows; own_C: [C, fields] on the clients' own rows;
    routed_GLX: routed tokens, on the common rows, or without these on the clients' own.
    """

    sums_G: np.ndarray
    own_C: np.ndarray
    routed_GLX: np.ndarray


class View(NamedTuple):
    """A view that this rank's group holds: its number, the number of a client with it, and this rank's part of rows.

    place: (this rank's place among all ranks that share the view's rows, their number).
    """

    number: int
    client: int
    place: tuple[int, int]


class OwnRows(NamedTuple):
    """The own evaluation rows of a client that this rank's group holds: its number, and its rows."""

    client: int
    evaluator: Evaluator


def views_of(training: GroupTraining) -> Iterator[View]:
    """Yield each view that this rank evaluates a part of; its group holds it until the next one is asked for."""
    exp, world = training.exp, training.world
    if not exp.takes_turns:
        yield sharers_of(exp, world)
        return
    of_clients = exp.views
    for number, view in enumerate(dict.fromkeys(of_clients)):
        client = of_clients.index(view)
        training.become(client)
        yield View(number, client, (world.rank, world.comm.size))


def own_rows_of(training: GroupTraining) -> Iterator[OwnRows]:
    """Yield the clients whose own rows this rank's group evaluates; it holds each until the next one is asked for."""
    exp, evaluators = training.exp, training.texts.evaluators
    for client in training.roster.evaluated_by(training.world.group):
        evaluator = evaluators.own(client if exp.takes_turns else training.own)
        if evaluator is None:
            continue
        if exp.takes_turns:
            training.become(client)
        yield OwnRows(client, evaluator)


def evaluate_part(training: GroupTraining, stop: Callable[[], bool]) -> Part:
    """Evaluate this rank's share of the rows on its group's views (a collective over the group).

    Args:
        training: this rank's group.
        stop: see `Evaluator.sums`.
    """
    exp, client, world = training.exp, training.client, training.world
    of_clients, common = exp.views, training.texts.evaluators.common
    views, tasks = list(dict.fromkeys(of_clients)), training.texts.evaluators.tasks
    sums_G = np.zeros((len(views), len(tasks), len(FIELDS)))
    routed_GLX = np.zeros((len(views), len(client.model.layers), exp.num_experts + 1))
    own_C = np.zeros((len(exp.clients), len(FIELDS)))
    if common is not None:
        for view in views_of(training):
            client.reset_counts()
            sums_G[view.number] = common.sums(client, client.k, *view.place, stop)
            routed_GLX[view.number] = client.routed_counts().numpy()
    for of_client, own in own_rows_of(training):
        client.reset_counts()
        ranks = exp.trainers[world.group].ranks
        own_C[of_client] = own.sums(client, client.k, world.group_rank, ranks, stop).sum(0)
        if common is None:
            routed_GLX[views.index(of_clients[of_client])] += client.routed_counts().numpy()
    return Part(sums_G, own_C, routed_GLX)


def sharers_of(exp: Experiment, world: World) -> View:
    """Return the view of this rank's client, whose rows the ranks of all clients with this view share."""
    view_of_client = exp.views
    mine = view_of_client[world.group]
    sharers = [c for c, view in enumerate(view_of_client) if view == mine]
    ranks = [(c, r) for c in sharers for r in range(exp.clients[c].ranks)]
    place = ranks.index((world.group, world.group_rank)), len(ranks)
    return View(list(dict.fromkeys(view_of_client)).index(mine), world.group, place)


def view_scalars(
    exp: Experiment, world: World, evaluators: Evaluators, weights: Sequence[float], part: Part
) -> dict[str, float]:
    """Sum all ranks' parts and name the results (a collective).

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        evaluators: hold the evaluation rows.
        weights: w_c of all clients; utilisation is weighted by them, as in training.
        part: the result of `evaluate_part`.
    """
    view_of_client = exp.views
    views = list(dict.fromkeys(view_of_client))
    sums_G, counts_GLX = world.sum(part.sums_G), world.sum(part.routed_GLX)
    own_C = world.sum(part.own_C) if any(client.eval_source for client in exp.clients) else None
    utilisation_GLE = counts_GLX[..., :-1] / np.maximum(counts_GLX[..., -1:], 1)
    pairs = zip(weights, view_of_client, strict=True)
    utilisation_LE = sum(weight * utilisation_GLE[views.index(view)] for weight, view in pairs)
    cv = float(coefficient_of_variation(torch.as_tensor(utilisation_LE)).mean())
    names = [client.name for client in exp.clients]
    return evaluation_scalars(names, view_of_client, weights, evaluators.tasks, sums_G, cv, own_C)
