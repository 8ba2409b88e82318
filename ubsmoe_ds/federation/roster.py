"""Say who takes part in a round, and which group trains whom: the same answers on all ranks."""

from collections.abc import Iterable, Sequence

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.turn import Turn
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
        self._done: dict[int, set[int]] = {}  # of a resumed round: clients that others have trained

    def cohort(self, number: int) -> list[int]:
        """Return the numbers of the clients of a round, rising."""
        return self._cohorts.of_round(number)

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

    def note_done(self, number: int, clients: Iterable[int]) -> None:
        """Note clients whose turns in a round are in a checkpoint, when the round goes on with other groups."""
        self._done = {number: set(clients)}

    def line(self, number: int) -> str:
        """Return the schedule of a round as a line: each group with its clients, and the idle share."""
        turns, names = self.schedule(number), [client.name for client in self.exp.clients]
        costs = self.costs(self.cohort(number))
        busy = loads(costs, turns)
        idle = 1 - sum(busy) / (len(busy) * max(busy)) if max(busy) else 0.0
        parts = ", ".join(
            f"{trainer.name}: {' '.join(names[client] for client in clients) or 'nobody'}"
            for trainer, clients in zip(self.exp.trainers, turns, strict=True)
        )
        bound = lower_bound(costs, len(turns))
        return (
            f"schedule: {parts} (idle {100 * idle:.0f} %, {max(busy) / bound if bound else 1:.2f} x the best possible)"
        )


def _round_flops(exp: Experiment, shape: ModelShape, client: int, rows: int, tokens: int) -> float:
    """Return the FLOPs of a client's local steps in a round, by the mean length of its rows."""
    config = exp.clients[client]
    batch, length = exp.settings(config).train_batch_size, max(1, round(tokens / max(rows, 1)))
    step = step_flops(shape, exp.active_experts(config), batch * length, length, batch, router=exp.router.trainable)
    return step * exp.local_steps(config, rows)
