"""Run the rounds of a federation. Every rank of the job runs the same loop; a round is:

    1. save a checkpoint of the rounds so far, if due            `_save`
    2. train the cohort's clients, each group one after the      `_take_turns`
       other, until a deadline or a request to stop
    3. send updates to the units' owners, merge, send back       `_merge`: `Aggregator.merge`
    4. agree with all ranks that the merge is complete           `_merge`: `World.agree`
    5. write the merge into the model                            `_merge`: `Aggregator.apply`
    6. evaluate each client's model, if due; answer prompts      `_evaluate`
    7. save adapters, if due                                     `_record`
    8. write the record: metrics.jsonl, TensorBoard, one line    `_record`

Round 0 is the state before training: steps 6 to 8 alone. A job may be asked to stop at any moment; it stops between two
local steps or two batches of an evaluation, and saves its progress. In a job that survives deaths (see recovery.py) a
stage can be repeated up to its `World.agree`; only after that does a rank change for good, and without communicating.

Shapes: C clients, L layers, E experts.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ubsmoe_ds.adapters.adapter import FOLDER
from ubsmoe_ds.base.errors import Diverged, Preempted
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress, Record
from ubsmoe_ds.client.engine import Client, LocalProgress, LocalStats
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.client.generation import Prompts
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.federation.aggregator import Aggregator, Merged
from ubsmoe_ds.federation.evaluation import evaluate_part, view_scalars
from ubsmoe_ds.federation.metrics import (
    RoundSeconds,
    complete_seconds,
    expert_scalars,
    merge_scalars,
    seconds_scalars,
    training_scalars,
)
from ubsmoe_ds.federation.outputs import Outputs
from ubsmoe_ds.federation.roster import Roster
from ubsmoe_ds.federation.samples import Sample, gather_samples, generate_samples
from ubsmoe_ds.federation.texts import Texts
from ubsmoe_ds.federation.turn import Turn, moment_sums
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor


@dataclass
class Federation:
    """One rank's part of a federation; every rank of the job calls `run`.

    client: the engine that trains this group's clients.
    aggregator: merges the clients' updates.
    texts: rows of all clients as tokens. rows: their numbers.
    roster: says who takes part in a round, and which group trains whom.
    monitor: writes and prints; None on all ranks but the first.
    prompts: evaluation prompts to answer at each evaluation; None: nothing is generated.
    progress: resumable progress of the run.
    turns: what this rank has of the turns that its group has completed in the current round.
    current: number of the client that is being trained. local: progress of its local steps.
    record: record of the latest round, kept on every rank in case the first rank dies before it is written.
    """

    exp: Experiment
    world: World
    client: Client
    aggregator: Aggregator
    evaluator: Evaluator
    prompts: Prompts | None
    texts: Texts
    rows: RowReport
    roster: Roster
    monitor: "Monitor | None"
    checkpoints: CheckpointManager
    stop: StopRequests
    hang_watch: HangWatch
    stopwatch: Stopwatch
    progress: Progress
    local: LocalProgress
    current: int
    turns: list[Turn] = field(default_factory=list)
    record: Record | None = field(default=None)

    def run(self) -> None:
        """Run all remaining rounds, then write the results.

        Raises:
            Preempted: if the job was asked to stop; its progress has been saved.
            Diverged: if there is nothing to merge, or a merge or an evaluation is not finite.
            RanksLost: if a rank has died; call `run` again after recovery (see recovery.py).
        """
        self.hang_watch.enter(f"round {self.progress.round}, start")
        if not self.aggregator.started:
            self.aggregator.start()
        while not self.progress.is_over(self.exp.train):
            if self.checkpoints.is_due(self.progress):
                self._save()
            if not self.progress.merged:
                self._take_turns()
                self._stop_if_asked()
                self._merge()
            evaluated, samples = self._evaluate()
            self._record(evaluated, samples)
            self._require_finite(evaluated)
            self.progress.next_round()
        if self.checkpoints.is_due(self.progress):
            self._save()
        self.hang_watch.enter("writing the results")
        if self.monitor is not None:
            self.monitor.out_of_patience(self.progress)
        first = next(self._batches(self.roster.clients_for(self.world.group)[0], 0))
        self._outputs.write(first, self.progress, self.monitor, self.checkpoints.data_digest)
        self.stop.close()

    def _take_turns(self) -> None:
        """Train this group's clients of the round; a deadline or a request to stop cuts steps and turns."""
        begun = time.monotonic()
        for client in self.roster.turns_left(self.progress.round, self.world.group, self.turns):
            deadline = begun + (self.exp.train.round_deadline_s or np.inf)
            if self.turns and self.world.any_of_group(time.monotonic() > deadline):
                return
            if self.exp.takes_turns and (client != self.current or self.local.steps == 0):
                self._become(client)
            self._train()
            if not self.exp.takes_turns or self.world.any_of_group(self.stop.poll()):
                return  # without turns the update is read when all have arrived; a stopped one is saved as it is
            self._end_turn()

    def _become(self, client: int) -> None:
        """Turn the engine into a client that has taken no step in the round (a collective over the group)."""
        number, server = self.progress.round, self.aggregator.server
        self.current, self.local = client, LocalProgress(deadline=self.local.deadline)
        self.client.become(self.exp.trained_by(client, self.world.group), number, self.progress.scales.get(client))
        self.aggregator.store.begin_turn(server.lora_ranks[client], self.aggregator.held_rank)

    def _end_turn(self) -> None:
        """Keep what the client's steps have changed until the merge (a collective over the group)."""
        client, local, deadline = self.current, self.local, self.local.deadline
        update, part = self.aggregator.update_of(client, self._work_done())
        self.turns.append(
            Turn(
                client=client,
                update=update,
                part=part,
                stats=self.client.local_stats(local),
                steps=local.steps,
                seconds=local.seconds,
                learning_rate=self.client.learning_rate,
                routed_LX=self.client.routed_counts(),
                sums_LEX=moment_sums(self.client),
                squares_LE2=self.client.gradient_squares(),
                scales_L=self.client.learned_scales(),
                slot=len(self.turns),
            )
        )
        self.local = LocalProgress(deadline=deadline)

    def _train(self) -> None:
        """Take the client's local steps, fewer if a deadline or a request to stop comes first."""
        self.stopwatch.reset()
        train = self.exp.train
        self.client.set_learning_rate(self.progress.round)
        if self.local.steps == 0:
            deadline, self.local = self.local.deadline, self.client.begin_round()
            self.local.deadline = deadline
        if self.local.deadline is None:
            self.local.deadline = time.monotonic() + (train.round_deadline_s or np.inf)
        deadline, begun = self.local.deadline, self.local.steps

        def stop() -> bool:
            late = self.local.steps > 0 and time.monotonic() > deadline
            stops = self.world.any_of_group(late or self.stop.poll())
            self.hang_watch.count()
            return stops

        self.hang_watch.enter(f"round {self.progress.round}, local step", counted_from=begun)
        taken = self.progress.steps_taken
        batches = self._batches(self.current, taken.get(self.current, 0))
        lora_rank = self.aggregator.server.lora_ranks[self.current]
        self.client.train(batches, self.local, self._local_steps, stop, lora_rank)
        taken[self.current] = taken.get(self.current, 0) + self.local.steps - begun
        self.local.seconds += self.stopwatch.lap("local")

    def _stop_if_asked(self) -> None:
        """Save a checkpoint and raise `Preempted` if any rank was asked to stop (a collective)."""
        self.hang_watch.enter(f"round {self.progress.round}, end of its part")
        if self.world.any(self.stop.poll()):
            folder = self._save()
            self.stop.close()
            raise Preempted(f"stopped in round {self.progress.round} of {self.exp.train.rounds}, saved to {folder}")

    def _save(self) -> Path:
        """Save a checkpoint; return its folder (a collective)."""
        self.hang_watch.enter(f"round {self.progress.round}, checkpoint")
        folder = self.checkpoints.save(
            self.client, self.aggregator.store, self.aggregator.server, self.progress, self.local
        )
        self.world.agree()
        self.checkpoints.note_saved(self.progress)
        return folder

    def _merge(self) -> None:
        """Merge the changes of all clients' local steps into every client's model (a collective)."""
        self.stopwatch.lap("wait")
        number, cohort = self.progress.round, self.roster.cohort(self.progress.round)
        self.hang_watch.enter(f"round {number}, merge")
        if not self.exp.takes_turns:
            self.turns = []
            self._end_turn()
        try:
            merged = self.aggregator.merge(self.turns, cohort)
        except Diverged as error:
            raise Diverged(f"round {number}: {error}") from error
        stats_C, metrics, seconds = self._training_scalars(merged)
        self.world.agree()  # up to here the merge can be repeated; from here on this rank changes for good
        self.stopwatch.reset()
        self.aggregator.apply(merged, number)
        self.progress.note_merge(metrics, seconds, merged.statistics.usage.utilisation_LE.tolist())
        self.local, self.turns = LocalProgress(), []
        if self.monitor is not None:
            names = [self.exp.clients[client].name for client in merged.statistics.cohort]
            self.monitor.refused(number, dict(zip(names, merged.refused, strict=True)))
            self.monitor.bad_steps(number, names, stats_C, merged.statistics.work_C.tolist())
            self.monitor.left_out(number, names, merged.statistics)
            self.monitor.outweighed(number, names, metrics)

    def _evaluate(self) -> tuple[dict[str, float] | None, list[Sample]]:
        """Evaluate every client's model; return (its scalars, or None if this round is not due; answers to prompts).

        A collective.
        """
        number = self.progress.round
        self.stopwatch.start()
        if number % self.exp.evaluation.every and number != self.exp.train.rounds:
            return None, []

        def stop() -> bool:
            stops = self.world.any_of_group(self.stop.poll())
            self.hang_watch.count()
            return stops

        self.hang_watch.enter(f"round {number}, evaluation batch", counted_from=0)
        part = evaluate_part(self.exp, self.world, self.client, self.evaluator, stop)
        answers = generate_samples(self.exp, self.world, self.client, self.prompts, stop)
        self._stop_if_asked()
        scalars = view_scalars(self.exp, self.world, self.evaluator, self.aggregator.server.weights, part)
        samples = gather_samples(self.exp, self.world, self.prompts, answers)
        self.stopwatch.lap("evaluation")
        return scalars, samples

    def _record(self, evaluated: dict[str, float] | None, samples: list[Sample]) -> None:
        """Complete the round: save adapters if due, then write its record (a collective)."""
        number, every = self.progress.round, self.exp.train.save_every
        self.hang_watch.enter(f"round {number}, record")
        stages = self.stopwatch.seconds if self.world.group_rank == 0 else {}
        apply_G, evaluation_G = self._group_table([stages.get(stage, 0.0) for stage in ("exchange", "evaluation")]).T
        if every and number and number % every == 0:
            self._outputs.save_adapters(self.progress, f"{FOLDER}-round-{number}", number)
        best = self.exp.train.keeps_best and evaluated is not None and self.progress.improves(evaluated)
        if best:
            self._outputs.save_best(self.progress)
        self.world.agree()
        if evaluated is not None:
            self.progress.note_evaluation(evaluated)
            self._outputs.prune_best(self.progress)
        if number:
            groups = [trainer.name for trainer in self.exp.trainers]
            complete_seconds(self.progress.pending["seconds"], groups, apply_G, evaluation_G)
        self.stopwatch.reset()
        self.record = self.progress.record()
        if self.monitor is not None:
            self.monitor.samples(number, samples)
            self.monitor.round(self.record)

    def _require_finite(self, evaluated: dict[str, float] | None) -> None:
        """Raise `Diverged` if this round's evaluation is not finite; note that it is otherwise."""
        if evaluated is None:
            return
        bad = [name for name in self._names if not math.isfinite(evaluated[f"eval_loss/{name}"])]
        if bad:
            raise Diverged(f"round {self.progress.round}: the evaluation loss of {', '.join(bad)} is not finite")
        self.progress.sound_round = self.progress.round

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
        batches = self._batches(self.current, self.progress.steps_taken[self.current])
        left = sum(next(batches).used_tokens for _ in range(count - local.steps))
        return used / (used + left)

    def _training_scalars(self, merged: Merged) -> tuple[list[LocalStats], dict[str, float], dict[str, float]]:
        """Return (sums of each client's local steps, metrics, wall times), of the clients of the round (a collective)."""
        statistics, stages = merged.statistics, self.stopwatch.seconds
        table = np.zeros((len(statistics.cohort), len(LocalStats._fields) + len(RoundSeconds._fields) + 2))
        for turn in self.turns:
            stats, rate = turn.stats, turn.learning_rate
            seconds = RoundSeconds(turn.seconds, stages["wait"], stages["exchange"], stages["merge"])
            if self.world.group_rank > 0:  # norm and steps are the client's, times its first rank's: count them once
                stats = stats._replace(gradient_norm=0.0, steps=0.0, bad_steps=0.0)
                seconds, rate = RoundSeconds(*np.zeros(len(seconds))), 0.0
            sent = self.aggregator.exchange.bytes_sent / len(self.turns)  # a group's turns travel together
            table[statistics.cohort.index(turn.client)] = [*stats, *seconds, sent, rate]
        table = self.world.sum(table)
        stats_C = [LocalStats(*row) for row in table[:, : len(LocalStats._fields)]]
        seconds_C = [RoundSeconds(*row) for row in table[:, len(LocalStats._fields) : -2]]
        names = [self.exp.clients[client].name for client in statistics.cohort]
        refused = [len(units) for units in merged.refused]
        metrics = training_scalars(
            names, stats_C, table[:, -2], statistics.usage.utilisation_LE, statistics.lora_ranks, refused
        )
        weights, norms, rates = (
            part.tolist() for part in (self.aggregator.server.weight_C, statistics.norm_C, table[:, -1])
        )
        metrics |= expert_scalars(names, statistics.routed_CLE, statistics.squares_CLE2)
        metrics |= merge_scalars(names, stats_C, self.rows.kept, weights, norms, rates)
        return stats_C, metrics, seconds_scalars(names, stats_C, seconds_C)

    def _batches(self, client: int, first: int) -> Iterator[StepBatch]:
        """Return this rank's batches of a client from the step of this number on."""
        return self.texts.steps(client, self.world.group, self.world.group_rank, first)

    def _group_table(self, values: Sequence[float]) -> np.ndarray:
        """Sum `values` over each group's ranks; return [groups, len(values)] (a collective)."""
        table = np.zeros((len(self.exp.trainers), len(values)))
        table[self.world.group] = values
        return self.world.sum(table)

    @property
    def _outputs(self) -> Outputs:
        """Return what writes the run's results."""
        return Outputs(self.exp, self.world, self.client, self.aggregator, self.rows)

    @property
    def _local_steps(self) -> int:
        """Return the local steps of this rank's client in a round."""
        config = self.exp.clients[self.current]
        return self.exp.local_steps(config, self.rows.kept[config.name])

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]
