"""Write a run's results: adapters every `save_every` rounds and at the end, `summary.json`, and the final table."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ubsmoe_ds.adapters.adapter import CLIENTS, FOLDER, save_adapter
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.client.peak_memory import peak_bytes
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import StepBatch, Tokens
from ubsmoe_ds.data.fingerprint import machine, model_digest
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.metrics import training_speed
from ubsmoe_ds.models.causal_lm import moe_of
from ubsmoe_ds.models.cost import step_flops
from ubsmoe_ds.models.hf_config import model_shape
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor

OVERALL = ("loss", "loss_weighted", "accuracy", "accuracy_weighted")  # plain and weighted means over the clients


@dataclass(frozen=True)
class Outputs:
    """Write a run's results; every rank of the job calls its methods."""

    exp: Experiment
    world: World
    client: Client
    aggregator: Aggregator
    rows: RowReport

    def write(self, batch: StepBatch, progress: Progress, monitor: "Monitor | None", data_digest: str) -> None:
        """Write the adapters, `summary.json` and the table (a collective over the job).

        Args:
            batch: the run's first step, for whose tokens FLOPs are counted.
            progress: progress at the end of the last round.
            monitor: the first rank's monitor; None on other ranks.
            data_digest: digest of the rows, see data/fingerprint.py.
        """
        self.save_adapters(progress.run_id)
        peak_C = self._peak_memory()
        self.world.agree()
        if monitor is not None:
            rows = self._summary(progress, peak_C, batch.micro[0], records=monitor.records())
            evaluations = (("before", progress.before), ("after", progress.after))
            cv = {f"utilisation_cv_{when}": scalars["eval/utilisation_cv"] for when, scalars in evaluations}
            overall = {
                f"{name}_{when}": scalars.get(f"eval/{name}", math.nan)
                for name in OVERALL
                for when, scalars in evaluations
            }
            inputs = {
                "model_digest": model_digest(self.exp.weights_dir),
                "data_digest": data_digest,
                "rows": self.rows.record(),
                "machine": machine(),
            }
            monitor.finish(rows, overall | cv | {"lost_in_round": progress.lost} | inputs)
        self.world.agree()  # if the first rank dies while it writes, another rank writes again

    def save_adapters(self, run_id: str, number: int | None = None) -> None:
        """Write each client's adapter, and the merged one from the client of the largest LoRA rank, which holds it all.

        Args:
            run_id: the run's.
            number: round for the folder's name; None: the end of the run.
        """
        folder = self.exp.run_dir / (FOLDER if number is None else f"{FOLDER}-round-{number}")
        config = self.exp.clients[self.world.client]
        state, scales = self.aggregator.store.full_state(self.aggregator.lora_rank), self._learned_scales()
        if self.world.group_rank == 0:
            self._write_adapters(folder, state, scales, self.exp.lora.alpha / self.exp.lora_rank(config), run_id)
        self.world.barrier()

    def _write_adapters(
        self, folder: Path, state: dict[str, Tensor], scales: dict[str, Tensor], scaling: float, run_id: str
    ) -> None:
        """Write this client's adapter, and the merged one if this client holds it."""
        save = partial(save_adapter, self.exp, lora_rank=self.aggregator.lora_rank, scaling=scaling, run_id=run_id)
        if self.exp.router.trainable:  # PEFT saves a router's module whole
            state = state | {name: value.cpu() for name, value in self.client.model.router_biases().items()}
        save(folder / CLIENTS / self.client.config.name, state | scales, k=self.client.k)
        if self.world.client == int(np.argmax(self.aggregator.server.lora_ranks)):
            save(folder, state, k=self.exp.k_max)

    def _learned_scales(self) -> dict[str, Tensor]:
        """Return the scales that the gates learned for this client alone (a collective over its ranks under ZeRO)."""
        scales = {}
        for index, decoder in enumerate(self.client.model.decoders):
            layer = moe_of(decoder)
            if layer is not None and layer.gate.scale is not None:
                scales[f"layers.{index}.scale"] = self.client.gradient_hook.masters.read(layer.gate.scale).cpu()
        return scales

    def _peak_memory(self) -> np.ndarray:
        """Return each client's peak memory in bytes, the largest of its ranks (a collective over the job)."""
        table_CR = np.zeros((len(self.exp.clients), max(client.ranks for client in self.exp.clients)))
        table_CR[self.world.client, self.world.group_rank] = peak_bytes(self.client.device)
        return self.world.sum(table_CR).max(axis=1)

    def _summary(
        self, progress: Progress, peak_C: np.ndarray, tokens: Tokens, records: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return one row for each client; `records` are all rounds of the run (see `Monitor.records`)."""
        full = self._flops(tokens, self.exp.lora.rank, self.exp.k_max)
        rows, server = [], self.aggregator.server
        for config, weight, rank, peak in zip(self.exp.clients, server.weights, server.lora_ranks, peak_C, strict=True):
            k = self.exp.active_experts(config)
            row = {"client": config.name, "budget": config.budget, "k": k, "lora_rank": rank}
            row |= {"rows": self.rows.kept[config.name], "weight": weight}
            row |= {"flops_ratio": self._flops(tokens, rank, k) / full, **training_speed(records, config.name)}
            row["peak_memory_gb"] = float(peak) / 1e9
            for field in ("loss", "accuracy"):  # unknown for a client that was lost at the time and has come back
                row[f"{field}_before"] = progress.before.get(f"eval_{field}/{config.name}", math.nan)
                row[f"{field}_after"] = progress.after.get(f"eval_{field}/{config.name}", math.nan)
            rows.append(row)
        return rows

    def _flops(self, tokens: Tokens, lora_rank: int, k: int) -> float:
        """Return the FLOPs of training on this micro-batch with so many active experts."""
        shape = model_shape(self.client.hf_config, lora_rank=lora_rank, lora_attention=self.exp.lora.attention)
        _, context = tokens.input_ids.shape
        count, answers = tokens.input_ids.numel(), len(tokens.target_A)
        again, router = self.exp.train.activation_checkpointing, self.exp.router.trainable
        return step_flops(shape, k, count, context, answers, router=router, again=again)
