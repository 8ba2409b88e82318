"""Write a run's results: adapters every `save_every` rounds and at the end, `summary.json`, and the final table."""

import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.adapters.adapter import CLIENTS, FOLDER, save_adapter
from ubsmoe_ds.base.files import UNFINISHED, writes
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.search import best_rounds
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

FAIRNESS = ("fairness/worst_tenth", "fairness/variance")  # over the clients with evaluation rows of their own
OVERALL = ("loss", "loss_weighted", "accuracy", "accuracy_weighted")  # plain and weighted means over the clients
ACCURACY = "eval_accuracy/"  # begins the names of the clients' accuracies, which rows without choices have none of


def _has_choices(progress: Progress) -> bool:
    """Return whether some client was evaluated on rows with choices."""
    return any(name.startswith(ACCURACY) for scalars in (progress.before, progress.after) for name in scalars)


def _overall(progress: Progress) -> dict[str, float]:
    """Return the figures of all clients together, before the first round and after the last."""
    names = [f"eval/{name}" for name in OVERALL if not name.startswith("accuracy") or _has_choices(progress)]
    names += [name for name in FAIRNESS if name in progress.after]
    evaluations = (("before", progress.before), ("after", progress.after))
    found = {f"{_key(name)}_{when}": part.get(name, math.nan) for name in names for when, part in evaluations}
    return found | {f"utilisation_cv_{when}": part["eval/utilisation_cv"] for when, part in evaluations}


def _key(name: str) -> str:
    """Return a scalar's key in `summary.json`: "eval/loss" is "loss", "fairness/variance" is "fairness_variance"."""
    return name.removeprefix("eval/").replace("/", "_")


def best_folder(run_dir: Path, number: int) -> Path:
    """Return the folder of the best round's adapters, beside those of the latest."""
    return run_dir / f"{FOLDER}-best-round-{number}"


def remove_older_best(run_dir: Path, best: int, needed: Collection[int]) -> None:
    """Remove adapters of rounds that were the best, but for those that a checkpoint still counts as the best."""
    kept = {best_folder(run_dir, number) for number in (best, *needed)}
    with writes(run_dir):
        for folder in run_dir.glob(f"{FOLDER}-best-round-*"):
            if folder not in kept:
                shutil.rmtree(folder)


def _cut(state: Mapping[str, Tensor], lora_rank: int, factor: float) -> dict[str, Tensor]:
    """Return a state's first LoRA ranks, B times the factor; everything else as it is."""
    cut = dict(state)
    for name, value in state.items():
        if name.endswith(".lora_A"):
            cut[name] = value[..., :lora_rank, :].contiguous()
        elif name.endswith(".lora_B"):
            cut[name] = value[..., :lora_rank].contiguous() * factor
    return cut


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
        self.save_adapters(progress, FOLDER, progress.round - 1)
        peak_C = self._peak_memory()
        self.world.agree()
        self.prune_best(progress)
        if monitor is not None:
            best = best_folder(self.exp.run_dir, progress.best_round)
            if self.exp.train.keeps_best and not best.is_dir():
                monitor.say(
                    f"note: {best} is not there: the best round was before this run's folder or train.save_best"
                )
            rows = self._summary(progress, peak_C, batch.micro[0], records=monitor.records())
            inputs = {
                "model_digest": model_digest(self.exp.weights_dir),
                "data_digest": data_digest,
                "rows": self.rows.record(),
                "machine": machine(),
            }
            course = {"lost_in_round": progress.lost, **self._course(progress)}
            monitor.finish(rows, _overall(progress) | course | inputs)
        self.world.agree()  # if the first rank dies while it writes, another rank writes again

    def _course(self, progress: Progress) -> dict[str, Any]:
        """Return which evaluation was best, whether patience ended the run, and what it started from."""
        stopped = progress.is_out_of_patience(self.exp.train)
        return {
            "best_round": progress.best_round,
            "best_loss_weighted": progress.best_loss,
            "stopped_after_round": progress.round - 1 if stopped and progress.round <= self.exp.train.rounds else None,
            "started_from": progress.started_from or None,
        }

    def save_best(self, progress: Progress) -> None:
        """Write the adapters of the current round to a folder that exists whole or not at all (a collective)."""
        folder = best_folder(self.exp.run_dir, progress.round)
        unfinished = folder.with_name(f"{UNFINISHED}{folder.name}")
        self.save_adapters(progress, unfinished.name, progress.round)
        if self.world.rank == 0:
            with writes(folder):
                shutil.rmtree(folder, ignore_errors=True)  # of an earlier attempt at this round
                unfinished.replace(folder)

    def prune_best(self, progress: Progress) -> None:
        """Remove the adapters of rounds that are no longer the best, on the first rank."""
        if self.exp.train.keeps_best and self.world.rank == 0:
            remove_older_best(self.exp.run_dir, progress.best_round, best_rounds(self.exp.run_dir))

    def save_adapters(self, progress: Progress, name: str, number: int) -> None:
        """Write each client's adapter, and the merged one from the client of the largest LoRA rank, which holds it all.

        Args:
            progress: the run's.
            name: the folder's, in that of the run.
            number: the round that they are of.
        """
        folder = self.exp.run_dir / name
        about = {"run_id": progress.run_id, "round": str(number)}
        about |= {f"started_from_{key}": value for key, value in progress.started_from.items()}
        if self.exp.takes_turns:
            self._save_views(folder, progress, about)
        else:
            config = self.exp.clients[self.world.group]
            state, scales = self.aggregator.store.full_state(self.aggregator.held_rank), self._learned_scales()
            if self.world.group_rank == 0:
                rank = self.exp.lora_rank(config)  # the first one: pruning keeps the scaling
                self._write_adapters(folder, state, scales, self.exp.lora_alpha(rank) / rank, about)
        self.world.barrier()

    def _save_views(self, folder: Path, progress: Progress, about: Mapping[str, str]) -> None:
        """Write the merged adapter, and that of each view, from the first group (a collective over that group)."""
        if self.world.group != 0:
            return
        exp, full = self.exp, self.exp.lora.rank
        self.aggregator.store.load(full)
        state = self.aggregator.store.full_state(full) | self._router_biases()
        if self.world.group_rank != 0:
            return
        save, whole = partial(save_adapter, exp, about=about), exp.lora_alpha(full) / full
        save(folder, state, k=exp.k_max, lora_rank=full, scaling=whole)
        views = exp.views
        for view in dict.fromkeys(views):
            client = views.index(view)
            config, rank = exp.clients[client], self.aggregator.server.lora_ranks[client]
            first = exp.lora_rank(config)
            scaling = exp.lora_alpha(first) / first
            own = state if exp.merge.row.stacking else _cut(state, rank, whole / scaling)
            if exp.router.gate_rescale == "learned":
                names = self._scale_names()
                scales_L = progress.scales.get(client, torch.ones(len(names)))
                own = own | dict(zip(names, scales_L.split(1), strict=True))
            save(
                folder / CLIENTS / view,
                own,
                k=exp.active_experts(config),
                lora_rank=rank,
                scaling=scaling,
            )

    def _write_adapters(
        self,
        folder: Path,
        state: dict[str, Tensor],
        scales: dict[str, Tensor],
        scaling: float,
        about: Mapping[str, str],
    ) -> None:
        """Write this client's adapter, and the merged one if this client holds it."""
        save = partial(save_adapter, self.exp, lora_rank=self.aggregator.held_rank, scaling=scaling, about=about)
        state = state | self._router_biases()
        save(folder / CLIENTS / self.client.config.name, state | scales, k=self.client.k)
        if self.world.group == int(np.argmax(self.aggregator.server.lora_ranks)):
            save(folder, state, k=self.exp.k_max)

    def _learned_scales(self) -> dict[str, Tensor]:
        """Return the scales that the gates learned for this client alone (a collective over its ranks under ZeRO)."""
        scales_L = self.client.learned_scales()
        return {} if scales_L is None else dict(zip(self._scale_names(), scales_L.split(1), strict=True))

    def _scale_names(self) -> list[str]:
        """Return the names of the gates' learned scales, in the order of the layers."""
        layers = enumerate(map(moe_of, self.client.model.decoders))
        return [f"layers.{index}.scale" for index, layer in layers if layer is not None]

    def _router_biases(self) -> dict[str, Tensor]:
        """Return the routers' frozen biases where PEFT saves their module whole."""
        biases = self.client.model.router_biases() if self.exp.router.trainable else {}
        return {name: value.cpu() for name, value in biases.items()}

    def _peak_memory(self) -> np.ndarray:
        """Return each client's peak memory in bytes, the largest of its ranks (a collective over the job).

        Where clients take turns that of a client is that of the fullest group that may train it.
        """
        trainers = self.exp.trainers
        table_GR = np.zeros((len(trainers), max(trainer.ranks for trainer in trainers)))
        table_GR[self.world.group, self.world.group_rank] = peak_bytes(self.client.device)
        peak_G = self.world.sum(table_GR).max(axis=1)
        of_clients = map(self.exp.allowed_groups, range(len(self.exp.clients)))
        return np.array([peak_G[groups].max() if groups else math.nan for groups in of_clients])  # NaN: a lost client

    def _summary(
        self, progress: Progress, peak_C: np.ndarray, tokens: Tokens, records: Sequence[Mapping[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return one row for each client; `records` are all rounds of the run (see `Monitor.records`)."""
        rows, server = [], self.aggregator.server
        for config, weight, rank, peak in zip(self.exp.clients, server.weights, server.lora_ranks, peak_C, strict=True):
            k = self.exp.active_experts(config)
            row = {"client": config.name, "budget": config.budget, "k": k, "lora_rank": rank}
            row |= {"rows": self.rows.kept[config.name], "weight": weight}
            spread = config.expert_parallel > 1
            full = self._flops(tokens, self.exp.lora.rank, self.exp.k_max, spread)
            row |= {"flops_ratio": self._flops(tokens, rank, k, spread) / full}
            row |= training_speed(records, config.name)
            row["peak_memory_gb"] = float(peak) / 1e9
            if self.exp.takes_turns:
                row["rounds"] = sum(f"steps/{config.name}" in record["metrics"] for record in records)
            for field in (
                ("loss", "accuracy") if _has_choices(progress) else ("loss",)
            ):  # unknown for a client that was lost at the time and has come back
                row[f"{field}_before"] = progress.before.get(f"eval_{field}/{config.name}", math.nan)
                row[f"{field}_after"] = progress.after.get(f"eval_{field}/{config.name}", math.nan)
            rows.append(row)
        return rows

    def _flops(self, tokens: Tokens, lora_rank: int, k: int, spread: bool) -> float:
        """Return the FLOPs of training on this micro-batch with so many active experts, `spread` over ranks or not."""
        shape = model_shape(self.client.hf_config, lora_rank=lora_rank, lora_attention=self.exp.lora.attention)
        _, context = tokens.input_ids.shape
        count, answers = tokens.input_ids.numel(), len(tokens.target_A)
        again, router = self.exp.train.activation_checkpointing, self.exp.router.trainable
        return step_flops(shape, k, count, context, answers, router=router, again=again, spread=spread)
