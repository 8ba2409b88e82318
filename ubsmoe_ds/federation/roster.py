"""Say who takes part in a round, and which group trains and evaluates whom: the same answers on all ranks."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ubsmoe_ds.base.errors import TooFewClients
from ubsmoe_ds.client.turn import Turn
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.models.cost import ModelShape
from ubsmoe_ds.planning.cohort import Cohorts
from ubsmoe_ds.planning.schedule import assign, loads, lower_bound
from ubsmoe_ds.planning.turn_cost import on_groups, own_evaluation_flops, turn_flops

Costs = dict[int, Mapping[int, float]]  # client -> group -> what its turn there takes


class Amount(NamedTuple):
    """Count some rows of a client, and their tokens."""

    rows: int
    tokens: int


class Lost(NamedTuple):
    """Hold the names of what deaths have cost.

    trainers: groups of which a rank has died, or clients that had one of their own. clients: others that no group left
    may train. out: clients that are out of the current round.
    """

    trainers: list[str]
    clients: list[str]
    out: list[str]


class Roster:
    """Cohorts and schedules of an experiment's rounds.

    Args:
        exp: the experiment.
        shape: of the model.
        training: rows of each client.
        evaluation: each client's own evaluation rows.
        measured: by name of a group the FLOPs a rank, and the seconds, of all its turns so far; see `note_seconds`.
    """

    def __init__(
        self,
        exp: Experiment,
        shape: ModelShape,
        training: Sequence[Amount],
        evaluation: Sequence[Amount],
        measured: dict[str, list[float]] | None = None,
    ) -> None:
        self.exp, self.measured = exp, {} if measured is None else measured
        self._cohorts = Cohorts(exp, [amount.rows for amount in training])
        self._flops_C = [turn_flops(exp, shape, client, *amount) for client, amount in enumerate(training)]
        self._own_C = [own_evaluation_flops(exp, shape, client, *amount) for client, amount in enumerate(evaluation)]
        self._with_own = [client for client, amount in enumerate(evaluation) if amount.rows]
        self.numbers = list(range(len(exp.trainers)))  # of the groups that are left, in the config
        # a round that has gone on with other groups than it began with: each group's clients, those it has trained too
        self._dealt: dict[int, list[list[int]]] = {}
        # costs and schedule of the latest round, which are asked for several times
        self._planned: dict[int, tuple[Costs, list[list[int]]]] = {}
        self._out: dict[int, list[int]] = {}  # clients that are out of a round because their groups have died

    def cohort(self, number: int) -> list[int]:
        """Return the numbers of the clients of a round, rising.

        Raises:
            TooFewClients: if no client that deaths have left is available in the round.
        """
        if not self.exp.takes_turns:
            return list(range(len(self.exp.clients)))
        if number in self._dealt:
            return sorted(client for clients in self._dealt[number] for client in clients)
        found = self._cohorts.of_round(number)
        if not found:
            raise TooFewClients(
                f"sampling.availability: no client that is left is there in round {number}; continue with --resume auto"
            )
        return found

    def enough(self, number: int) -> int:
        """Return how many clients must have finished for a round to be merged without the others."""
        return self._cohorts.merged(number) if self.exp.takes_turns else len(self.exp.clients)

    def schedule(self, number: int) -> list[list[int]]:
        """Return for each group the clients that it trains in a round, in order."""
        if not self.exp.takes_turns:
            return [[client] for client in range(len(self.exp.clients))]
        return self._plan(number)[1]

    def _plan(self, number: int) -> tuple[Costs, list[list[int]]]:
        """Return (costs of the clients of a round, its schedule)."""
        if number not in self._planned:
            costs = self.costs(self.cohort(number))
            self._planned = {number: (costs, self._dealt.get(number) or assign(costs, len(self.exp.trainers)))}
        return self._planned[number]

    def out(self, number: int) -> list[int]:
        """Return the clients that are out of a round because the groups that had them have died."""
        return self._out.get(number, [])

    def evaluated_by(self, group: int) -> list[int]:
        """Return the clients on whose own rows a group evaluates them: each group has about equal work."""
        if not self.exp.takes_turns:
            return [group]
        clients = [client for client in self._with_own if self.exp.allowed_groups(client)]
        return assign(on_groups(self.exp, self._own_C, clients), len(self.exp.trainers))[group]

    def costs(self, clients: Iterable[int]) -> Costs:
        """Return what a client's round costs on each group that may train it: FLOPs a rank, or predicted seconds."""
        found = on_groups(self.exp, self._flops_C, list(clients))
        if self.exp.train.schedule_by == "flops":
            return found
        speed_G = self._speeds()
        return {c: {group: flops / speed_G[group] for group, flops in of.items()} for c, of in found.items()}

    def note_seconds(self, clients: Sequence[int], groups: Sequence[int], seconds: Sequence[float]) -> None:
        """Note how long turns of a merged round took."""
        for client, group, took in zip(clients, groups, seconds, strict=True):
            trainer = self.exp.trainers[group]
            sums = self.measured.setdefault(trainer.name, [0.0, 0.0])
            sums[0] += self._flops_C[client] / trainer.ranks
            sums[1] += took

    def _speeds(self) -> list[float]:
        """Return each group's FLOP/s a rank, as far as it is measured; others get the mean, or 1."""
        found = [self.measured.get(trainer.name, [0.0, 0.0]) for trainer in self.exp.trainers]
        speeds = [flops / seconds if flops and seconds else None for flops, seconds in found]
        known = [speed for speed in speeds if speed is not None]
        return [speed or (sum(known) / len(known) if known else 1.0) for speed in speeds]

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
            anew = assign(self.costs(c for c in self.cohort(number) if c not in done), len(turns))
            self._dealt = {number: [[c for c in done if done[c] == g] + clients for g, clients in enumerate(anew)]}
            self._planned = {}

    def lose(self, exp: Experiment, lost: Collection[int], number: int | None) -> Lost:
        """Go on with the groups that are left.

        The clients that the lost groups had in the current round, trained or not, are out of it; the other groups keep
        theirs. If nobody is left in the round it is drawn and dealt anew. In later rounds all clients take part that
        some group left may train.

        Args:
            exp: what is left of the experiment.
            lost: numbers of the lost groups.
            number: the current round; None: it is merged, or the run is over.
        """
        old, turns = self.exp, [] if number is None else self.schedule(number)
        trainers = [trainer.name for group, trainer in enumerate(old.trainers) if group in lost]
        self.exp = exp
        self.numbers = [in_config for group, in_config in enumerate(self.numbers) if group not in lost]
        if not exp.takes_turns:
            return Lost(trainers, [], [])
        gone = sorted(set(old.clients_left) - set(exp.clients_left))
        out = sorted(client for group in lost for client in turns[group]) if turns else []
        kept = [clients for group, clients in enumerate(turns) if group not in lost]
        self._cohorts.lose(gone)
        self._planned = {}
        if number is not None and any(kept):
            self._dealt, self._out = {number: kept}, {number: [*self.out(number), *out]}
        else:
            self._dealt, self._out, out = {}, {}, []

        def others(clients: Iterable[int]) -> list[str]:
            return [name for name in (exp.clients[client].name for client in clients) if name not in trainers]

        return Lost(trainers, others(gone), others(out))

    def idle(self, number: int) -> tuple[float, float]:
        """Return (share of a round's time that groups idle, the round's length over the lower bound), as predicted."""
        busy, bound = self._loads(number)
        return (1 - sum(busy) / (len(busy) * max(busy)), max(busy) / bound) if bound else (0.0, 1.0)

    def _loads(self, number: int) -> tuple[list[float], float]:
        """Return (what each group's turns in a round cost, the least that any schedule could give the busiest)."""
        costs, turns = self._plan(number)
        return loads(costs, turns), lower_bound(costs, len(turns))

    def line(self, number: int) -> str:
        """Return the schedule of a round as a line: each group with its clients, and how much groups idle."""
        names = [client.name for client in self.exp.clients]
        parts = ", ".join(
            f"{trainer.name}: {' '.join(names[client] for client in clients) or 'nobody'}"
            for trainer, clients in zip(self.exp.trainers, self.schedule(number), strict=True)
        )
        share, over = self.idle(number)
        busy, _ = self._loads(number)
        longest = self.exp.trainers[busy.index(max(busy))].name
        predicted = f"{longest} is busy longest, groups idle {100 * share:.0f} %, {over:.2f} x the lower bound"
        return f"round {number}: {parts} (predicted: {predicted})"
