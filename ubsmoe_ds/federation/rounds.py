"""The loop of rounds, written once: local steps, merge, evaluation, record, checkpoint.

A job may be asked to stop at any moment. It does so between two local steps or two batches of an evaluation, and saves
its progress. In a job that survives the death of ranks every stage can be done again up to its `World.agree`; changes
of this rank for good come after that, and talk to nobody (see recovery.py).

Shapes: C clients, L layers, E experts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ubsmoe_ds.base.errors import Preempted
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress, Record
from ubsmoe_ds.client.engine import Client, LocalProgress, LocalStats
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.federation.aggregator import Aggregator, Merged
from ubsmoe_ds.federation.evaluation import evaluate_part, view_scalars
from ubsmoe_ds.federation.metrics import RoundSeconds, add_later_seconds, seconds_scalars, training_scalars
from ubsmoe_ds.federation.outputs import Outputs
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor


@dataclass
class Federation:
    """Everything that one rank needs for the rounds; every rank of the job calls `run`.

    aggregator: merges the clients' updates.
    batches_from: number of a step -> that step of this rank's client and all that follow.
    monitor: writes and prints; None on all ranks but the first.
    progress: of the run, resumable; local: of this client's round under way.
    record: the latest round's, on every rank, in case the one that writes it dies.
    """

    exp: Experiment
    world: World
    client: Client
    aggregator: Aggregator
    evaluator: Evaluator
    batches_from: Callable[[int], Iterator[StepBatch]]
    monitor: "Monitor | None"
    checkpoints: CheckpointManager
    stop: StopRequests
    stopwatch: Stopwatch
    progress: Progress
    local: LocalProgress
    record: Record | None = field(default=None)

    def run(self) -> None:
        """Run all rounds that are left.

        Raises:
            Preempted: if the job was asked to stop; its progress has been saved.
            RanksLost: if a rank has died; after recovery (see recovery.py) call it again.
        """
        if not self.aggregator.started:
            self.aggregator.start()
        while self.progress.round <= self.exp.train.rounds:
            if self.checkpoints.is_due(self.progress):
                self._save()
            if not self.progress.merged:
                self._train()
                self._stop_if_asked()
                self._merge()
            self._record(self._evaluate())
        if self.checkpoints.is_due(self.progress):
            self._save()
        outputs = Outputs(self.exp, self.world, self.client, self.aggregator)
        outputs.write(next(self.batches_from(0)), self.progress, self.monitor, self.checkpoints.data_digest)
        self.stop.close()

    def _train(self) -> None:
        """Take local steps up to the round's number, a deadline or a request to stop, whichever comes first."""
        self.stopwatch.reset()
        train = self.exp.train
        if self.local.steps == 0:
            self.local = self.client.begin_round()
        if self.local.deadline is None:
            self.local.deadline = time.monotonic() + (train.round_deadline_s or np.inf)
        deadline, begun = self.local.deadline, self.local.steps

        def stop() -> bool:
            late = self.local.steps > 0 and time.monotonic() > deadline
            return self.world.any_of_group(late or self.stop.poll())

        batches = self.batches_from(self.progress.steps_taken)
        self.client.train(batches, self.local, train.local_steps, stop, self.aggregator.lora_rank)
        self.progress.steps_taken += self.local.steps - begun
        self.local.seconds += self.stopwatch.lap("local")

    def _stop_if_asked(self) -> None:
        """Save and leave if any rank was asked to stop (a collective)."""
        if self.world.any(self.stop.poll()):
            folder = self._save()
            self.stop.close()
            raise Preempted(f"stopped in round {self.progress.round} of {self.exp.train.rounds}, saved to {folder}")

    def _save(self) -> Path:
        folder = self.checkpoints.save(
            self.client, self.aggregator.store, self.aggregator.server, self.progress, self.local
        )
        self.world.agree()
        self.checkpoints.note_saved(self.progress)
        return folder

    def _merge(self) -> None:
        """Merge what local steps have changed into every client's model."""
        self.stopwatch.lap("wait")
        number, stats = self.progress.round, self.client.local_stats(self.local)
        merged = self.aggregator.merge(self._worked())
        of_client, metrics, seconds = self._training_scalars(stats, merged)
        self.world.agree()
        self.stopwatch.reset()
        self.aggregator.apply(merged, number)
        self.progress.note_merge(metrics, seconds, merged.statistics.usage.utilisation_LE.tolist())
        self.local = LocalProgress()
        if self.monitor is not None:
            self.monitor.refused(number, dict(zip(self._names, merged.refused, strict=True)))
            self.monitor.bad_steps(number, self._names, of_client, merged.statistics.worked_C)

    def _evaluate(self) -> dict[str, float] | None:
        """Evaluate every client's model where the round is due; round 0 is the state before training."""
        number = self.progress.round
        self.stopwatch.start()
        if number % self.exp.evaluation.every and number != self.exp.train.rounds:
            return None

        def stop() -> bool:
            return self.world.any_of_group(self.stop.poll())

        part = evaluate_part(self.exp, self.world, self.client, self.evaluator, stop)
        self._stop_if_asked()
        scalars = view_scalars(self.exp, self.world, self.evaluator, self.aggregator.server.weights, part)
        self.stopwatch.lap("evaluation")
        return scalars

    def _record(self, evaluated: dict[str, float] | None) -> None:
        """Complete the round: save adapters where due, then write its record."""
        number, every = self.progress.round, self.exp.train.save_every
        stages = self.stopwatch.seconds if self.world.group_rank == 0 else {}
        apply_C, evaluation_C = self._client_table([stages.get(stage, 0.0) for stage in ("exchange", "evaluation")]).T
        if every and number and number % every == 0:
            Outputs(self.exp, self.world, self.client, self.aggregator).save_adapters(number)
        self.world.agree()
        if evaluated is not None:
            self.progress.note_evaluation(evaluated)
        if number:
            add_later_seconds(self.progress.pending["seconds"], self._names, apply_C, evaluation_C)
        self.stopwatch.reset()
        self.record = self.progress.record()
        if self.monitor is not None:
            self.monitor.round(self.record)
        self.progress.next_round()

    def _worked(self) -> float:
        """Return the part of its round that this client did: 1, less after a deadline, 0 if it sits the round out.

        Measured in tokens: of those that its local steps would have processed had it taken them all.
        """
        local, count = self.local, self.exp.train.local_steps
        if self.client.is_out(local) or local.steps == local.bad_steps:
            return 0.0
        if local.steps == count:
            return 1.0
        used = float(local.sums[2])
        batches = self.batches_from(self.progress.steps_taken)
        left = sum(next(batches).used_tokens for _ in range(count - local.steps))
        return used / (used + left)

    def _training_scalars(
        self, stats: LocalStats, merged: Merged
    ) -> tuple[list[LocalStats], dict[str, float], dict[str, float]]:
        """Return (each client's sums, metrics, wall times) of all clients (a collective)."""
        stages = self.stopwatch.seconds
        seconds = RoundSeconds(self.local.seconds, stages["wait"], stages["exchange"], stages["merge"])
        if self.world.group_rank > 0:  # norms and steps are the client's, times are its first rank's
            stats = stats._replace(real_norm=0.0, pseudo_norm=0.0, steps=0.0, bad_steps=0.0)
            seconds = RoundSeconds(*np.zeros(len(seconds)))
        table = self._client_table([*stats, *seconds, self.aggregator.exchange.bytes_sent])
        of_client = [LocalStats(*row) for row in table[:, : len(stats)]]
        times = [RoundSeconds(*row) for row in table[:, len(stats) : -1]]
        refused = [len(units) for units in merged.refused]
        statistics = merged.statistics
        metrics = training_scalars(
            self._names, of_client, table[:, -1], statistics.usage.utilisation_LE, statistics.lora_ranks, refused
        )
        return of_client, metrics, seconds_scalars(self._names, of_client, times)

    def _client_table(self, values: Sequence[float]) -> np.ndarray:
        """Return [C, len(values)], each client's row the sum over its ranks (a collective)."""
        table = np.zeros((len(self.exp.clients), len(values)))
        table[self.world.client] = values
        return self.world.sum(table)

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]
