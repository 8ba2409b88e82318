"""The loop, written once: local steps, exchange, merge, DMR's server step, back, evaluation, checkpoint.

A job may be asked to stop at any moment; it does so between two local steps or two batches of an evaluation, and saves
where it stands. Where it survives the death of ranks, every stage can be done again up to its `World.agree`; what
changes this rank for good comes after that, and talks to nobody.
Shapes: C clients, L layers, E experts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation.exchange import Exchange
from ubsmoe_ds.aggregation.server import Server, Usage
from ubsmoe_ds.aggregation.units import UnitStore, next_rank
from ubsmoe_ds.base.errors import Preempted
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.state import load_replica, replicate
from ubsmoe_ds.client.engine import Client, LocalProgress, LocalStats
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.federation.evaluation import own_part, scalars_of_views
from ubsmoe_ds.federation.metrics import RoundSeconds, add_later_seconds, seconds_scalars, training_scalars
from ubsmoe_ds.federation.outputs import Outputs
from ubsmoe_ds.federation.statistics import RoundStatistics, count_refused, gather, sum_moments
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor


ExchangeFactory = Callable[[Sequence[int], Sequence[int]], Exchange]


@dataclass
class Federation:
    """Everything one rank needs for the rounds; `run` is the loop. `monitor` is None on all ranks but the first.

    plan: (LoRA ranks sent, LoRA ranks received) of the clients -> the exchange.
    batches_from: number of a step -> that step and all that follow.
    resumed: whether all this has been taken out of a checkpoint.
    """

    exp: Experiment
    world: World
    client: Client
    store: UnitStore
    plan: ExchangeFactory
    server: Server
    evaluator: Evaluator
    batches_from: Callable[[int], Iterator[StepBatch]]
    monitor: "Monitor | None"
    checkpoints: CheckpointManager
    stop: StopRequests
    progress: Progress = field(default_factory=Progress)
    local: LocalProgress = field(default_factory=LocalProgress)
    resumed: bool = False
    started: bool = False  # whether owners know what clients hold
    unsaved: bool = False  # whether a checkpoint is due
    latest: "tuple[int, dict[str, float], dict[str, float], Tensor | None] | None" = None  # what was recorded last
    replica: dict[str, Tensor] = field(default_factory=dict)  # see `state.replicate`
    taking: float = 0.0  # seconds that the latest merge took on its way into the model

    def run(self) -> None:
        """All rounds that are left; every rank of the job calls it.

        Raises:
            Preempted: if the job was asked to stop; where it stands has been saved.
            RanksLost: if a rank has died; after `survive` it may be called again.
        """
        if not self.started:
            self._start()
        while self.progress.round <= self.exp.train.rounds:
            if self.unsaved:
                self._save()
            if not self.progress.merged:
                self._local_steps()
                done = time.perf_counter()  # from here on this client may wait for others
                self._end_if_asked()
                self._merge(done)
            self._evaluate_and_record()
        if self.unsaved:
            self._save()
        outcome = Outputs(self.exp, self.world, self.client, self.store, self.server.ranks)
        outcome.write(next(self.batches_from(0)), self.progress, self.monitor, self.checkpoints.data_digest)
        self.stop.close()

    def _start(self) -> None:
        """Owners learn what clients hold; the moments of a first look at the data are shared."""
        self.exchange = self.plan(self.server.ranks, self._reply_ranks(self.server.ranks))
        held = self.exchange.collect(self.store.shared.numpy(), exact=True)
        moments_LEX = None
        if not self.resumed:
            moments_LEX = sum_moments(self.world, self.client, self.server.weights[self.world.client])
        self.world.agree()
        self.server.start(held)
        self._take_moments(moments_LEX)
        self.started = self.resumed = True

    def survive(
        self, world: World, exp: Experiment, server: Server, plan: ExchangeFactory, monitor: "Monitor | None"
    ) -> None:
        """Go on among the clients that are left; see recovery.py.

        Args:
            world, exp, server, plan, monitor: as they are without the clients that are lost.
        """
        self.world, self.exp, self.server, self.plan, self.monitor = world, exp, server, plan, monitor
        self.checkpoints = self.checkpoints.among(exp, world)
        self.stop.listen_on(world.comm)
        load_replica(server, self.store.units, self.replica)
        self.started = False

    def _take_moments(self, moments_LEX: Tensor | None) -> None:
        if moments_LEX is not None:
            assert self.client.moments is not None
            self.client.moments.update(moments_LEX)

    def _local_steps(self) -> None:
        """Up to the round's number of steps, a deadline or a request to stop, whichever is first."""
        train, start = self.exp.train, time.perf_counter()
        if self.local.steps == 0:
            self.local = self.client.begin_round()
        if self.local.deadline is None:
            self.local.deadline = time.monotonic() + (train.round_deadline_s or np.inf)
        deadline = self.local.deadline
        begun = self.local.steps

        def stop() -> bool:
            late = self.local.steps > 0 and time.monotonic() > deadline
            return self.world.any_of_client(late or self.stop.poll())

        self.client.train(self.batches_from(self.progress.steps_taken), self.local, train.local_steps, stop)
        self.progress.steps_taken += self.local.steps - begun
        self.local.seconds += time.perf_counter() - start

    def _end_if_asked(self) -> None:
        """Save and leave, if any rank was asked to stop (a collective)."""
        if self.world.any(self.stop.poll()):
            where = self._save()
            self.stop.close()
            raise Preempted(f"stopped in round {self.progress.round} of {self.exp.train.rounds}, saved to {where}")

    def _save(self) -> Path:
        where = self.checkpoints.save(self.client, self.store, self.server, self.progress, self.local)
        self.world.agree()
        self.unsaved = False
        return where

    def _reply_ranks(self, ranks: Sequence[int]) -> list[int]:
        """LoRA rank of what each client gets back: its own, or FLoRA's stack of all."""
        return [sum(ranks)] * len(ranks) if self.exp.merge.rule == "flora" else list(ranks)

    def _merge(self, done: float) -> None:
        """What the local steps have changed, through the exchange, into every client.

        Args:
            done: when the round's local steps of this client ended.
        """
        number, begun = self.progress.round, time.perf_counter()
        stats, worked = self.client.local_stats(self.local), self._worked()
        update = self.store.updates() if worked else torch.zeros_like(self.store.shared)
        self.client.rank = self.store.rank
        if self.exp.lora.prune_penalty and worked:
            self.client.rank = next_rank(self.store, update, self.client.tail_start)
        finite = bool(torch.isfinite(update).all())
        pseudo_weight = self.exp.merge.pseudo_weight
        packed = time.perf_counter()
        statistics = gather(self.world, self.client, self.server.weights, finite, worked, pseudo_weight)
        met = time.perf_counter()
        back, merging = self._exchange(update, statistics)
        refused = self._refused(statistics)
        exchange = packed - begun + time.perf_counter() - met - merging
        seconds = RoundSeconds(self.local.seconds, begun - done + met - packed, exchange, merging)
        of_client, metrics, times = self._scalars(stats, seconds, statistics, refused)
        replica = replicate(self.world, self.server, self.store.units) if self.world.survives else {}
        self.world.agree()
        self.replica = replica
        start = time.perf_counter()
        self._take(number, back, statistics)
        self.taking = time.perf_counter() - start
        self.progress.note(metrics, times, statistics.usage.utilisation_LE.tolist())
        self.local = LocalProgress()
        if self.monitor is not None:
            self.monitor.refused(
                number, {name: units for name, units in zip(self._names, refused, strict=True) if units}
            )
            self.monitor.bad_steps(number, self._names, of_client, statistics.worked_C)

    def _take(self, number: int, back: Tensor, statistics: RoundStatistics) -> None:
        """The merge for good: into the model, its moments and the ranks."""
        mine, old, self.server.ranks = self.world.client, self.server.ranks, list(statistics.ranks)
        self.store.apply(back, self._reply_ranks(statistics.ranks)[mine], number)
        self._take_moments(statistics.moments_LEX)
        if statistics.ranks != old:
            self.exchange = self.plan(statistics.ranks, self._reply_ranks(statistics.ranks))
            if self.client.rank != old[mine]:
                self.client.reset_optimizer()  # moments of the ranks that are gone would move them again
        if statistics.astray_C[mine] or statistics.worked_C[mine] == 0:
            self.client.recover()

    def _worked(self) -> float:
        """Which part of its round this client did: 1, less after a deadline, 0 if it sits the round out.

        In tokens: of those that its local steps would have processed had it taken them all.
        """
        local, count = self.local, self.exp.train.local_steps
        if self.client.is_out(local) or local.steps == local.bad_steps:
            return 0.0
        if local.steps == count:
            return 1.0
        own = float(local.sums[2])
        batches = self.batches_from(self.progress.steps_taken)
        left = sum(next(batches).used_tokens for _ in range(count - local.steps))
        return own / (own + left)

    def _exchange(self, update: Tensor, statistics: RoundStatistics) -> tuple[Tensor, float]:
        """To the owners and back; (the difference that this rank gets, seconds spent merging)."""
        old, new = self.server.ranks, statistics.ranks
        self.server.weigh(statistics.worked_C, statistics.astray_C.tolist())
        if new != old:
            self.exchange = self.plan(old, self._reply_ranks(new))
        if self.exchange.is_reducible and self.server.is_linear and not statistics.astray_C.any():
            return self._reduce(update, statistics.usage)
        received = self.exchange.collect(update.numpy())
        start = time.perf_counter()
        replies = self.server.merge(received, statistics.usage, new)
        merging = time.perf_counter() - start
        return torch.from_numpy(self.exchange.distribute(replies)), merging

    def _reduce(self, update: Tensor, usage: Usage) -> tuple[Tensor, float]:
        """The cheaper way of linear rules: sums are formed on the way to the owners; (difference, seconds merging)."""
        start = time.perf_counter()
        sizes = torch.tensor([unit.size(self.store.rank) for unit in self.store.units])
        share_U = self.server.shares(self.store.units, usage, self.world.client)
        alike = bool((share_U == share_U[0]).all())
        share = float(share_U[0]) if alike else share_U.repeat_interleave(sizes).numpy()
        before = time.perf_counter()
        total = self.exchange.reduce(update.numpy(), share)
        moved = time.perf_counter()
        delta = self.server.merge_sum(total, usage)
        done = time.perf_counter()
        return torch.from_numpy(self.exchange.gather(delta)), before - start + done - moved

    def _refused(self, statistics: RoundStatistics) -> list[list[str]]:
        """Names of the units of each client that owners refused (a collective if some client went astray)."""
        if not statistics.astray_C.any():
            return [[] for _ in self._names]
        units = [unit.name for unit in self.store.units]
        own = [(client, units.index(unit.name)) for client, unit in self.server.refused]
        refused = count_refused(self.world, own, len(self._names), len(units))
        return [[units[u] for c, u in refused if c == client] for client in range(len(self._names))]

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]

    def _scalars(
        self,
        stats: LocalStats,
        seconds: RoundSeconds,
        statistics: RoundStatistics,
        refused: Sequence[Sequence[str]],
    ) -> tuple[list[LocalStats], dict[str, float], dict[str, float]]:
        """(each client's sums, metrics, wall times) of all clients (a collective)."""
        if self.world.client_rank > 0:  # norms and steps are the client's, times are its first rank's
            stats = stats._replace(real_norm=0.0, pseudo_norm=0.0, steps=0.0, bad_steps=0.0)
            seconds = RoundSeconds(*np.zeros(len(seconds)))
        table = self._client_table([*stats, *seconds, self.exchange.bytes_sent])
        of_client = [LocalStats(*row) for row in table[:, : len(stats)]]
        times = [RoundSeconds(*row) for row in table[:, len(stats) : -1]]
        utilisation_LE, counts = statistics.usage.utilisation_LE, [len(units) for units in refused]
        metrics = training_scalars(self._names, of_client, table[:, -1], utilisation_LE, statistics.ranks, counts)
        return of_client, metrics, seconds_scalars(self._names, of_client, times)

    def _client_table(self, own: Sequence[float]) -> np.ndarray:
        """[C, len(own)], each client's row the sum over its ranks."""
        table = np.zeros((len(self.exp.clients), len(own)))
        table[self.world.client] = own
        return self.world.sum(table)

    def _evaluate_and_record(self) -> None:
        """The second half of a round; of number 0, the state before training, the only one."""
        number, train, every = self.progress.round, self.exp.train, self.exp.checkpoint.every
        start = time.perf_counter()
        evaluated = None
        if number % self.exp.evaluation.every == 0 or number == train.rounds:
            evaluated = self._evaluate()
        evaluation = time.perf_counter() - start
        spent = [self.taking, evaluation] if self.world.client_rank == 0 else [0.0, 0.0]
        taking_C, evaluation_C = self._client_table(spent).T
        if train.save_every and number and number % train.save_every == 0:
            Outputs(self.exp, self.world, self.client, self.store, self.server.ranks).save_adapters(number)
        self.world.agree()
        if evaluated is not None:
            self.progress.evaluated(evaluated)
        if number:
            add_later_seconds(self.progress.pending["seconds"], self._names, taking_C, evaluation_C)
        self.taking = 0.0
        self.latest = (number, *self.progress.recorded())
        if self.monitor is not None:
            self.monitor.round(*self.latest)
        self.progress.next_round()
        self.unsaved = bool(every) and number > 0 and (number % every == 0 or number == train.rounds)

    def _evaluate(self) -> dict[str, float]:
        """Loss, accuracy and utilisation of every client's model."""

        def stop() -> bool:
            return self.world.any_of_client(self.stop.poll())

        own = own_part(self.exp, self.world, self.client, self.evaluator, stop)
        self._end_if_asked()
        return scalars_of_views(self.exp, self.world, self.evaluator, self.server.weights, own)
