"""Merge the clients' updates on all ranks together: statistics, exchange, server, and the result back into the model.

There is no central server: every rank owns some units (see aggregation/layout.py). `merge` can be repeated: it changes
nothing that a second call could not redo. `apply` changes this rank for good and does not communicate. In between all
ranks agree, so that a job that survives deaths completes a merge on all ranks or on none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.pruning import next_rank
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import Diverged
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.shared_state import load_replica, replicate
from ubsmoe_ds.client.engine import Client, tail_start
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.exchanges import ExchangeFactory
from ubsmoe_ds.federation.statistics import OwnPart, RoundStatistics, count_refused, gather, sum_moments
from ubsmoe_ds.mpi.world import World


class Merged(NamedTuple):
    """The outcome of a merge on this rank, before it is applied.

    difference: change of the units that this rank holds.
    statistics: the round's statistics, the same on all ranks.
    refused: for each client the names of its units that owners refused, the same on all ranks.
    replica: see `replicate`; empty unless the job survives deaths.
    """

    difference: Tensor
    statistics: RoundStatistics
    refused: list[list[str]]
    replica: dict[str, Tensor]


class Aggregator:
    """Merge on this rank, together with all others.

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        client: this rank's client.
        store: the client's units.
        server: merges the units that this rank owns.
        exchange_for: makes the exchange for the LoRA ranks that clients send and for those that they get back.
        stopwatch: records the stages "exchange", "wait" and "merge".
    """

    def __init__(
        self,
        exp: Experiment,
        world: World,
        client: Client,
        store: UnitStore,
        server: Server,
        exchange_for: ExchangeFactory,
        stopwatch: Stopwatch,
    ) -> None:
        self.exp, self.world, self.client, self.store, self.server = exp, world, client, store, server
        self.exchange_for, self.stopwatch = exchange_for, stopwatch
        self.exchange = exchange_for(server.lora_ranks, self._reply_ranks(server.lora_ranks))
        self.started = False  # whether owners know what clients hold
        self.moments_shared = False  # whether all clients have the same moments, from calibration or a checkpoint
        self.replica: dict[str, Tensor] = {}

    @property
    def lora_rank(self) -> int:
        """Return the current LoRA rank of this rank's client."""
        return self.server.lora_ranks[self.world.client]

    def note_restored(self) -> None:
        """Call this after a restore: the moments are shared already; replicate the optimiser's state (a collective)."""
        self.moments_shared = True
        self.replica = replicate(self.world, self.server, self.store.units) if self.world.survives else {}

    def start(self) -> None:
        """Tell owners what clients hold, and share the moments from calibration (a collective)."""
        held = self.exchange.collect(self.store.shared.numpy(), exact=True)
        moments_LEX = None
        if not self.moments_shared:
            moments_LEX = sum_moments(self.world, self.client, self.server.weights[self.world.client])
        self.world.agree()
        self.server.start(held)
        self._take_moments(moments_LEX)
        self.started = self.moments_shared = True

    def survive(self, exp: Experiment, world: World, server: Server, exchange_for: ExchangeFactory) -> None:
        """Continue without the lost clients (see recovery.py); call `start` next.

        Args:
            exp, world, server, exchange_for: those of the remaining clients.
        """
        self.exp, self.world, self.server, self.exchange_for = exp, world, server, exchange_for
        load_replica(server, self.store.units, self.replica)
        self.exchange = exchange_for(server.lora_ranks, self._reply_ranks(server.lora_ranks))
        self.started = False

    def merge(self, work: float) -> Merged:
        """Merge what local steps have changed (a collective).

        Args:
            work: part of the round's work that this client did, 0 to 1; 0: it sits the round out.

        Raises:
            Diverged: if no client has anything to merge, or the merge is not finite.
        """
        store, rank = self.store, self.lora_rank
        update = store.updates(rank) if work else torch.zeros_like(store.shared)
        new_rank = rank
        if self.exp.lora.prune_penalty and work:
            new_rank = next_rank(store, update, rank, tail_start(self.exp.lora, rank))
        part = OwnPart(self.exchange.sent_squares(update.numpy()), new_rank, work)
        self.stopwatch.lap("exchange")
        statistics = gather(self.world, self.client, self.server.weights, part, self.exp.merge.screen_factor)
        self.stopwatch.lap("wait")
        self._require_updates(statistics)
        if statistics.left_out_C[self.world.client]:
            update = torch.zeros_like(store.shared)
        difference = self._exchange(update, statistics)
        if self.world.any(not bool(torch.isfinite(difference).all())):
            raise Diverged(f"merge.rule {self.exp.merge.rule}: the merge of finite updates is not finite")
        refused = self._refused(statistics)
        replica = replicate(self.world, self.server, store.units) if self.world.survives else {}
        self.stopwatch.lap("exchange")
        return Merged(difference, statistics, refused, replica)

    def apply(self, merged: Merged, round_number: int) -> None:
        """Write the merge into the model, its moments and the LoRA ranks, for good; not a collective."""
        statistics, me = merged.statistics, self.world.client
        old, new = self.server.lora_ranks, statistics.lora_ranks
        reply = self._reply_ranks(new)
        self.store.apply(merged.difference, old[me], reply[me], round_number)
        self.server.lora_ranks = list(new)
        self._take_moments(statistics.moments_LEX)
        if new != old:
            self.exchange = self.exchange_for(new, reply)
            if new[me] != old[me]:
                self.client.reset_optimizer()  # the moments of pruned LoRA ranks would move them again
        if statistics.nonfinite[me] or statistics.work_C[me] == 0:
            self.client.recover()
        self.replica = merged.replica
        self.stopwatch.lap("exchange")

    def _require_updates(self, statistics: RoundStatistics) -> None:
        """Raise `Diverged` if every client sits the round out or sent NaN or Inf."""
        if ((statistics.work_C > 0) & ~statistics.nonfinite).any():
            return
        reasons = [
            f"{client.name}: {'NaN or Inf in its update' if work else 'sat the round out'}"
            for client, work in zip(self.exp.clients, statistics.work_C, strict=True)
        ]
        raise Diverged(f"no client has a finite update to merge ({', '.join(reasons)})")

    def _exchange(self, update: Tensor, statistics: RoundStatistics) -> Tensor:
        """Send updates to the owners, merge there, and return the change of this rank's units."""
        old, new = self.server.lora_ranks, statistics.lora_ranks
        self.server.weigh(statistics.work_C.tolist(), statistics.nonfinite.tolist())
        if new != old:
            self.exchange = self.exchange_for(old, self._reply_ranks(new))
        if self.exchange.is_reducible and self.exp.merge.is_linear and not statistics.nonfinite.any():
            return self._reduce(update, statistics.usage)
        received = self.exchange.collect(update.numpy())
        self.stopwatch.lap("exchange")
        replies = self.server.merge(received, statistics.usage, new)
        self.stopwatch.lap("merge")
        return torch.from_numpy(self.exchange.distribute(replies))

    def _reduce(self, update: Tensor, usage: Usage) -> Tensor:
        """Do the same for linear rules at less cost: sums are formed on the way to the owners."""
        self.stopwatch.lap("exchange")
        sizes = torch.tensor([unit.size(self.lora_rank) for unit in self.store.units])
        share_U = self.server.shares(self.store.units, usage, self.world.client)
        alike = bool((share_U == share_U[0]).all())
        share = float(share_U[0]) if alike else share_U.repeat_interleave(sizes).numpy()
        self.stopwatch.lap("merge")
        total = self.exchange.reduce(update.numpy(), share)
        self.stopwatch.lap("exchange")
        delta = self.server.merge_sum(total, usage)
        self.stopwatch.lap("merge")
        return torch.from_numpy(self.exchange.gather(delta))

    def _refused(self, statistics: RoundStatistics) -> list[list[str]]:
        """Return for each client the names of its refused units (a collective if a client sent NaN or Inf)."""
        clients = len(self.exp.clients)
        if not statistics.nonfinite.any():
            return [[] for _ in range(clients)]
        names = [unit.name for unit in self.store.units]
        refused_here = [(client, names.index(unit.name)) for client, unit in self.server.refused]
        refused = count_refused(self.world, refused_here, clients, len(names))
        return [[names[u] for c, u in refused if c == client] for client in range(clients)]

    def _reply_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Return the LoRA rank of each client's reply: its own, or that of FLoRA's stack of all clients."""
        return [sum(ranks)] * len(ranks) if self.exp.merge.row.stacking else list(ranks)

    def _take_moments(self, moments_LEX: Tensor | None) -> None:
        """Update the client's moments, if its pseudo-gradient (PG) estimator needs any."""
        if moments_LEX is not None:
            assert self.client.moments is not None
            self.client.moments.update(moments_LEX)
