"""Read the finished runs of a comparison and check that they are the ones asked for. Imports no torch.

A run is known by its method (a preset or an ablation, config/methods.py) and its seed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json
from ubsmoe_ds.config.differences import WITHOUT_EFFECT, Difference, differences, flatten
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.methods import ABLATIONS, with_preset
from ubsmoe_ds.data.fingerprint import data_digest, machine, model_digest
from ubsmoe_ds.federation.budgets import read_records
from ubsmoe_ds.launching.run_folder import checkpoints

# column of the rounds' frame -> name in `metrics.jsonl`
ROUND_COLUMNS = {
    "loss": "eval/loss",
    "accuracy": "eval/accuracy",
    "utilisation_cv": "eval/utilisation_cv",
    "training_utilisation_cv": "utilisation/cv",
}
# the same, where clients have evaluation rows of their own
FAIRNESS_COLUMNS = {"worst_tenth": "fairness/worst_tenth", "variance": "fairness/variance"}


class Run(NamedTuple):
    """One run of a comparison; `exp.run_dir` is its folder."""

    method: str
    seed: int
    exp: Experiment


def is_finished(exp: Experiment) -> bool:
    """Return whether the run's folder holds this run, complete. `summary.json` is the last file that a run writes.

    Raises:
        UserError: if the folder holds a run of another config, finished or with checkpoints to resume from.
    """
    finished = is_complete(exp.run_dir)
    difference = other_config(exp) if finished or checkpoints(exp.run_dir) else None
    if difference is not None:
        key, old, new = difference
        raise UserError(
            f"out: {exp.run_dir} holds {'a finished' if finished else 'an unfinished'} run with {key}={old!r}, but "
            f"this command asks for {new!r}; remove the folder or choose another --out"
        )
    return finished


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a finished run, of whatever config."""
    return isinstance(_read_object(folder / "summary.json").get("clients"), list)


def other_config(exp: Experiment) -> Difference | None:
    """Return the first key in which the run in the experiment's folder differs from it; None: it is this run."""
    recorded = _read_object(exp.run_dir / "config.json")
    may_differ = (*WITHOUT_EFFECT, "run_id")
    return next(iter(differences(recorded, exp.model_dump(mode="json"), may_differ)), None)


def check_inputs(runs: Iterable[Run]) -> None:
    """Check that finished runs used the weights and rows that exist now.

    Raises:
        UserError: naming the first folder with other weights or rows.
    """
    for run, meaning in other_inputs(runs):
        raise UserError(
            f"out: {run.exp.run_dir} holds a finished run with other {meaning} than there are now; remove the folder "
            "or choose another --out"
        )


def other_inputs(runs: Iterable[Run]) -> Iterator[tuple[Run, str]]:
    """Yield the finished runs that used others than exist now, with "weights" or "rows".

    A run that did not record its own passes.
    """
    models: dict[Path, str] = {}
    rows: dict[str, str | None] = {}
    for run in runs:
        exp = run.exp
        summary = _read_object(exp.run_dir / "summary.json")
        if "model_digest" not in summary:
            continue
        key = f"{exp.data.model_dump_json()} {exp.seed}"
        if exp.model_dir not in models:
            models[exp.model_dir] = model_digest(exp.weights_dir)
        if key not in rows:
            rows[key] = data_digest(exp)
        now = {"model_digest": models[exp.model_dir], "data_digest": rows[key]}
        for name, meaning in (("model_digest", "weights"), ("data_digest", "rows")):
            if now[name] is not None and now[name] != summary[name]:
                yield run, meaning


def departures(run: Run) -> list[str]:
    """Return the keys that config or overrides set otherwise than the run's label says, for a note under the table.

    Args:
        run: of a method or an ablation, see config/methods.py.
    """
    preset = flatten(with_preset(ABLATIONS.get(run.method, {"method": run.method})))
    actual = flatten(run.exp.model_dump(mode="json"))
    return [f"{key}={actual[key]} (not {value})" for key, value in preset.items() if actual[key] != value]


def machines(runs: Iterable[Run]) -> str:
    """Return the machines that runs were made on, each once; for a run that did not record its own, this machine."""
    names = [_read_object(run.exp.run_dir / "summary.json").get("machine") for run in runs]
    return "; ".join(dict.fromkeys(name or f"machine not recorded, table made on {machine()}" for name in names))


def collect(runs: Iterable[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read finished runs.

    Returns:
        clients: a row per method, seed and client; NaN for a client that was lost for good, and for the speed of one
            that took part in no round. `busy_seconds` are the local seconds of the busiest group where groups train
            clients in turn, else the client's.
        rounds: a row per method, seed and round. Loss, accuracy and utilisation_cv are measured on the evaluation rows,
            NaN where a round was not evaluated; training_utilisation_cv on the round's local steps, NaN in round 0,
            the state before them.

    Raises:
        UserError: naming the folder of a run whose files are damaged.
    """
    clients: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    for run in runs:
        folder = run.exp.run_dir
        try:
            summary = read_json(folder / "summary.json")
            records = read_records(run.exp, folder)
            clients += _client_rows(run, summary, records)
            rounds += _round_rows(run, records)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"out: {folder} is damaged ({type(error).__name__}: {error}); remove the folder and start again"
            ) from error
    return pd.DataFrame(clients), pd.DataFrame(rounds)


def _client_rows(run: Run, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    ends = {row["client"]: row for row in summary["clients"]}
    trained = [record for record in records if record["round"] > 0]  # round 0 is the state before training
    last_metrics = records[-1]["metrics"]
    busiest = max((_local_seconds(trained, group.name) for group in run.exp.groups or []), default=None)
    rows = []
    for client, view in zip(run.exp.clients, run.exp.views, strict=True):
        row = {
            "method": run.method,
            "seed": run.seed,
            "client": client.name,
            "budget": client.budget,
            "k": run.exp.active_experts(client),
            "lora_rank": run.exp.lora_rank(client),
        }
        rows.append(row)
        if client.name in summary.get("lost_in_round", {}):
            continue  # it has no final figures; pandas fills in NaN
        end = ends[client.name]
        row |= {
            "loss_before": _number(end["loss_before"]),
            "loss": _number(end["loss_after"]),
            "accuracy_before": _number(end.get("accuracy_before")),
            "accuracy": _number(end.get("accuracy_after")),
            "accuracy_norm": math.nan,
            "flops_ratio": end["flops_ratio"],
            "tokens_per_second": _number(end.get("tokens_per_second")),  # runs of older versions have none
            "seconds_per_step": _number(end.get("seconds_per_step")),
            # a client that was lost for some rounds and rejoined sent nothing in these
            "megabytes_sent": sum(record["metrics"].get(f"megabytes_sent/{client.name}", 0.0) for record in trained),
            "local_seconds": _local_seconds(trained, client.name),
        }
        row["busy_seconds"] = row["local_seconds"] if busiest is None else busiest
        if "accuracy_after" in end and client.eval_source is None:  # rows without choices have none
            row["accuracy_norm"] = _number(last_metrics[f"eval_{view}/accuracy_norm_all"])
    return rows


def _local_seconds(trained: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the seconds of local steps of a client or group in all rounds."""
    return sum(record["seconds"].get(f"seconds_local/{name}", 0.0) for record in trained)


def _round_rows(run: Run, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"method": run.method, "seed": run.seed, "round": record["round"]}
        | {column: _number(record["metrics"].get(name)) for column, name in ROUND_COLUMNS.items()}
        | {column: record["metrics"][name] for column, name in FAIRNESS_COLUMNS.items() if name in record["metrics"]}
        for record in records
    ]


def _number(value: float | None) -> float:
    """Return NaN for null, which is how JSON records it."""
    return math.nan if value is None else value


def _read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if the file is missing or was never completed."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
