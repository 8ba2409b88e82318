"""Train the clients of a round on one group: its own client, or several that take turns.

Shapes: L layers.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.turn import Turn, moment_sums
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.roster import Roster
from ubsmoe_ds.federation.texts import Texts
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World


@dataclass
class GroupTraining:
    """The clients that one group trains; every rank of the group has the same.

    aggregator: holds the engine that trains them, and what they start from.
    texts: rows of all clients as tokens. rows: their numbers.
    roster: says which clients the group trains in a round.
    progress: resumable progress of the run.
    current: number of the client that the engine trains. own: where each client has its own group, the client's number
        at the start of the job, which its rows go by.
    local: progress of its local steps. turns: what this rank has of the clients trained in the current round.
    begin: goes on with a turn that a checkpoint holds, see `Resumed`.
    """

    aggregator: Aggregator
    texts: Texts
    rows: RowReport
    roster: Roster
    progress: Progress
    stop: StopRequests
    hang_watch: HangWatch
    current: int
    own: int
    local: LocalProgress = field(default_factory=LocalProgress)
    turns: list[Turn] = field(default_factory=list)
    begin: Callable[[int], LocalProgress | None] = lambda number: None

    @property
    def exp(self) -> Experiment:
        """Return the experiment, without lost clients."""
        return self.aggregator.exp

    @property
    def world(self) -> World:
        """Return this rank's place in the job."""
        return self.aggregator.world

    @property
    def client(self) -> Client:
        """Return this rank's engine."""
        return self.aggregator.client

    @property
    def stopwatch(self) -> Stopwatch:
        """Return the watch that the stages of a round share."""
        return self.aggregator.stopwatch

    def take_turns(self) -> None:
        """Train this group's clients of the round; a deadline or a request to stop cuts steps and turns."""
        number, group = self.progress.round, self.world.group
        if self.local.deadline is None:
            self.local.deadline = time.monotonic() + (self.exp.train.round_deadline_s or np.inf)
        deadline = self.local.deadline
        if not self.exp.takes_turns:
            self._train()
            return  # the update is read when all have arrived: a stopped client is saved as it is
        for client in self.roster.turns_left(number, group, self.turns):
            if self.turns and self.world.any_of_group(time.monotonic() > deadline):
                return
            if client != self.current or self.local.steps == 0:
                self.become(client)
                self.local = self.begin(client) or LocalProgress()
                self.local.deadline = deadline
            self._train()
            if self.world.any_of_group(self.stop.poll()):
                return
            self.end_turn()
            self.local = LocalProgress(deadline=deadline)

    def calibrate(self, count: int) -> list[tuple[int, Tensor]]:
        """Sum moments over the rows of the first steps of this group's clients of the first round, without training.

        Args:
            count: number of steps.

        Returns:
            (number of a client, the result of `moment_sums`) for each.
        """
        clients, sums = [self.current], []
        if self.exp.takes_turns:
            clients = self.roster.schedule(1)[self.world.group]
        for client in clients:
            if self.exp.takes_turns:
                self.become(client)
            self.client.calibrate(self.batches(client, 0), count)
            sums_LEX = moment_sums(self.client)
            assert sums_LEX is not None
            sums.append((client, sums_LEX))
        return sums

    def become(self, client: int) -> None:
        """Turn the engine into a client that takes turns, as it is before its steps in the round."""
        number, scales_L = self.progress.round, self.progress.scales.get(client)
        self.client.become(self.exp.trained_by(client, self.world.group), number, scales_L)
        self.aggregator.begin_turn(client, number)
        self.current = client

    def end_turn(self) -> None:
        """Keep what the client's steps have changed until the merge (a collective over the group)."""
        client, local = self.current, self.local
        update, part = self.aggregator.update_of(client, self._work_done())
        controls = self.aggregator.controls
        self.turns.append(
            Turn(
                client=client,
                update=update,
                part=part,
                stats=self.client.local_stats(local),
                seconds=local.seconds,
                learning_rate=self.client.learning_rate,
                routed_LX=self.client.routed_counts(),
                sums_LEX=moment_sums(self.client),
                squares_LE2=self.client.gradient_squares(),
                scales_L=self.client.learned_scales() if self.exp.takes_turns else None,
                slot=len(self.turns),
                control=None if controls is None else controls.change_of(client, local.steps - local.bad_steps),
            )
        )

    def next_round(self) -> None:
        """Forget the round that has been merged."""
        self.local, self.turns = LocalProgress(), []

    def batches(self, client: int, first: int) -> Iterator[StepBatch]:
        """Return this rank's batches of a client from the step of this number on."""
        if not self.exp.takes_turns:
            return self.texts.steps(self.own, self.own, self.world.group_rank, first)
        return self.texts.steps(client, self.world.group, self.world.group_rank, first)

    def _train(self) -> None:
        """Take the client's local steps, fewer if a deadline or a request to stop comes first."""
        self.stopwatch.reset()
        self.client.set_learning_rate(self.progress.round)
        deadline = self.local.deadline
        assert deadline is not None
        if self.local.steps == 0:
            self.local = self.client.begin_round()
            self.local.deadline = deadline
            if self.aggregator.controls is not None:
                self.aggregator.controls.begin_round(self.current)
        begun = self.local.steps

        def stop() -> bool:
            late = self.local.steps > 0 and time.monotonic() > deadline
            stops = self.world.any_of_group(late or self.stop.poll())
            self.hang_watch.count()
            return stops

        self.hang_watch.enter(f"round {self.progress.round}, local step", counted_from=begun)
        taken = self.progress.steps_taken
        batches = self.batches(self.current, taken.get(self.current, 0))
        lora_rank = self.aggregator.server.lora_ranks[self.current]
        self.client.train(batches, self.local, self._local_steps, stop, lora_rank)
        taken[self.current] = taken.get(self.current, 0) + self.local.steps - begun
        self.local.seconds += self.stopwatch.lap("local")

    def _work_done(self) -> float:
        """Return the part of the round's work that this client did: 1, less after a deadline, 0 if it sits it out.

        Work is measured in tokens: those processed, over those that all local steps of the round would process.
        """
        local, count = self.local, self._local_steps
        if self.client.is_out(local) or local.steps == local.bad_steps:
            return 0.0
        if local.steps == count:
            return 1.0
        used = float(local.sums[2])
        batches = self.batches(self.current, self.progress.steps_taken[self.current])
        left = sum(next(batches).used_tokens for _ in range(count - local.steps))
        return used / (used + left)

    @property
    def _local_steps(self) -> int:
        """Return the local steps of the current client in a round."""
        config = self.exp.clients[self.current]
        return self.exp.local_steps(config, self.rows.kept[config.name])
