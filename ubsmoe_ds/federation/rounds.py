"""Run the rounds of a federation. Every rank of the job runs the same loop; a round is:

    1. save a checkpoint of the rounds so far, if due            `_save`
    2. train the round's clients, each group one after the       `GroupTraining.take_turns`
       other, until a deadline or a request to stop
    3. send updates to the units' owners, merge, send back,      `_merge`: `Aggregator.merge`
       unless a rank was asked to stop
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import torch

from ubsmoe_ds.adapters.adapter import FOLDER
from ubsmoe_ds.base.errors import Diverged, Preempted
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress, Record
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.generation import Prompts
from ubsmoe_ds.client.turn import Turns
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.evaluation import evaluate_part, view_scalars, views_of
from ubsmoe_ds.federation.metrics import complete_seconds
from ubsmoe_ds.federation.outputs import Outputs
from ubsmoe_ds.federation.round_scalars import round_scalars
from ubsmoe_ds.federation.samples import Sample, gather_samples, generate_samples
from ubsmoe_ds.federation.statistics import RoundStatistics
from ubsmoe_ds.federation.training import GroupTraining
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor


@dataclass
class Federation:
    """One rank's part of a federation; every rank of the job calls `run`.

    training: trains this group's clients; holds all that the stages of a round share.
    prompts: evaluation prompts to answer at each evaluation; None: nothing is generated.
    monitor: writes and prints; None on all ranks but the first.
    shows_schedule: whether to print who trains whom in a round.
    record: record of the latest round, kept where any rank may have to write it.
    """

    training: GroupTraining
    prompts: Prompts | None
    monitor: "Monitor | None"
    checkpoints: CheckpointManager
    shows_schedule: bool = False
    record: Record | None = field(default=None)

    @property
    def exp(self) -> Experiment:
        """Return the experiment, without lost clients."""
        return self.training.exp

    @property
    def world(self) -> World:
        """Return this rank's place in the job."""
        return self.training.world

    @property
    def client(self) -> Client:
        """Return this rank's engine."""
        return self.training.client

    @property
    def aggregator(self) -> Aggregator:
        """Return what merges the clients' updates."""
        return self.training.aggregator

    @property
    def stop(self) -> StopRequests:
        """Return the requests to stop."""
        return self.training.stop

    @property
    def hang_watch(self) -> HangWatch:
        """Return what is told of this rank's progress."""
        return self.training.hang_watch

    @property
    def stopwatch(self) -> Stopwatch:
        """Return the watch that the stages of a round share."""
        return self.training.stopwatch

    @property
    def progress(self) -> Progress:
        """Return the resumable progress of the run."""
        return self.training.progress

    def run(self) -> None:
        """Run all remaining rounds, then write the results.

        Raises:
            Preempted: if the job was asked to stop; its progress has been saved.
            Diverged: if there is nothing to merge, or a merge or an evaluation is not finite.
            RanksLost: if a rank has died; call `run` again after recovery (see recovery.py).
        """
        self.start()
        while not self.progress.is_over(self.exp.train):
            self.round()
        if self.checkpoints.is_due(self.progress):
            self._save()
        self.hang_watch.enter("writing the results")
        if self.monitor is not None:
            self.monitor.out_of_patience(self.progress)
        first = next(self.training.batches(self.exp.clients_for(self.world.group)[0], 0))
        self._outputs.write(first, self.progress, self.monitor, self.checkpoints.data_digest)
        for kept in self.training.kept_states:
            kept.remove()
        self.stop.close()

    def start(self) -> None:
        """Tell the owners what clients hold, unless they know (a collective)."""
        self.hang_watch.enter(f"round {self.progress.round}, start")
        if not self.aggregator.started:
            self.aggregator.start()

    def round(self) -> None:
        """Run one round, or the rest of one that was stopped; see `run`."""
        if self.checkpoints.is_due(self.progress):
            self._save()
        if not self.progress.merged:
            if self.shows_schedule and self.monitor is not None:
                self.monitor.say(self.training.roster.line(self.progress.round))
            self.training.take_turns()
            self._merge()
        evaluated, samples = self._evaluate()
        self._record(evaluated, samples)
        self._require_finite(evaluated)
        self.progress.next_round()

    def _stop_if_asked(self) -> None:
        """Save a checkpoint and raise `Preempted` if any rank was asked to stop (a collective)."""
        self.hang_watch.enter(f"round {self.progress.round}, end of its part")
        if self.world.any(self.stop.poll()):
            self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        """Save a checkpoint and raise `Preempted` (a collective)."""
        folder = self._save()
        self.stop.close()
        raise Preempted(f"stopped in round {self.progress.round} of {self.exp.train.rounds}, saved to {folder}")

    def _save(self) -> Path:
        """Save a checkpoint; return its folder (a collective)."""
        self.hang_watch.enter(f"round {self.progress.round}, checkpoint")
        if self.monitor is not None:
            self.monitor.sync()
        local, turns = self.training.local, self.training.turns
        store, server, controls = self.aggregator.store, self.aggregator.server, self.aggregator.controls
        kept = self.training.kept_states
        folder = self.checkpoints.save(self.client, store, server, self.progress, local, turns, kept, controls)
        self.world.agree()
        self.checkpoints.note_saved(self.progress)
        return folder

    def _merge(self) -> None:
        """Merge the changes of all clients' local steps into every client's model (a collective).

        Raises:
            Preempted: if a rank was asked to stop, in place of the merge.
        """
        self.stopwatch.lap("wait")
        number, training = self.progress.round, self.training
        self.hang_watch.enter(f"round {number}, merge")
        stop = self.world.any_of_group(self.stop.poll())
        if not self.exp.takes_turns:
            training.turns = Turns()
            if not stop:
                training.end_turn()
        try:
            merged = self.aggregator.merge(training.turns, training.roster.cohort(number), stop)
        except Diverged as error:
            raise Diverged(f"round {number}: {error}") from error
        if merged is None:
            if not self.exp.takes_turns:
                training.turns = Turns()  # a client of its own group is saved as it is
            self._save_and_stop()
        metrics, seconds = round_scalars(training, merged) if self._keeps_records else ({}, {})
        self.world.agree()  # up to here the merge can be repeated; from here on this rank changes for good
        self.stopwatch.reset()
        ranks = self.aggregator.server.lora_ranks
        self.aggregator.apply(merged, number)
        new = self.aggregator.server.lora_ranks
        pruned = [client for client, (before, now) in enumerate(zip(ranks, new, strict=True)) if before != now]
        statistics = merged.statistics
        self.progress.note_merge(metrics, seconds, statistics.usage.utilisation_LE.tolist())
        if self.exp.takes_turns:
            self._note_turns(statistics)
        training.next_round(statistics, pruned, merged.controls)
        if self.monitor is not None:
            names = [self.exp.clients[client].name for client in statistics.cohort]
            self.monitor.refused(number, dict(zip(names, merged.refused, strict=True)))
            self.monitor.bad_steps(number, names, statistics.stats_C, statistics.work_C.tolist())
            self.monitor.left_out(number, names, statistics)
            self.monitor.outweighed(number, names, metrics)

    def _note_turns(self, statistics: RoundStatistics) -> None:
        """Note on every rank what the clients of a merged round go on from, whichever group trains them next."""
        cohort, seconds = statistics.cohort, statistics.seconds_C.tolist()
        self.progress.steps_taken |= dict(zip(cohort, statistics.taken_C.tolist(), strict=True))
        if self.exp.router.gate_rescale == "learned":
            scales_CL = torch.from_numpy(statistics.scales_CL).float()
            scales_CL = torch.where(torch.isfinite(scales_CL), scales_CL, 1.0)  # of a client whose steps went wrong
            self.progress.scales |= dict(zip(cohort, scales_CL, strict=True))
        self.training.roster.note_seconds(cohort, statistics.place_C2[:, 0].tolist(), seconds)

    @property
    def _keeps_records(self) -> bool:
        """Return whether this rank writes the records, or may have to after a death."""
        return self.world.rank == 0 or self.world.survives

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
        evaluators = self.training.texts.evaluators
        part = evaluate_part(self.training, stop)
        answers = generate_samples(self.exp, self.client, self.prompts, views_of(self.training), stop)
        self._stop_if_asked()
        scalars = view_scalars(self.exp, self.world, evaluators, self.aggregator.server.weights, part)
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
        if number and self._keeps_records:
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
            if self.monitor is not None:
                self.monitor.sync()
            raise Diverged(f"round {self.progress.round}: the evaluation loss of {', '.join(bad)} is not finite")
        self.progress.sound_round = self.progress.round

    def _group_table(self, values: Sequence[float]) -> np.ndarray:
        """Sum `values` over each group's ranks; return [groups, len(values)] (a collective)."""
        table = np.zeros((len(self.exp.trainers), len(values)))
        table[self.world.group] = values
        return self.world.sum(table)

    @property
    def _outputs(self) -> Outputs:
        """Return what writes the run's results."""
        return Outputs(self.exp, self.world, self.client, self.aggregator, self.training.rows)

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]
