"""The loop, written once: local steps, exchange, merge, DMR's server step, back, evaluation.

Shapes: C clients, L layers, E experts.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.client import Client, LocalStats
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.cost import flops_per_token
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.evaluation import Evaluator
from ubsmoe_ds.federation.exchange import Exchange
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
    rows_cut: int  # of this client: prompts that lost their beginning to data.max_length
    monitor: "Monitor | None"

    def run(self) -> None:
        """All rounds; every rank of the job calls it."""
        before = self._evaluate()
        self._record(0, before, {}, None)
        utilisation_LE = first_LE = None
        after = before
        for number in range(1, self.exp.train.rounds + 1):
            clock = [time.perf_counter()]
            stats = self.client.train(self.batches, self.exp.train.local_steps)
            update = self.store.updates(self.client.utilisation())
            self.world.barrier()
            clock.append(time.perf_counter())
            merged, (moving, merging) = self.exchange.merge(update.numpy(), self.server.merge_owned)
            utilisation_LE = self.store.apply(torch.from_numpy(merged))
            first_LE = utilisation_LE if first_LE is None else first_LE
            clock.append(time.perf_counter())
            metrics, speeds = self._training_metrics(stats, utilisation_LE)
            if number % self.exp.evaluation.every == 0 or number == self.exp.train.rounds:
                after = self._evaluate()
                metrics |= after
            clock.append(time.perf_counter())
            seconds = {
                "round": clock[3] - clock[0],
                "local": stats.seconds,
                "wait": clock[1] - clock[0] - stats.seconds,
            }
            seconds |= {"exchange": moving, "merge": merging, "evaluation": clock[3] - clock[2]} | speeds
            self._record(number, metrics, seconds, utilisation_LE)
        self._finish(before, after, first_LE, utilisation_LE)

    def _evaluate(self) -> dict[str, float]:
        """Loss and accuracy at each distinct K, per task, per client and overall (the clients' plain mean)."""
        ks = [self.exp.active_experts(client) for client in self.exp.clients]
        distinct = sorted(set(ks))
        ranks = [
            (c, r) for c, config in enumerate(self.exp.clients) for r in range(config.ranks) if ks[c] == self.client.k
        ]
        worker = ranks.index((self.world.client, self.world.client_rank))
        sums = np.zeros((len(distinct), len(self.evaluator.tasks), 4))
        sums[distinct.index(self.client.k)] = self.evaluator.sums(self.client, self.client.k, worker, len(ranks))
        sums = self.world.sum(sums)
        found: dict[str, float] = {}
        for k, of_k in zip(distinct, sums, strict=True):
            for name, (nll, tokens, correct, rows) in zip(
                ["all", *self.evaluator.tasks], [of_k.sum(0), *of_k], strict=True
            ):
                found[f"eval_k{k}/loss_{name}"] = nll / tokens
                found[f"eval_k{k}/accuracy_{name}"] = correct / rows
        for field in ("loss", "accuracy"):
            of_client = [found[f"eval_k{k}/{field}_all"] for k in ks]
            found |= {f"eval_{field}/{c.name}": v for c, v in zip(self.exp.clients, of_client, strict=True)}
            found[f"eval/{field}"] = sum(of_client) / len(of_client)
        return found

    def _training_metrics(self, stats: LocalStats, utilisation_LE: Tensor) -> tuple[dict[str, float], dict[str, float]]:
        """Every client's and the overall training scalars of a round, and tokens/s; the same on every rank."""
        table = np.zeros((len(self.exp.clients), len(stats) + 1))
        own = np.array([*stats, self.exchange.bytes_sent], dtype=np.float64)
        if self.world.client_rank > 0:  # norms, steps and seconds are the client's, not a rank's
            own[[stats._fields.index(name) for name in ("real_norm", "pseudo_norm", "steps", "seconds")]] = 0
        table[self.world.client] = own
        table = self.world.sum(table)
        found: dict[str, float] = {}
        speeds: dict[str, float] = {}
        for config, row in zip(self.exp.clients, table, strict=True):
            client = LocalStats(*row[:-1])
            found[f"train_loss/{config.name}"] = client.nll / client.answer_tokens
            found[f"dropped_share/{config.name}"] = client.dropped_routes / max(client.routed_routes, 1)
            found[f"gradient_norm/{config.name}"] = client.real_norm / client.steps
            found[f"pseudo_over_real_norm/{config.name}"] = client.pseudo_norm / max(client.real_norm, 1e-12)
            found[f"tokens/{config.name}"] = client.used_tokens
            speeds[f"tokens_per_second/{config.name}"] = client.used_tokens / client.seconds
        total = LocalStats(*table[:, :-1].sum(0))
        found["train/loss"] = total.nll / total.answer_tokens
        found["train/dropped_share"] = total.dropped_routes / max(total.routed_routes, 1)
        found["exchange/megabytes"] = table[:, -1].sum() / 1e6
        found["utilisation/cv"] = float(coefficient_of_variation(utilisation_LE).mean())
        return found, speeds

    def _record(
        self, number: int, metrics: dict[str, float], seconds: dict[str, float], utilisation_LE: Tensor | None
    ) -> None:
        if self.monitor is not None:
            self.monitor.round(number, metrics, seconds, utilisation_LE)

    def _finish(
        self, before: dict[str, float], after: dict[str, float], first_LE: Tensor | None, last_LE: Tensor | None
    ) -> None:
        """Step times (one client at a time, so that they do not disturb each other), the table, and the adapter."""
        assert first_LE is not None and last_LE is not None
        k_max = self.exp.k_max
        ratios = np.zeros(len(self.exp.clients))
        batch = next(self.batches)
        for number in range(len(self.exp.clients)):
            self.world.barrier()
            if number == self.world.client:
                own, full = self.client.step_seconds(batch, (self.client.k, k_max), TIMING_REPEATS)
                ratios[number] = own / full if self.world.client_rank == 0 else 0.0
        ratios = self.world.sum(ratios)
        shape = model_shape(self.client.hf_config, self.client.spec)
        context = batch.micro[0].input_ids.shape[1]
        rows: list[dict[str, Any]] = []
        for config, ratio in zip(self.exp.clients, ratios, strict=True):
            k = self.exp.active_experts(config)
            flops = flops_per_token(shape, k, context) / flops_per_token(shape, k_max, context)
            row = {"client": config.name, "k": k, "flops_ratio": flops, "step_time_ratio": float(ratio)}
            for field in ("loss", "accuracy"):
                row |= {
                    f"{field}_before": before[f"eval_{field}/{config.name}"],
                    f"{field}_after": after[f"eval_{field}/{config.name}"],
                }
            rows.append(row)
        # the global state is the same everywhere; the first client has it complete
        state = self.store.full_state() if self.world.client == 0 else {}
        cv = [float(coefficient_of_variation(u).mean()) for u in (first_LE, last_LE)]
        if self.monitor is not None:
            self.monitor.save_adapter(state)
            self.monitor.finish(rows, {"utilisation_cv_before": cv[0], "utilisation_cv_after": cv[1]})
