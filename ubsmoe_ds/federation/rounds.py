"""The loop, written once: local steps, exchange, merge, DMR's server step, back, evaluation.

Shapes: C clients, L layers, E experts, G groups of clients that hold the same model.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.client import Client, LocalStats
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.cost import flops_per_token
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.evaluation import FIELDS, Evaluator
from ubsmoe_ds.federation.adapter import CLIENTS, FOLDER, save_adapter
from ubsmoe_ds.federation.exchange import Exchange
from ubsmoe_ds.federation.metrics import RoundSeconds, evaluation_scalars, seconds_scalars, training_scalars
from ubsmoe_ds.federation.modulation import coefficient_of_variation
from ubsmoe_ds.federation.pruning import next_rank
from ubsmoe_ds.federation.server import Server, Usage
from ubsmoe_ds.federation.statistics import RoundStatistics, count_refused, gather, share_moments
from ubsmoe_ds.federation.units import UnitStore
from ubsmoe_ds.models.causal_lm import model_shape
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.monitor import Monitor

TIMING_REPEATS = 3


@dataclass
class Federation:
    """Everything one rank needs for the rounds; `run` is the loop. `monitor` is None on all ranks but the first.

    plan: (LoRA ranks sent, LoRA ranks received) of the clients -> the exchange.
    """

    exp: Experiment
    world: World
    client: Client
    store: UnitStore
    plan: Callable[[Sequence[int], Sequence[int]], Exchange]
    server: Server
    evaluator: Evaluator
    batches: Iterator[StepBatch]
    monitor: "Monitor | None"

    def run(self) -> None:
        """All rounds; every rank of the job calls it."""
        self._start()
        before = after = self._evaluate()
        self._record(0, before, {}, None)
        for number in range(1, self.exp.train.rounds + 1):
            clock = [time.perf_counter()]
            stats = self.client.train(self.batches, self.exp.train.local_steps)
            clock.append(time.perf_counter())
            update = self.store.updates()
            if self.exp.lora.prune_penalty:
                self.client.rank = next_rank(self.store, update, self.client.tail_start)
            statistics = self._statistics(update)
            clock.append(time.perf_counter())
            merging = self._exchange(number, update, statistics)
            refused_C = self._report_refused(number, statistics)
            clock.append(time.perf_counter())
            evaluated: dict[str, float] = {}
            if number % self.exp.evaluation.every == 0 or number == self.exp.train.rounds:
                evaluated = after = self._evaluate()
            clock.append(time.perf_counter())
            if self.exp.train.save_every and number % self.exp.train.save_every == 0:
                self._save(self.exp.run_dir / f"{FOLDER}-round-{number}")
            local, wait, exchange, evaluation = np.diff(clock)
            seconds = RoundSeconds(local, wait, exchange - merging, merging, evaluation)
            metrics, times = self._round_scalars(stats, seconds, statistics, refused_C)
            times["seconds/round"] = clock[-1] - clock[0]
            self._record(number, metrics | evaluated, times, statistics.usage.utilisation_LE)
        self._finish(before, after)

    def _start(self) -> None:
        """Owners learn what clients hold; the moments of a first look at the data are shared."""
        self.exchange = self.plan(self.server.ranks, self._reply_ranks(self.server.ranks))
        self.server.start(self.exchange.collect(self.store.shared.numpy(), exact=True))
        share_moments(self.world, self.client, self.server.weights[self.world.client])

    def _reply_ranks(self, ranks: Sequence[int]) -> list[int]:
        """LoRA rank of what each client gets back: its own, or FLoRA's stack of all."""
        return [sum(ranks)] * len(ranks) if self.exp.merge.rule == "flora" else list(ranks)

    def _statistics(self, update: Tensor) -> RoundStatistics:
        finite = bool(torch.isfinite(update).all())
        return gather(self.world, self.client, self.server.weights, finite, self.exp.merge.pseudo_weight)

    def _exchange(self, number: int, update: Tensor, statistics: RoundStatistics) -> float:
        """To the owners and back; returns the seconds spent merging."""
        old, new = self.server.ranks, statistics.ranks
        if new != old:
            self.exchange = self.plan(old, self._reply_ranks(new))
        if self.exchange.is_reducible and self.server.is_linear and not statistics.astray_C.any():
            back, merging = self._reduce(update, statistics.usage)
        else:
            received = self.exchange.collect(update.numpy())
            start = time.perf_counter()
            replies = self.server.merge(received, statistics.usage, new)
            merging = time.perf_counter() - start
            back = torch.from_numpy(self.exchange.distribute(replies))
        self.store.apply(back, self._reply_ranks(new)[self.world.client], number)
        if new != old:
            self.exchange = self.plan(new, self._reply_ranks(new))
            if self.client.rank != old[self.world.client]:
                self.client.reset_optimizer()  # moments of the ranks that are gone would move them again
        return merging

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

    def _report_refused(self, number: int, statistics: RoundStatistics) -> list[int]:
        """Name what was refused, and get its clients going again; returns how many units of each client."""
        if not statistics.astray_C.any():
            return [0] * len(self._names)
        units = [unit.name for unit in self.store.units]
        refused = count_refused(
            self.world, [(client, units.index(unit.name)) for client, unit in self.server.refused], len(self._names),
            len(units),
        )  # fmt: skip
        by_client = [[units[u] for c, u in refused if c == client] for client in range(len(self._names))]
        if statistics.astray_C[self.world.client]:
            self.client.recover()
        if self.monitor is not None:
            pairs = zip(self._names, by_client, strict=True)
            self.monitor.refused(number, {name: found for name, found in pairs if found})
        return [len(found) for found in by_client]

    @property
    def _names(self) -> list[str]:
        return [client.name for client in self.exp.clients]

    @property
    def _ks(self) -> list[int]:
        return [self.exp.active_experts(client) for client in self.exp.clients]

    def _evaluate(self) -> dict[str, float]:
        """Clients of one view hold the same model and share the rows; utilisation is weighted as in training."""
        of_client = views(self.exp)
        distinct = list(dict.fromkeys(of_client))
        mine = distinct.index(of_client[self.world.client])
        sharers = [c for c, view in enumerate(of_client) if view == distinct[mine]]
        ranks = [(c, r) for c in sharers for r in range(self.exp.clients[c].ranks)]
        worker = ranks.index((self.world.client, self.world.client_rank))
        sums_G = np.zeros((len(distinct), len(self.evaluator.tasks), len(FIELDS)))
        counts_GLX = np.zeros((len(distinct), len(self.client.model.layers), self.exp.num_experts + 1))
        self.client.reset_counts()
        sums_G[mine] = self.evaluator.sums(self.client, self.client.k, worker, len(ranks))
        counts_GLX[mine] = self.client.routed_counts().numpy()
        sums_G, counts_GLX = self.world.sum(sums_G), self.world.sum(counts_GLX)
        of_view = counts_GLX[..., :-1] / np.maximum(counts_GLX[..., -1:], 1)
        pairs = zip(self.server.weights, of_client, strict=True)
        utilisation_LE = sum(w * of_view[distinct.index(view)] for w, view in pairs)
        cv = float(coefficient_of_variation(torch.as_tensor(utilisation_LE)).mean())
        return evaluation_scalars(self._names, of_client, self.evaluator.tasks, sums_G, cv)

    def _round_scalars(
        self, stats: LocalStats, seconds: RoundSeconds, statistics: RoundStatistics, refused_C: Sequence[int]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """(metrics, wall times) of all clients."""
        if self.world.client_rank > 0:  # norms and steps are the client's, times are its first rank's
            stats = stats._replace(real_norm=0.0, pseudo_norm=0.0, steps=0.0)
            seconds = RoundSeconds(*np.zeros(len(seconds)))
        table = self._client_table([*stats, *seconds, self.exchange.bytes_sent])
        of_client = [LocalStats(*row) for row in table[:, : len(stats)]]
        times = [RoundSeconds(*row) for row in table[:, len(stats) : -1]]
        metrics = training_scalars(
            self._names, of_client, table[:, -1], statistics.usage.utilisation_LE, statistics.ranks, refused_C
        )
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
        """Step times, the adapter, and the table."""
        batch = next(self.batches)
        ratios_C = self._step_time_ratios(batch)
        self._save(self.exp.run_dir / FOLDER)
        if self.monitor is not None:
            rows = self._summary(before, after, ratios_C, context=batch.micro[0].input_ids.shape[1])
            cv = {
                f"utilisation_cv_{when}": m["eval/utilisation_cv"] for when, m in (("before", before), ("after", after))
            }
            self.monitor.finish(rows, cv)

    def _step_time_ratios(self, batch: StepBatch) -> np.ndarray:
        """Of each client, its step over its step at K_max; of clients that are alike the first is measured.

        One client at a time, so that they do not disturb each other.
        """
        clients = zip(self._ks, self.exp.clients, strict=True)
        kinds = [(k, c.ranks, c.expert_parallel, c.capacity_factor) for k, c in clients]
        first_C = [kinds.index(kind) for kind in kinds]
        ratio = 0.0
        for number in sorted(set(first_C)):
            self.world.barrier()
            if number == self.world.client:
                own, full = self.client.step_seconds(batch, (self.client.k, self.exp.k_max), TIMING_REPEATS)
                ratio = own / full if self.world.client_rank == 0 else 0.0
        return self._client_table([ratio])[first_C, 0]

    def _save(self, folder: Path) -> None:
        """Each client's adapter, and the whole's from the client of the largest rank, which has all that is shared."""
        config = self.exp.clients[self.world.client]
        state, own = self.store.full_state(), self._own_scales()
        if self.world.client_rank == 0:
            rank, scaling = self.store.rank, self.exp.lora.alpha / self.exp.lora_rank(config)
            save = partial(save_adapter, self.exp, rank=rank, scaling=scaling)
            save(folder / CLIENTS / config.name, state | own, k=self.client.k)
            if self.world.client == int(np.argmax(self.server.ranks)):
                save(folder, state, k=self.exp.k_max)
        self.world.barrier()

    def _own_scales(self) -> dict[str, Tensor]:
        """What the gates learned for this client alone (a collective over it under ZeRO)."""
        found = {}
        for index, decoder in enumerate(self.client.model.decoders):
            if isinstance(decoder.mlp, UBSMoE) and decoder.mlp.gate.scale is not None:
                found[f"layers.{index}.scale"] = self.client.finisher.masters.read(decoder.mlp.gate.scale).cpu()
        return found

    def _summary(
        self, before: dict[str, float], after: dict[str, float], ratios_C: np.ndarray, context: int
    ) -> list[dict[str, Any]]:
        """One row a client."""
        shape = model_shape(self.client.hf_config, self.client.spec)
        full = flops_per_token(replace(shape, lora_rank=self.exp.lora.rank), self.exp.k_max, context)
        rows = []
        for config, k, rank, ratio in zip(self.exp.clients, self._ks, self.server.ranks, ratios_C, strict=True):
            flops = flops_per_token(replace(shape, lora_rank=rank), k, context)
            row = {"client": config.name, "budget": config.budget, "k": k, "lora_rank": rank}
            row |= {"flops_ratio": flops / full, "step_time_ratio": float(ratio)}
            for field in ("loss", "accuracy"):
                row[f"{field}_before"] = before[f"eval_{field}/{config.name}"]
                row[f"{field}_after"] = after[f"eval_{field}/{config.name}"]
            rows.append(row)
        return rows


def views(exp: Experiment) -> list[str]:
    """Name of the model that each client evaluates: "k4" where K tells them apart, else the client's own name.

    A client's model is its own where it has learned something for itself alone, or where its LoRA rank is.
    """
    alone = exp.router.gate_rescale == "learned" or len(set(exp.lora_ranks)) > 1 or exp.lora.prune_penalty > 0
    return [client.name if alone else f"k{exp.active_experts(client)}" for client in exp.clients]
