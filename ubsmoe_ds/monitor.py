"""What a person sees of a run: one line a round, TensorBoard, `metrics.jsonl`, and the table at the end.

Only rank 0 of the job has a monitor that writes. Shapes: L layers, E experts.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.run_folder import create_run_folder

# dark blue - teal - yellow, linear between the stops
HEAT = np.array([[0.17, 0.11, 0.33], [0.13, 0.37, 0.55], [0.12, 0.63, 0.53], [0.99, 0.91, 0.15]])
CELL = 12  # pixels


class Monitor:
    """Opens the run's folder, which must be free (see `run_folder.py`).

    Args:
        exp: the experiment, whose `rounds` sets the ETA.
    """

    def __init__(self, exp: Experiment) -> None:
        self.exp, self.folder = exp, exp.run_dir
        create_run_folder(exp)
        self.console = Console()
        self._writer = SummaryWriter(str(self.folder / "tensorboard"))
        self._record = (self.folder / "metrics.jsonl").open("w", encoding="utf-8")
        self._start = time.perf_counter()
        (self.folder / "config.json").write_text(exp.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        print(text, flush=True)

    def round(
        self, number: int, metrics: Mapping[str, Any], seconds: Mapping[str, float], utilisation_LE: Tensor | None
    ) -> None:
        """Record one round; number 0 is the state before training.

        Args:
            number: 0 to rounds.
            metrics: scalars by "group/name", the same on every run of the same seed and layout.
            seconds: wall times by name, kept apart from the metrics because they never repeat.
            utilisation_LE: global utilisation of the round.
        """
        self._record.write(json.dumps({"round": number, "metrics": dict(metrics), "seconds": dict(seconds)}) + "\n")
        self._record.flush()
        for name, value in (*metrics.items(), *seconds.items()):
            self._writer.add_scalar(name, value, number)
        if utilisation_LE is not None:
            self._writer.add_image("utilisation/layer_by_expert", heat_map(utilisation_LE), number)
        self._writer.flush()
        self.say(self._progress(number, metrics, seconds))

    def refused(self, number: int, units: Mapping[str, Sequence[str]]) -> None:
        """Name the units of which a client's update held NaN or Inf.

        Args:
            number: of the round.
            units: names of units by client.
        """
        for client, names in units.items():
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            self.say(f"warning: round {number}: NaN or Inf from client {client!r} refused in {shown}")
            self._writer.add_text(f"refused/{client}", ", ".join(names), number)

    def finish(self, rows: list[dict[str, Any]], totals: Mapping[str, Any]) -> None:
        """Write `summary.json` and print it as a table."""
        summary = {"clients": rows, **totals}
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        self._record.close()
        self._writer.close()
        self.console.print(summary_table(rows, totals))
        self.say(f"written to {self.folder}; tensorboard --logdir {self.folder}")

    def _progress(self, number: int, metrics: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
        loss, accuracy = metrics.get("eval/loss"), metrics.get("eval/accuracy")
        state = (
            f"eval loss {loss:.4f}  accuracy {100 * accuracy:5.1f} %"
            if loss is not None and accuracy is not None
            else "not evaluated"
        )
        if number == 0:
            self._start = time.perf_counter()  # set-up does not count towards the ETA
            return f"before       {state}"
        elapsed = time.perf_counter() - self._start
        left = elapsed / number * (self.exp.train.rounds - number)
        return (
            f"round {number:3d}/{self.exp.train.rounds}  {state}  train loss {metrics['train/loss']:.4f}  "
            f"{metrics['exchange/megabytes']:.1f} MB  {seconds['seconds/round']:.1f} s  ETA {_clock(left)}"
        )


def heat_map(value_LE: Tensor) -> Tensor:
    """[3, L * CELL, E * CELL] picture of a matrix, dark = 0, bright = its largest value."""
    value = value_LE.numpy()
    scaled = value / max(float(value.max()), 1e-12) * (len(HEAT) - 1)
    low = np.clip(scaled.astype(int), 0, len(HEAT) - 2)
    part = (scaled - low)[..., None]
    colour = HEAT[low] * (1 - part) + HEAT[low + 1] * part
    return torch.from_numpy(np.kron(colour, np.ones((CELL, CELL, 1)))).permute(2, 0, 1).float()


def summary_table(rows: list[dict[str, Any]], totals: Mapping[str, Any]) -> Table:
    """The end of a run at a glance."""
    before, after = totals["utilisation_cv_before"], totals["utilisation_cv_after"]
    table = Table(title=f"utilisation CV {before:.3f} -> {after:.3f}", title_justify="left")
    for heading in ("client", "K", "rank", "FLOPs %", "step time %", "loss", "accuracy %"):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for row in rows:
        table.add_row(
            row["client"],
            str(row["k"]),
            str(row["lora_rank"]),
            f"{100 * row['flops_ratio']:.1f}",
            f"{100 * row['step_time_ratio']:.1f}",
            f"{row['loss_before']:.4f} -> {row['loss_after']:.4f}",
            f"{100 * row['accuracy_before']:.1f} -> {100 * row['accuracy_after']:.1f}",
        )
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
