"""Say who takes part in a round, and which group trains whom: the same answers on all ranks."""

from collections.abc import Iterable, Mapping, Sequence

from ubsmoe_ds.client.turn import Turn
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.models.cost import ModelShape, step_flops
from ubsmoe_ds.planning.cohort import Cohorts
from ubsmoe_ds.planning.schedule import assign, loads, lower_bound


class Roster:
    """Cohorts and schedules of an experiment's rounds.

    Args:
        exp: the experiment.
        shape: of the model.
        rows, tokens: training rows of each client, and their tokens.
    """

    def __init__(self, exp: Experiment, shape: ModelShape, rows: Sequence[int], tokens: Sequence[int]) -> None:
        self.exp = exp
        self._cohorts = Cohorts(exp, rows)
        self._flops = [
            _round_flops(exp, shape, client, count, total)
            for client, (count, total) in enumerate(zip(rows, tokens, strict=True))
        ]
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

    def costs(self, clients: Iterable[int]) -> dict[int, dict[int, float]]:
        """Return the FLOPs a rank of a client's round on each group that may train it."""
        return {
            client: {
                group: self._flops[client] / self.exp.trainers[group].ranks for group in self.exp.allowed_groups(client)
            }
            for client in clients
        }

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


def _round_flops(exp: Experiment, shape: ModelShape, client: int, rows: int, tokens: int) -> float:
    """Return the FLOPs of a client's local steps in a round, by the mean length of its rows."""
    config = exp.clients[client]
    batch, length = exp.settings(config).train_batch_size, max(1, round(tokens / max(rows, 1)))
    step = step_flops(shape, exp.active_experts(config), batch * length, length, batch, router=exp.router.trainable)
    return step * exp.local_steps(config, rows)
