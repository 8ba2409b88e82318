"""Train the clients of a round on one group: its own client, or several that take turns.

Shapes: L layers.
"""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ubsmoe_ds.aggregation.controls import ControlChange
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.held import held_parts, read_held
from ubsmoe_ds.checkpoint.kept_states import KeptStates
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.state import optimizer_pieces, restore_optimizer
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.turn import Turn, Turns, moment_sums
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.roster import Roster
from ubsmoe_ds.federation.statistics import RoundStatistics
from ubsmoe_ds.federation.texts import Texts
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.finished import FinishedTurns
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
    cut: whether the current turn has ended because enough others have finished.
    begin: goes on with a turn that a checkpoint holds, see `Resumed`.
    finished: counts the turns that all groups have finished; None: every client of a round is waited for.
    kept: what clients keep between their rounds where they take turns; None: nothing. kept_controls: SCAFFOLD's c_i.
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
    turns: Turns = field(default_factory=Turns)
    cut: bool = False
    begin: Callable[[int], LocalProgress | None] = lambda number: None
    finished: FinishedTurns | None = field(default=None)
    kept: KeptStates | None = field(default=None)
    kept_controls: KeptStates | None = field(default=None)

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

    @property
    def kept_states(self) -> list[KeptStates]:
        """Return all that clients keep."""
        return [kept for kept in (self.kept, self.kept_controls) if kept is not None]

    def take_turns(self) -> None:
        """Train this group's clients of the round; a deadline or a request to stop cuts steps and turns."""
        number, group = self.progress.round, self.world.group
        if self.local.deadline is None:
            self.local.deadline = time.monotonic() + (self.exp.train.round_deadline_s or np.inf)
        deadline = self.local.deadline
        if not self.exp.takes_turns:
            self._train()
            return  # the update is read when all have arrived: a stopped client is saved as it is
        for kept in self.kept_states:
            kept.hand_over(self.roster.schedule(number))
        for client in self.roster.turns_left(number, group, self.turns.done):
            if self.turns.done and self.world.any_of_group(time.monotonic() > deadline):
                return
            if self.world.any_of_group(self._enough_have_finished()):
                return
            if client != self.current or self.local.steps == 0:
                self.become(client)
                self._restore_optimizer(client)
                self.local = self.begin(client) or LocalProgress()
                self.local.deadline = deadline
            self._train()
            if self.world.any_of_group(self.stop.poll()):
                return
            if self.cut:
                self._forget_turn()
                return
            self.end_turn()
            if self.finished is not None:
                self.finished.tell(number)
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
        """Turn the engine into a client that takes turns, as it is in the round, but for its optimiser."""
        number, scales_L = self.progress.round, self.progress.scales.get(client)
        self.client.become(self.exp.trained_by(client, self.world.group), number, scales_L)
        self.aggregator.begin_turn(client, number)
        self.current = client

    def _restore_optimizer(self, client: int) -> None:
        """Give the optimiser what a client kept, or that of a new engine; without it `Client.begin_round` resets it."""
        if self.kept is None:
            return
        self.client.reset_optimizer()
        state = self.kept.reader(client)
        if state is not None:
            restore_optimizer(self.client, state)

    def end_turn(self) -> None:
        """Keep what the client's steps have changed until the merge (a collective over the group)."""
        client, local = self.current, self.local
        update, part = self.aggregator.update_of(client, self._work_done())
        routed_LX, dropped = self.client.counts.read()
        self.turns.done.append(
            Turn(
                client=client,
                update=update,
                part=part,
                stats=self.client.local_stats(local, routed_LX, dropped),
                seconds=local.seconds,
                learning_rate=self.client.learning_rate,
                steps_taken=self.progress.steps_taken.get(client, 0),
                routed_LX=routed_LX,
                sums_LEX=moment_sums(self.client),
                squares_LE2=self.client.gradient_squares(),
                scales_L=self.client.learned_scales() if self.exp.takes_turns else None,
                slot=len(self.turns.done),
                control=self._control_change(),
            )
        )
        self.aggregator.end_turn(self.turns)
        if self.kept is not None:
            self.kept.keep(client, self.progress.round, optimizer_pieces(self.client, self.world.group_rank))

    def _enough_have_finished(self) -> bool:
        """Return whether the first rank of this group knows that the round can do without further turns."""
        if self.finished is None or self.world.group_rank > 0:
            return False
        number = self.progress.round
        return self.finished.count(number) >= self.roster.enough(number)

    def _forget_turn(self) -> None:
        """Forget a turn that the round does without; the client begins its next one where it began this one."""
        self.progress.steps_taken[self.current] -= self.local.steps
        self.local, self.cut = LocalProgress(), False

    def _own_control(self, client: int) -> Tensor | None:
        """Return SCAFFOLD's c_i of a client; None: it is zero."""
        assert self.kept_controls is not None
        state, name = self.kept_controls.reader(client), self.exp.clients[client].name
        if state is None:
            assert client not in self.kept_controls.places, f"the control variate of {name} is gone"
            return None
        return read_held("control", name, state, self.aggregator.store, self.aggregator.held_rank)

    def _control_change(self) -> Tensor | None:
        """Return what the current client's steps change of its c_i (a collective under ZeRO); None without SCAFFOLD."""
        controls, local = self.aggregator.controls, self.local
        if controls is None:
            return None
        return controls.change_of(self._own_control(self.current), local.steps - local.bad_steps)

    def _keep_controls(self, kept: KeptStates, statistics: RoundStatistics, changes: Mapping[int, Tensor]) -> None:
        """Renew c_i of the clients that are merged (a collective over the group)."""
        number, store, rank = self.progress.round, self.aggregator.store, self.aggregator.held_rank
        for client, change in changes.items():
            own, name = self._own_control(client), self.exp.clients[client].name
            control = change if own is None else own + change
            kept.keep(client, number, held_parts("control", name, control, store, rank, self.world.group_rank))
        self.world.any_of_group(False)  # all ranks have read the old values before `settle` removes their files
        groups = dict(zip(statistics.cohort, statistics.place_C2[:, 0].tolist(), strict=True))
        kept.settle(number, [(client, groups[client]) for client in statistics.merged], ())

    def next_round(
        self, statistics: RoundStatistics, pruned: Collection[int] = (), controls: ControlChange | None = None
    ) -> None:
        """Forget the round that has been merged.

        Args:
            statistics: of the round. A client that sat it out, or sent NaN or Inf, keeps nothing.
            pruned: clients whose LoRA rank has fallen: kept moments would move the pruned ranks again.
            controls: what the round changes of SCAFFOLD's control variates; None without.
        """
        if self.kept_controls is not None and controls is not None:
            self._keep_controls(self.kept_controls, statistics, controls.own)
        self.local, self.turns = LocalProgress(), Turns()
        if self.finished is not None:
            self.finished.settle(self.progress.round, len(statistics.cohort))
        if self.kept is not None:
            out_C = statistics.nonfinite | (statistics.work_C == 0)
            dropped = {client for client, out in zip(statistics.cohort, out_C, strict=True) if out} | set(pruned)
            groups = statistics.place_C2[:, 0].tolist()
            self.kept.settle(self.progress.round, zip(statistics.cohort, groups, strict=True), dropped)

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
            self.client.begin_round()
            if self.aggregator.controls is not None:
                self.aggregator.controls.begin_round(self._own_control(self.current))
        begun = self.local.steps

        def stop() -> bool:
            late = self.local.steps > 0 and time.monotonic() > deadline
            stops = self.world.any_of_group(late or self.stop.poll())
            if self.finished is not None and not stops:
                self.cut = self.world.any_of_group(self._enough_have_finished())
            self.hang_watch.count()
            return stops or self.cut

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
