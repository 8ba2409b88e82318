"""The loop, written once: local steps, exchange, merge, DMR's server step, back, evaluation.

Shapes: C clients, L layers, E experts.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.client import Client, LocalStats
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.cost import flops_per_token
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.evaluation import FIELDS, Evaluator
from ubsmoe_ds.federation.exchange import Exchange
from ubsmoe_ds.federation.metrics import RoundSeconds, evaluation_scalars, seconds_scalars, training_scalars
from ubsmoe_ds.federation.modulation import coefficient_of_variation
from ubsmoe_ds.federation.server import Server
from ubsmoe_ds.federation.units import UnitStore
from ubsmoe_ds.models.olmoe import model_shape
from ubsmoe_ds.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.monitor import Monitor

TIMING_REPEATS = 3


@dataclass
class Federation:
    """Everything one rank needs for the rounds; `run` is the loop. `monitor` is None on all ranks but the first."""

    exp: Experiment
    world: World
    client: Client
    store: UnitStore
    exchange: Exchange
    server: Server
    evaluator: Evaluator
    batches: Iterator[StepBatch]
    monitor: "Monitor | None"

    def run(self) -> None:
        """All rounds; every rank of the job calls it."""
        before = after = self._evaluate()
        self._record(0, before, {}, None)
        for number in range(1, self.exp.train.rounds + 1):
            clock = [time.perf_counter()]
            stats = self.client.train(self.batches, self.exp.train.local_steps)
            clock.append(time.perf_counter())
            update = self.store.updates(self.client.utilisation())
            self.world.barrier()
            clock.append(time.perf_counter())
            merged, (moving, merging) = self.exchange.merge(update.numpy(), self.server.merge_owned)
            utilisation_LE = self.store.apply(torch.from_numpy(merged))
            clock.append(time.perf_counter())
            evaluated: dict[str, float] = {}
            if number % self.exp.evaluation.every == 0 or number == self.exp.train.rounds:
                evaluated = after = self._evaluate()
            clock.append(time.perf_counter())
            local, wait, _, evaluation = np.diff(clock)
            seconds = RoundSeconds(local, wait, moving, merging, evaluation)
            metrics, times = self._round_scalars(stats, seconds, utilisation_LE)
            times["seconds/round"] = clock[-1] - clock[0]
            self._record(number, metrics | evaluated, times, utilisation_LE)
        self._finish(before, after)

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]

    @property
    def _ks(self) -> list[int]:
        return [self.exp.active_experts(client) for client in self.exp.clients]

    def _evaluate(self) -> dict[str, float]:
        """Clients with the same K hold the same model and share the rows; utilisation is weighted as in training."""
        distinct = sorted(set(self._ks))
        mine = distinct.index(self.client.k)
        sharers = [c for c, k in enumerate(self._ks) if k == self.client.k]
        ranks = [(c, r) for c in sharers for r in range(self.exp.clients[c].ranks)]
        worker = ranks.index((self.world.client, self.world.client_rank))
        sums = np.zeros((len(distinct), len(self.evaluator.tasks), len(FIELDS)))
        counts = np.zeros((len(distinct), len(self.client.model.layers), self.exp.num_experts + 1))
        self.client.reset_counts()
        sums[mine] = self.evaluator.sums(self.client, self.client.k, worker, len(ranks))
        counts[mine] = self.client.routed_counts().numpy()
        sums, counts = self.world.sum(sums), self.world.sum(counts)
        of_k = counts[..., :-1] / np.maximum(counts[..., -1:], 1)
        utilisation = sum(w * of_k[distinct.index(k)] for w, k in zip(self.server.weights, self._ks, strict=True))
        cv = float(coefficient_of_variation(torch.as_tensor(utilisation)).mean())
        return evaluation_scalars(self._names, self._ks, self.evaluator.tasks, sums, cv)

    def _round_scalars(
        self, stats: LocalStats, seconds: RoundSeconds, utilisation_LE: Tensor
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, wall times) of all clients."""
        if self.world.client_rank > 0:  # norms and steps are the client's, times are its first rank's
            stats = stats._replace(real_norm=0.0, pseudo_norm=0.0, steps=0.0)
            seconds = RoundSeconds(*np.zeros(len(seconds)))
        table = self._client_table([*stats, *seconds, self.exchange.bytes_sent])
        of_client = [LocalStats(*row) for row in table[:, : len(stats)]]
        times = [RoundSeconds(*row) for row in table[:, len(stats) : -1]]
        metrics = training_scalars(self._names, of_client, table[:, -1], utilisation_LE)
        return metrics, seconds_scalars(self._names, of_client, times)

    def _client_table(self, own: Sequence[float]) -> np.ndarray:
        """[C, len(own)], each client's row the sum over its ranks."""
        table = np.zeros((len(self.exp.clients), len(own)))
        table[self.world.client] = own
        return self.world.sum(table)

    def _record(
        self, number: int, metrics: dict[str, float], seconds: dict[str, float], utilisation_LE: Tensor | None
    ) -> None:
        if self.monitor is not None:
            self.monitor.round(number, metrics, seconds, utilisation_LE)

    def _finish(self, before: dict[str, float], after: dict[str, float]) -> None:
        """Step times (one client at a time, so that they do not disturb each other), the adapter, and the table."""
        batch = next(self.batches)
        ratio = 0.0
        for number in range(len(self.exp.clients)):
            self.world.barrier()
            if number == self.world.client:
                own, full = self.client.step_seconds(batch, (self.client.k, self.exp.k_max), TIMING_REPEATS)
                ratio = own / full if self.world.client_rank == 0 else 0.0
        ratios_C = self._client_table([ratio])[:, 0]
        # the global state is the same everywhere; the first client gathers it whole
        state = self.store.full_state() if self.world.client == 0 else {}
        if self.monitor is not None:
            self.monitor.save_adapter(state)
            rows = self._summary(before, after, ratios_C, context=batch.micro[0].input_ids.shape[1])
            cv = {
                f"utilisation_cv_{when}": m["eval/utilisation_cv"] for when, m in (("before", before), ("after", after))
            }
            self.monitor.finish(rows, cv)

    def _summary(
        self, before: dict[str, float], after: dict[str, float], ratios_C: np.ndarray, context: int
    ) -> list[dict[str, Any]]:
        """One row a client."""
        shape = model_shape(self.client.hf_config, self.client.spec)
        full = flops_per_token(shape, self.exp.k_max, context)
        rows = []
        for name, k, ratio in zip(self._names, self._ks, ratios_C, strict=True):
            flops = flops_per_token(shape, k, context)
            row = {"client": name, "k": k, "flops_ratio": flops / full, "step_time_ratio": float(ratio)}
            for field in ("loss", "accuracy"):
                row[f"{field}_before"] = before[f"eval_{field}/{name}"]
                row[f"{field}_after"] = after[f"eval_{field}/{name}"]
            rows.append(row)
        return rows
