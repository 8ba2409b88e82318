"""Show a run to its user: one line a round, TensorBoard, `metrics.jsonl`, and the table at the end.

Figures of many clients that take turns go to `clients.jsonl`; everything else shows them by budget.

Only rank 0 of the job has a monitor that writes. Shapes: L layers, E experts.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ubsmoe_ds.base.files import json_line, replace_files, writes
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.checkpoint.progress import Progress, Record
from ubsmoe_ds.client.engine import LocalStats
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.federation.budgets import CLIENT_RECORD, RECORD, OfClients, budget_rows, by_budget, read_records, sums_up
from ubsmoe_ds.federation.roster import Lost
from ubsmoe_ds.federation.samples import SAMPLES, Sample, SampleFile
from ubsmoe_ds.federation.statistics import RoundStatistics
from ubsmoe_ds.federation.tensorboard import TensorBoard

# colour stops from dark blue over teal to yellow, with linear steps between them
HEAT = np.array([[0.17, 0.11, 0.33], [0.13, 0.37, 0.55], [0.12, 0.63, 0.53], [0.99, 0.91, 0.15]])
CELL = 12  # pixels


class Monitor:
    """Write the run's records.

    Args:
        exp: the experiment; its `rounds` sets the ETA.
        run_id: the run's; it is in all that is written.
        owner: holds the run's folder, see `open_run_folder`; closed at the end.
        resume_at: round at which a resumed run continues; earlier records of it and of later rounds are dropped.
        config: config to write beside the records; None: that of `exp`.
    """

    def __init__(
        self,
        exp: Experiment,
        run_id: str,
        owner: IO[str],
        resume_at: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.exp, self.run_id, self.folder, self._owner = exp, run_id, exp.run_dir, owner
        self._budgets = {client.name: f"b{client.budget:g}" for client in exp.clients}
        facts = {"run_id": run_id, **(config or exp.model_dump(mode="json"))}
        text = json.dumps(facts, indent=2) + "\n"
        replace_files(self.folder, {"config.json": lambda path: path.write_text(text, encoding="utf-8")})
        self.console = Console()
        self._tensorboard = TensorBoard(self.folder / "tensorboard", resume_at)
        kept = recorded_rounds(self.folder / RECORD, before=resume_at or 0)
        self.latest = json.loads(kept[-1])["round"] if kept else -1  # round that an earlier monitor recorded last
        replace_files(self.folder, {RECORD: lambda path: path.write_text("".join(kept), encoding="utf-8")})
        if sums_up(exp) or (self.folder / CLIENT_RECORD).exists():
            # without lines of a round of which the first rank died before it wrote the record
            of_clients = "".join(recorded_rounds(self.folder / CLIENT_RECORD, before=self.latest + 1))
            replace_files(self.folder, {CLIENT_RECORD: lambda path: path.write_text(of_clients, encoding="utf-8")})
        self._samples = SampleFile(self.folder, run_id, recorded_rounds(self.folder / SAMPLES, before=resume_at or 0))
        self._record = (self.folder / RECORD).open("a", encoding="utf-8")
        self._start, self._first = time.perf_counter(), resume_at or 0
        self._tensorboard.text("run_id", run_id, resume_at or 0)

    def say(self, text: str) -> None:
        """Print a line to the terminal."""
        say(text)

    def round(self, record: Record) -> None:
        """Write the record of a round to `metrics.jsonl` and TensorBoard, and print its line."""
        number, metrics, seconds, utilisation_LE = record
        if sums_up(self.exp):
            (metrics, of_metrics), (seconds, of_seconds) = (
                by_budget(self._budgets, part) for part in (metrics, seconds)
            )
            self._write_clients(number, of_metrics, of_seconds)
        facts = {"run_id": self.run_id, "round": number, "metrics": metrics, "seconds": seconds}
        with writes(self.folder / RECORD):
            self._record.write(json_line(facts))
            self._record.flush()
        self._tensorboard.scalars({**metrics, **seconds}, number)
        if utilisation_LE is not None and "eval/loss" in metrics:  # one takes longer to write than all the rest
            self._tensorboard.image("utilisation/layer_by_expert", heat_map(utilisation_LE), number)
        self.say(self._progress(number, metrics, seconds))

    def _write_clients(self, number: int, metrics: OfClients, seconds: OfClients) -> None:
        """Write one line to `clients.jsonl` for each client that has figures of the round."""
        lines = []
        for client, values in metrics.items():
            facts = {"run_id": self.run_id, "round": number, "client": client}
            facts |= {"metrics": values, "seconds": seconds.get(client, {})}
            lines.append(json_line(facts))
        path = self.folder / CLIENT_RECORD
        with writes(path), path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def sync(self) -> None:
        """Bring the records to the disk, as a checkpoint counts on those of the rounds before it."""
        for path in (self.folder / name for name in (SAMPLES, CLIENT_RECORD, RECORD)):
            if path.exists():
                with writes(path), path.open("ab") as file:
                    os.fsync(file.fileno())
        self._tensorboard.flush()

    def samples(self, number: int, samples: Sequence[Sample]) -> None:
        """Write the answers that the models generated in a round's evaluation."""
        self._samples.write(number, samples, self._tensorboard)

    def out_of_patience(self, progress: Progress) -> None:
        """Say why the run ends before its last round, if it does."""
        train = self.exp.train
        if progress.is_out_of_patience(train) and progress.round <= train.rounds:
            self.say(
                f"stopped after round {progress.round - 1} of {train.rounds}: no lower eval/loss_weighted in "
                f"{progress.stale} evaluations (train.patience); the best is {progress.best_loss:.4f}, of round "
                f"{progress.best_round}"
            )

    def refused(self, number: int, units: Mapping[str, Sequence[str]]) -> None:
        """Warn of units in which a client's update held NaN or Inf.

        Args:
            number: the round.
            units: names of the refused units, by client.
        """
        for client, names in units.items():
            if not names:
                continue
            self.say(f"warning: round {number}: NaN or Inf from client {client!r} refused in {_listed(names)}")
            self._tensorboard.text(f"refused/{client}", ", ".join(names), number)

    def bad_steps(
        self, number: int, clients: Sequence[str], stats: Sequence[LocalStats], work_C: Sequence[float]
    ) -> None:
        """Warn of clients that skipped steps because their gradients held NaN or Inf.

        Args:
            number: the round.
            clients: names of all clients.
            stats: sums of each client's local steps.
            work_C: part of the round's work that each client did, 0 to 1; 0: it sits the round out.
        """
        for client, sums, work in zip(clients, stats, work_C, strict=True):
            if sums.bad_steps:
                text = f"skipped {int(sums.bad_steps)} steps with NaN or Inf"
                text += "; it sits the round out" if work == 0 else ""
                self.say(f"warning: round {number}: client {client!r} {text}")
                self._tensorboard.text(f"bad_steps/{client}", text, number)

    def left_out(self, number: int, clients: Sequence[str], statistics: RoundStatistics) -> None:
        """Warn of clients that are left out because their update is out of proportion to the others'."""
        for client, norm, excess, is_out in zip(
            clients, statistics.norm_C, statistics.excess_C, statistics.left_out_C, strict=True
        ):
            if is_out:
                text = f"has an update of norm {norm:.3g}, {excess:.3g} times the others' median"
                if excess <= (self.exp.merge.screen_factor or math.inf):
                    text = "was added up with a client of its group whose update is out of proportion"
                factor = f"merge.screen_factor {self.exp.merge.screen_factor:g}"
                self.say(f"warning: round {number}: client {client!r} {text}; it sits the round out ({factor})")
                self._tensorboard.text(f"left_out/{client}", text, number)

    def outweighed(self, number: int, clients: Sequence[str], metrics: Mapping[str, float]) -> None:
        """Warn of clients whose pseudo-gradient is larger than the real gradient; see `metrics.expert_scalars`."""
        scale = self.exp.pseudo_gradient.scale
        for client in clients:
            ratio = metrics.get(f"pseudo_over_real_norm/{client}", 0.0)
            if ratio > 1:
                text = f"has a pseudo-gradient {ratio:.3g} times its real gradient"
                remedy = f"lower pseudo_gradient.scale, now {scale:g}"
                self.say(f"warning: round {number}: client {client!r} {text} (median of its experts); {remedy}")
                self._tensorboard.text(f"outweighed/{client}", text, number)

    def lost(self, number: int, exp: Experiment, lost: Lost) -> None:
        """Warn of groups and clients that are lost for the rest of the job, and of clients that miss the round.

        Args:
            number: the current round.
            exp: what is left of the experiment.
            lost: what is not.
        """
        left, names = len(exp.clients_left), {client.name for client in exp.clients}
        for name in lost.trainers:
            kind = "client" if exp.groups is None or name in names else "group"
            others = f"{left if kind == 'client' else len(exp.trainers)} {kind}s continue"
            self._lost(number, name, f"{kind} {name!r} is lost (one of its ranks died); {others}")
        if lost.out:
            self.say(f"warning: round {number}: {_listed(lost.out)} sit it out: their groups are lost")
        for name in lost.clients:
            self._lost(number, name, f"client {name!r} is lost (no group that is left may train it)")
        alive = {"clients/alive": left} | ({} if exp.groups is None else {"groups/alive": len(exp.trainers)})
        self._tensorboard.scalars(alive, number)
        self._tensorboard.flush()

    def _lost(self, number: int, name: str, text: str) -> None:
        self.say(f"warning: round {number}: {text}")
        self._tensorboard.text(f"lost/{name}", f"in round {number}: {text}", number)

    def records(self) -> list[dict[str, Any]]:
        """Return the record of every round so far, including earlier jobs of a resumed run."""
        return read_records(self.exp, self.folder)

    def finish(self, rows: list[dict[str, Any]], totals: Mapping[str, Any]) -> None:
        """Write `summary.json` and print it as a table."""
        summary = {"run_id": self.run_id, "clients": rows, **totals}
        text = json_line(summary, indent=2)
        replace_files(self.folder, {"summary.json": lambda path: path.write_text(text, encoding="utf-8")})
        self.console.print(summary_table(budget_rows(rows) if sums_up(self.exp) else rows, totals))
        self.say(f"written to {self.folder}; tensorboard --logdir {self.folder}")
        self.close()

    def close(self) -> None:
        """Close all files and give the run's folder up."""
        self.sync()
        self._record.close()
        self._tensorboard.close()
        self._owner.close()

    def _progress(self, number: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
        loss, accuracy = metrics.get("eval/loss"), metrics.get("eval/accuracy")
        state = "not evaluated" if loss is None else f"eval loss {loss:.4f}"
        state += "" if accuracy is None else f"  accuracy {100 * accuracy:5.1f} %"
        if number == 0:
            self._start, self._first = time.perf_counter(), 1  # set-up does not count towards the ETA
            return f"before       {state}"
        elapsed = time.perf_counter() - self._start
        # the first rank may have died before it wrote the round before the first one of this monitor
        left = elapsed / max(1, number - self._first + 1) * (self.exp.train.rounds - number)
        train_loss = metrics.get("train/loss", math.nan)
        line = (
            f"round {number:3d}/{self.exp.train.rounds}  {state}  train loss {train_loss:.4f}  "
            f"{metrics['exchange/megabytes']:.1f} MB  {seconds['seconds/round']:.1f} s  ETA {_clock(left)}"
        )
        return f"{line}\n{_of_budgets(metrics)}" if sums_up(self.exp) else line


def _of_budgets(metrics: Mapping[str, float]) -> str:
    """Return a line with the training loss of each budget: mean, least and most of its clients in the round."""
    budgets = [key.partition("/")[2] for key in metrics if key.startswith("train_loss/")]
    parts = []
    for budget in sorted(budgets, key=lambda name: float(name[1:])):
        mean, least, most = (metrics[f"train_loss{kind}/{budget}"] for kind in ("", "_min", "_max"))
        parts.append(f"{budget} {mean:.3f} ({least:.3f} to {most:.3f})")
    return f"  train loss by budget: {'  '.join(parts) or 'nobody trained'}"


def recorded_rounds(path: Path, before: int) -> list[str]:
    """Return the lines of a run's record up to the given round, without a half-written line of a killed job."""
    kept: list[str] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                number = json.loads(line)["round"]
            except (ValueError, KeyError, TypeError):
                break
            if number >= before or not line.endswith("\n"):
                break
            kept.append(line)
    return kept


def heat_map(value_LE: Tensor) -> Tensor:
    """Return a matrix as a picture [3, L * CELL, E * CELL]: dark = 0, bright = its largest value."""
    value = value_LE.numpy()
    scaled = value / max(float(value.max()), 1e-12) * (len(HEAT) - 1)
    low = np.clip(scaled.astype(int), 0, len(HEAT) - 2)
    part = (scaled - low)[..., None]
    colour = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    return torch.from_numpy(colour.repeat(CELL, axis=0).repeat(CELL, axis=1)).permute(2, 0, 1).float()


def summary_table(rows: list[dict[str, Any]], totals: Mapping[str, Any]) -> Table:
    """Return the final table: a row for each client, and the clients that were lost."""
    before, after = totals["utilisation_cv_before"], totals["utilisation_cv_after"]
    title = f"mean loss of clients {_change(totals, 'loss')}, weighted {_change(totals, 'loss_weighted')}"
    title += f"\nutilisation CV {before:.3f} -> {after:.3f}"
    if "fairness_variance_after" in totals:
        worst = _change(totals, "fairness_worst_tenth")
        title += f"\nown rows: loss of the worst tenth {worst}, variance {_change(totals, 'fairness_variance')}"
    # fits the 80 columns of a log file
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    choices = any("accuracy_after" in row for row in rows)
    headings = (
        "client",
        "K",
        "LoRA rank",
        "FLOPs %",
        "tokens/s",
        "s/step",
        "loss",
        *(["accuracy %"] if choices else []),
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for row in rows:
        table.add_row(
            row["client"],
            f"{row['k']:g}",
            f"{row['lora_rank']:.4g}",
            f"{100 * row['flops_ratio']:.1f}",
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['loss_before']:.4f} -> {row['loss_after']:.4f}",
            *([f"{100 * row['accuracy_before']:.1f} -> {100 * row['accuracy_after']:.1f}"] if choices else []),
        )
    for client, number in totals["lost_in_round"].items():
        table.add_row(client, "", "", "", "", "", f"lost in round {number}")
    return table


def _change(totals: Mapping[str, Any], name: str) -> str:
    return f"{totals[f'{name}_before']:.4f} -> {totals[f'{name}_after']:.4f}"


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
