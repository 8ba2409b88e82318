"""Merge the clients' updates on all ranks together: statistics, exchange, server, and the result back into the model.

There is no central server: every rank owns some units (see aggregation/layout.py). `merge` can be repeated: it changes
nothing that a second call could not redo. `apply` changes this rank for good and does not communicate. In between all
ranks agree, so that a job that survives deaths completes a merge on all ranks or on none.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.controls import ControlChange, Controls
from ubsmoe_ds.aggregation.exchange import Exchange, weighted_sum
from ubsmoe_ds.aggregation.pruning import next_rank
from ubsmoe_ds.aggregation.server import Refused, Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import Diverged
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.shared_state import load_replica, replicate
from ubsmoe_ds.client.engine import Client, tail_start
from ubsmoe_ds.client.finite import all_finite
from ubsmoe_ds.client.turn import OwnPart, Turn, Turns
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.adding import HeldUnits, add_up, length, weighted_updates
from ubsmoe_ds.federation.exchanges import ExchangeFactory
from ubsmoe_ds.federation.metrics import RoundSeconds
from ubsmoe_ds.federation.statistics import (
    MergeSums,
    RoundStatistics,
    count_refused,
    gather,
    own_moments,
    sum_up,
    weigh_moments,
    without_left_out,
)
from ubsmoe_ds.mpi.world import World


class Merged(NamedTuple):
    """The outcome of a merge on this rank, before it is applied.

    difference: change of the units that this rank holds.
    statistics: the round's statistics, the same on all ranks.
    sums: seconds, bytes and moments, the same on all ranks.
    refused: for each client the names of its units that owners refused, the same on all ranks.
    replica: see `replicate`; empty unless the job survives deaths.
    controls: change of SCAFFOLD's control variates; None without.
    """

    difference: Tensor
    statistics: RoundStatistics
    sums: MergeSums
    refused: list[list[str]]
    replica: dict[str, Tensor]
    controls: ControlChange | None = None


class Aggregator:
    """Merge on this rank, together with all others.

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        client: this rank's engine.
        store: the units of its model.
        server: merges the units that this rank owns.
        exchange_for: makes the exchange for the LoRA ranks that clients send and for those that they get back.
        stopwatch: records the stages "exchange", "wait" and "merge".
        calibrated: numbers of clients, and the sums of moments that this rank has from their rows; see `moment_sums`.
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
        calibrated: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        self.exp, self.world, self.client, self.store, self.server = exp, world, client, store, server
        self.exchange_for, self.stopwatch, self.calibrated = exchange_for, stopwatch, calibrated
        self.exchange = self._exchange_of(server.lora_ranks)
        self.controls: Controls | None = None
        if exp.train.scaffold:
            assert client.drift is not None
            self.controls = Controls(store, client.drift, self.held_rank, len(exp.clients))
        self.started = False  # whether owners know what clients hold
        self.moments_shared = False  # whether all clients have the same moments, from calibration or a checkpoint
        self.replica: dict[str, Tensor] = {}

    @property
    def _adds_up(self) -> bool:
        """Return whether a group adds its clients up while it trains them."""
        return self.exp.takes_turns and self.exp.merge.is_linear

    @property
    def held_rank(self) -> int:
        """Return the LoRA rank of what this rank holds: its client's, or the full one where clients take turns."""
        return self.exp.lora.rank if self.exp.takes_turns else self.server.lora_ranks[self.world.group]

    @property
    def bytes_sent(self) -> int:
        """Return what this rank sends to others in a round; SCAFFOLD's changes of c take as much as updates."""
        return self.exchange.bytes_sent * (1 if self.controls is None else 2)

    def note_restored(self) -> None:
        """Call this after a restore: LoRA ranks may be others, the moments are shared, the optimiser has state.

        A collective.
        """
        self.exchange = self._exchange_of(self.server.lora_ranks)
        self.moments_shared = True
        self.replica = replicate(self.world, self.server, self.store.units) if self.world.survives else {}

    def start(self) -> None:
        """Tell owners what clients hold, and share the moments from calibration (a collective)."""
        held = self.exchange.collect(self.store.shared.numpy(), exact=True)
        moments_LEX = None
        if not self.moments_shared:
            parts = [(sums_LEX, self.server.weights[number]) for number, sums_LEX in self.calibrated]
            moments_LEX = weigh_moments(self.client, parts)
            if moments_LEX is not None:
                moments_LEX = torch.from_numpy(self.world.sum(moments_LEX.numpy()))
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
        self.exchange = self._exchange_of(server.lora_ranks)
        self.started = False

    def update_of(self, number: int, work: float) -> tuple[Tensor, OwnPart]:
        """Return what a client's local steps have changed, as it travels, and what of it statistics need.

        A collective over the group under ZeRO and with self-pruning.

        Args:
            number: the client's.
            work: part of the round's work that it did, 0 to 1; 0: it sits the round out.
        """
        store, rank = self.store, self.server.lora_ranks[number]
        new_rank = rank
        if not work:
            update = torch.zeros_like(store.shared)
        else:
            update = store.updates(rank)
            if self.exp.lora.prune_penalty:
                new_rank = next_rank(store, update, rank, tail_start(self.exp.lora, rank))
            if self.exp.takes_turns:
                update = store.widened(update, rank)
        return update, OwnPart(self.exchange.sent_squares(update.numpy()), new_rank, work)

    def begin_turn(self, number: int, round_number: int) -> None:
        """Load the adapter of a client that takes its turn into the model."""
        rank, full = self.exp.lora_rank(self.exp.clients[number]), self.exp.lora.rank
        factor = (self.exp.lora_alpha(full) / full) / (self.exp.lora_alpha(rank) / rank)
        self.store.begin_turn(self.server.lora_ranks[number], self.held_rank, factor, round_number)

    def end_turn(self, turns: Turns) -> None:
        """Add up what can be of a group's turns, after each of them (a collective over the group)."""
        if not self._adds_up:
            return
        turn = turns.done[-1]
        assert turn.update is not None
        turn.length = length(self.world, turn)
        if not math.isfinite(turn.length):
            turn.refused = self.held.refuse(turn.update)
        add_up(self.world, self.server, self.held, turns)

    def merge(self, turns: Turns, cohort: Sequence[int], stop: bool) -> Merged | None:
        """Merge what local steps have changed (a collective).

        Args:
            turns: what this rank's group has of the clients that it has trained in the round.
            cohort: numbers of the clients of the round, rising.
            stop: whether this rank is asked to stop.

        Returns:
            None on all ranks if one is asked to stop: then nothing is merged.

        Raises:
            Diverged: if no client has anything to merge, or the merge is not finite.
        """
        self.stopwatch.lap("exchange")
        weights, factor = self.server.weights, self.exp.merge.screen_factor
        statistics = gather(self.world, self.client, turns, cohort, weights, factor, stop)
        self.stopwatch.lap("wait")
        if statistics is None:
            return None
        self._require_updates(statistics)
        difference = self._exchange(without_left_out(turns, statistics), statistics)
        finite = all_finite(difference)
        # where sums are formed in transit, all ranks have the same
        if not finite if self.exchange.is_reducible else self.world.any(not finite):
            raise Diverged(f"merge.rule {self.exp.merge.rule}: the merge of finite updates is not finite")
        refused, controls = self._refused(statistics), self._merge_controls(turns, statistics)
        replica = replicate(self.world, self.server, self.store.units) if self.world.survives else {}
        self.stopwatch.lap("exchange")
        stages = (self.stopwatch.seconds[stage] for stage in ("wait", "exchange", "merge"))
        seconds = RoundSeconds(sum(turn.seconds for turn in turns.done), *stages)
        moments_LEX = own_moments(self.client, turns, statistics, weights)
        sums = sum_up(self.world, len(self.exp.trainers), seconds, self.bytes_sent, moments_LEX)
        return Merged(difference, statistics, sums, refused, replica, controls)

    def apply(self, merged: Merged, round_number: int) -> None:
        """Write the merge into the model, its moments and the LoRA ranks, for good; not a collective."""
        statistics = merged.statistics
        old, new = self.server.lora_ranks, list(self.server.lora_ranks)
        for client, rank in zip(statistics.cohort, statistics.lora_ranks, strict=True):
            new[client] = rank
        held = self.held_rank
        load, reply_rank = not self.exp.takes_turns, self._reply_ranks(new)[self.world.group]
        self.store.apply(merged.difference, held, reply_rank, round_number, load=load)
        self.server.lora_ranks = new
        if self.controls is not None and merged.controls is not None:
            self.controls.apply(merged.controls)
        self._take_moments(merged.sums.moments_LEX)
        if not self.exp.takes_turns:
            self._settle(statistics, old, new)
        self.replica = merged.replica
        self.stopwatch.lap("exchange")

    def _settle(self, statistics: RoundStatistics, old: Sequence[int], new: Sequence[int]) -> None:
        """Prepare the client that stays on this group for the next round."""
        me = self.world.group
        if new != old:
            self.exchange = self._exchange_of(new)
            if new[me] != old[me]:
                self.client.reset_optimizer()  # the moments of pruned LoRA ranks would move them again
        if statistics.nonfinite[me] or statistics.work_C[me] == 0:
            self.client.recover()

    def _require_updates(self, statistics: RoundStatistics) -> None:
        """Raise `Diverged` if every client sits the round out or sent NaN or Inf."""
        if ((statistics.work_C > 0) & ~statistics.nonfinite).any():
            return
        reasons = [
            f"{self.exp.clients[client].name}: {'NaN or Inf in its update' if work else 'sat the round out'}"
            for client, work in zip(statistics.cohort, statistics.work_C, strict=True)
        ]
        raise Diverged(f"no client has a finite update to merge ({', '.join(reasons)})")

    def _exchange(self, turns: Turns, statistics: RoundStatistics) -> Tensor:
        """Send updates to the owners, merge there, and return the change of this rank's units."""
        old, new = self.server.lora_ranks, list(self.server.lora_ranks)
        for client, rank in zip(statistics.cohort, statistics.lora_ranks, strict=True):
            new[client] = rank
        self.server.weigh(statistics.cohort, statistics.work_C.tolist(), statistics.nonfinite.tolist())
        if self._reply_ranks(new) != self.exchange.reply_ranks:
            self.exchange = self.exchange_for(self._sent_ranks(old), self._reply_ranks(new))
        in_transit = self.exchange.is_reducible and self.exp.merge.is_linear and not statistics.nonfinite.any()
        if self._adds_up or in_transit:
            return self._add(turns, statistics)
        received = self._collect(turns.done, statistics)
        self.stopwatch.lap("exchange")
        replies = self.server.merge(received, statistics.usage, statistics.lora_ranks)
        self.stopwatch.lap("merge")
        if self.exp.takes_turns:
            replies = replies * len(self.exp.trainers)
        return torch.from_numpy(self.exchange.distribute(replies))

    def _collect(self, turns: Sequence[Turn], statistics: RoundStatistics) -> list[np.ndarray]:
        """Return the updates of the owned units, one array a client of the round; a group sends one turn at a time."""
        received: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(statistics.cohort)
        nothing = torch.zeros_like(self.store.shared)
        for slot in range(1 + int(statistics.place_C2[:, 1].max())):
            update = turns[slot].update if slot < len(turns) else nothing
            assert update is not None  # only linear rules add turns up
            arrays = self.exchange.collect(update.numpy())
            for place, (group, of_slot) in enumerate(statistics.place_C2.tolist()):
                if of_slot == slot:
                    received[place] = arrays[group]
        return received

    def _add(self, turns: Turns, statistics: RoundStatistics) -> Tensor:
        """Do the same for linear rules at less cost: a group adds its clients up, and sums are formed on the way."""
        self.stopwatch.lap("exchange")
        usage, refused = statistics.usage, self._refused_here(turns, statistics)
        weight_CU = self.server.unit_weights(self.held.units, usage, refused)
        parts = weighted_updates(turns, statistics.cohort, self.held, weight_CU, self.server.weight)
        self.stopwatch.lap("merge")
        if self.exchange.is_reducible:
            total = self.exchange.reduce(parts)
        else:  # groups of several ranks: the owners add the groups up
            of_group = self.exchange.collect(weighted_sum(parts, torch.empty_like(self.store.shared)).numpy())
            total = np.zeros_like(of_group[0])
            for part in of_group:
                total += part
        self.stopwatch.lap("exchange")
        delta = self.server.merge_sum(total, usage, refused)
        self.stopwatch.lap("merge")
        if self.exchange.is_reducible:
            return torch.from_numpy(self.exchange.gather(delta))
        return torch.from_numpy(self.exchange.distribute([delta] * len(self.exp.trainers)))

    def _merge_controls(self, turns: Turns, statistics: RoundStatistics) -> ControlChange | None:
        """Sum what the merged clients change of SCAFFOLD's control variates (a collective); None without."""
        if self.controls is None:
            return None
        merged = statistics.merged
        own = {t.client: t.control for t in turns.done if t.control is not None and t.client in merged}
        return self.controls.merge(own, self.exchange)

    def _refused_here(self, turns: Turns, statistics: RoundStatistics) -> list[Refused]:
        """Return what groups have refused of their clients' updates (a collective if a client sent NaN or Inf)."""
        if not statistics.nonfinite.any():
            return []
        refused = [(statistics.cohort.index(turn.client), number) for turn in turns.done for number in turn.refused]
        units = self.store.units
        found = count_refused(self.world, refused, len(statistics.cohort), len(units))
        return [(client, units[number]) for client, number in found]

    def _refused(self, statistics: RoundStatistics) -> list[list[str]]:
        """Return for each client the names of its refused units (a collective if a client sent NaN or Inf)."""
        clients = len(statistics.cohort)
        if not statistics.nonfinite.any():
            return [[] for _ in range(clients)]
        names = [unit.name for unit in self.store.units]
        refused_here = [(client, names.index(unit.name)) for client, unit in self.server.refused]
        refused = count_refused(self.world, refused_here, clients, len(names))
        return [[names[u] for c, u in refused if c == client] for client in range(clients)]

    def _exchange_of(self, ranks: Sequence[int]) -> Exchange:
        """Return the exchange for clients of these LoRA ranks; FLoRA's reply to a cohort is planned in a merge."""
        sent = self._sent_ranks(ranks)
        exchange = self.exchange_for(sent, sent if self.exp.takes_turns else self._reply_ranks(ranks))
        holders = partial(exchange.layouts[self.world.group].holders, num_experts=self.exp.num_experts)
        numbers = [u for u, unit in enumerate(self.store.units) if self.world.rank in holders(unit)]
        self.held = HeldUnits(self.store.units, numbers, sent[self.world.group])
        return exchange

    def _sent_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Return the LoRA rank at which each group sends updates."""
        return [self.exp.lora.rank] * len(self.exp.trainers) if self.exp.takes_turns else list(ranks)

    def _reply_ranks(self, ranks: Sequence[int]) -> list[int]:
        """Return the LoRA rank of each group's reply: that of its updates, or of FLoRA's stack of all clients."""
        if self.exp.merge.row.stacking:
            stacked = [ranks[client] for client in self.server.cohort]
            return [sum(stacked)] * len(self.exp.trainers)
        return self._sent_ranks(ranks)

    def _take_moments(self, moments_LEX: Tensor | None) -> None:
        """Update the client's moments, if its pseudo-gradient (PG) estimator needs any."""
        if moments_LEX is not None:
            assert self.client.moments is not None
            self.client.moments.update(moments_LEX)
