"""Say who takes part in a round, and which group trains and evaluates whom: the same answers on all ranks."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ubsmoe_ds.client.turn import Turn
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.models.cost import ModelShape
from ubsmoe_ds.planning.cohort import Cohorts
from ubsmoe_ds.planning.schedule import assign, loads, lower_bound
from ubsmoe_ds.planning.turn_cost import on_groups, own_evaluation_flops, turn_flops


class Amount(NamedTuple):
    """Count some rows of a client, and their tokens."""

    rows: int
    tokens: int


class Roster:
    """Cohorts and schedules of an experiment's rounds.

    Args:
        exp: the experiment.
        shape: of the model.
        training: rows of each client.
        evaluation: each client's own evaluation rows.
    """

    def __init__(
        self, exp: Experiment, shape: ModelShape, training: Sequence[Amount], evaluation: Sequence[Amount]
    ) -> None:
        self.exp = exp
        self._cohorts = Cohorts(exp, [amount.rows for amount in training])
        self._flops_C = [turn_flops(exp, shape, client, *amount) for client, amount in enumerate(training)]
        own_C = [own_evaluation_flops(exp, shape, client, *amount) for client, amount in enumerate(evaluation)]
        evaluated = [client for client, amount in enumerate(evaluation) if amount.rows]
        self._evaluated = assign(on_groups(exp, own_C, evaluated), len(exp.trainers))
        self._done: dict[int, set[int]] = {}  # of a resumed round: clients whose turns are done, if all are dealt anew

    def cohort(self, number: int) -> list[int]:
        """Return the numbers of the clients of a round, rising."""
        if not self.exp.takes_turns:
            return list(range(len(self.exp.clients)))
        return self._cohorts.of_round(number)

    def enough(self, number: int) -> int:
        """Return how many clients must have finished for a round to be merged without the others."""
        return self._cohorts.merged(number) if self.exp.takes_turns else len(self.exp.clients)

    def schedule(self, number: int) -> list[list[int]]:
        """Return for each group the clients that it trains in a round, in order."""
        if not self.exp.takes_turns:
            return [[client] for client in range(len(self.exp.clients))]
        left = [client for client in self.cohort(number) if client not in self._done.get(number, ())]
        return assign(self.costs(left), len(self.exp.trainers))

    def evaluated_by(self, group: int) -> list[int]:
        """Return the clients on whose own rows a group evaluates them: each group has about equal work."""
        if not self.exp.takes_turns:
            return [group]
        return self._evaluated[group]

    def costs(self, clients: Sequence[int]) -> dict[int, Mapping[int, float]]:
        """Return the FLOPs a rank of a client's round on each group that may train it."""
        return on_groups(self.exp, self._flops_C, clients)

    def turns_left(self, number: int, group: int, turns: Sequence[Turn]) -> list[int]:
        """Return the clients that a group has yet to train in a round."""
        done = {turn.client for turn in turns}
        return [client for client in self.schedule(number)[group] if client not in done]

    def note_done(self, number: int, done: Mapping[int, int]) -> None:
        """Note clients whose turns in a resumed round are done, and the groups that answer for them.

        If the round goes on with other groups than it began with, the other clients are dealt anew.
        """
        turns = self.schedule(number) if done else []
        if any(client not in turns[group] for client, group in done.items()):
            self._done = {number: set(done)}

    def idle(self, number: int) -> tuple[float, float]:
        """Return (share of a round's time that groups idle, the round's length over the lower bound), as predicted."""
        turns = self.schedule(number)
        costs = self.costs([client for clients in turns for client in clients])
        busy, bound = loads(costs, turns), lower_bound(costs, len(turns))
        return (1 - sum(busy) / (len(busy) * max(busy)), max(busy) / bound) if bound else (0.0, 1.0)

    def line(self, number: int) -> str:
        """Return the schedule of a round as a line: each group with its clients, and how much groups idle."""
        names = [client.name for client in self.exp.clients]
        parts = ", ".join(
            f"{trainer.name}: {' '.join(names[client] for client in clients) or 'nobody'}"
            for trainer, clients in zip(self.exp.trainers, self.schedule(number), strict=True)
        )
        share, over = self.idle(number)
        return f"round {number}: {parts} (predicted: groups idle {100 * share:.0f} %, {over:.2f} x the lower bound)"
