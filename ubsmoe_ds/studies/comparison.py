"""From the folders of finished runs to tables and pictures; `launch/compare.py` runs the jobs and writes the files.

A run is known by its method (a preset or an ablation, methods.py) and its seed. Clients of equal budget are averaged
within a run, before mean and sample standard deviation are taken over the seeds. Nothing here imports torch.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.methods import ABLATIONS, with_preset
from ubsmoe_ds.data.fingerprint import data_digest, machine, model_digest
from ubsmoe_ds.launching.run_folder import checkpoints

BASELINES = ("topk", "ub_smoe")  # what paired differences are taken against
# columns of a round, and what `metrics.jsonl` calls them
OF_ROUND = {
    "loss": "eval/loss",
    "accuracy": "eval/accuracy",
    "utilisation_cv": "eval/utilisation_cv",
    "training_utilisation_cv": "utilisation/cv",
}
# what is averaged over the clients of a budget
OF_BUDGET = ["loss", "accuracy", "accuracy_norm", "flops_ratio", "tokens_per_second", "seconds_per_step"]
# where a run is written, and how it is saved meanwhile, does not change what it is
NOT_COMPARED = ("name", "output", "overwrite", "checkpoint", "fault_tolerance", "min_clients")
READING = (  # of the tables
    "Mean ± sample standard deviation over the seeds, after the last round. Each seed has evaluation rows of its own, "
    "so the spread is in large part theirs; differences of methods are taken seed by seed, below. FLOPs % are of K_max "
    "experts at the whole LoRA rank. Tokens/s and s/step are wall time of local steps, measured while all clients of "
    "a run share the machine's cores: compare them within one table only."
)
MARKERS = "osD^vPX<>*hp"  # more of them than colours, so that colour and marker repeat together only after 60 lines
DODGE = 0.05  # between methods at one budget, in units of the distance between budgets


class Run(NamedTuple):
    """One run of a comparison; `exp.run_dir` is its folder."""

    method: str
    seed: int
    exp: Experiment


def is_finished(exp: Experiment) -> bool:
    """Whether the run's folder holds this very run, complete. `summary.json` is the last thing that a run writes.

    Args:
        exp: the experiment asked for. That the folder holds another run must not pass unseen.

    Raises:
        UserError: if a run of another config was finished there, or could be gone on with.
    """
    finished = isinstance(_read_mapping(exp.run_dir / "summary.json").get("clients"), list)
    if finished or checkpoints(exp):
        for key, recorded, asked in _changed_keys(exp):
            raise UserError(
                f"out: {exp.run_dir} holds {'a finished' if finished else 'an unfinished'} run with {key} "
                f"{recorded!r}, asked is {asked!r}; remove the folder or choose another --out"
            )
    return finished


def check_inputs(runs: Iterable[Run]) -> None:
    """That finished runs are of the weights and rows that are there now; runs that do not say are taken as they are.

    Raises:
        UserError: naming the first folder that is of others.
    """
    models: dict[Path, str] = {}
    rows: dict[str, str | None] = {}
    for run in runs:
        exp = run.exp
        summary = _read_mapping(exp.run_dir / "summary.json")
        if "model_digest" not in summary:
            continue
        key = f"{exp.data.model_dump_json()} {exp.seed}"
        if exp.model_dir not in models:
            models[exp.model_dir] = model_digest(exp.model_dir)
        if key not in rows:
            rows[key] = data_digest(exp)
        now = {"model_digest": models[exp.model_dir], "data_digest": rows[key]}
        for name, what in (("model_digest", "weights"), ("data_digest", "rows")):
            if now[name] is not None and now[name] != summary[name]:
                raise UserError(
                    f"out: {exp.run_dir} holds a finished run with other {what} than there are now; remove the folder "
                    "or choose another --out"
                )


def _changed_keys(exp: Experiment) -> list[tuple[str, Any, Any]]:
    """(key, recorded, asked) where the run in the experiment's folder was another one."""
    asked, recorded = _flat(exp.model_dump(mode="json")), _flat(_read_mapping(exp.run_dir / "config.json"))
    return [
        (key, recorded.get(key), asked.get(key))
        for key in dict.fromkeys([*asked, *recorded])
        if key.split(".")[0] not in NOT_COMPARED and asked.get(key) != recorded.get(key)
    ]


def departures(run: Run) -> list[str]:
    """Keys that the config or an override sets otherwise than what the run's label stands for, so that a table says it.

    Args:
        run: of a method or an ablation, see methods.py.
    """
    meant = _flat(with_preset(ABLATIONS.get(run.method, {"method": run.method})))
    found = _flat(run.exp.model_dump(mode="json"))
    return [f"{key}={found[key]} (not {value})" for key, value in meant.items() if found[key] != value]


def _read_mapping(path: Path) -> dict[str, Any]:
    """A JSON object; empty if it is missing or was never completed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """A nested config as `key.0.sub: value`; an empty section stays as it is."""
    if not isinstance(value, dict | list) or not value:
        return {key: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for name, sub in items for k, v in _flat(sub, f"{key}.{name}" if key else str(name)).items()}


def collect(runs: Iterable[Run]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read finished runs.

    Returns:
        One row per method, seed and client, NaN where it was lost for good; and one per method, seed and round. There
        loss, accuracy and utilisation_cv are of the evaluation rows and NaN where a round was not evaluated;
        training_utilisation_cv is of the round's local steps and NaN in round 0, the state before them.

    Raises:
        UserError: naming the folder of a run whose files are damaged.
    """
    clients: list[dict[str, Any]] = []
    rounds: list[dict[str, Any]] = []
    for run in runs:
        folder = run.exp.run_dir
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            records = [json.loads(line) for line in lines]
            clients += _client_rows(run, summary, records)
            rounds += _round_rows(run, records)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"out: {folder} is damaged ({type(error).__name__}: {error}); remove the folder and start again"
            ) from error
    return pd.DataFrame(clients), pd.DataFrame(rounds)


def _client_rows(run: Run, summary: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    of_client = {row["client"]: row for row in summary["clients"]}
    trained = [record for record in records if record["round"] > 0]  # round 0 is the state before training
    at_end = records[-1]["metrics"]
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
            continue  # has no end, so NaN
        end = of_client[client.name]
        row |= {
            "loss_before": _number(end["loss_before"]),
            "loss": _number(end["loss_after"]),
            "accuracy_before": _number(end["accuracy_before"]),
            "accuracy": _number(end["accuracy_after"]),
            "accuracy_norm": _number(at_end[f"eval_{view}/accuracy_norm_all"]),
            "flops_ratio": end["flops_ratio"],
            "tokens_per_second": _number(end.get("tokens_per_second")),  # runs of older versions have none
            "seconds_per_step": _number(end.get("seconds_per_step")),
            # a client that was lost for some rounds and came back sent nothing in these
            "megabytes_sent": sum(record["metrics"].get(f"megabytes_sent/{client.name}", 0.0) for record in trained),
            "local_seconds": sum(record["seconds"].get(f"seconds_local/{client.name}", 0.0) for record in trained),
        }
    return rows


def _round_rows(run: Run, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "method": run.method,
            "seed": run.seed,
            "round": record["round"],
        }
        | {column: _number(record["metrics"].get(name)) for column, name in OF_ROUND.items()}
        for record in records
    ]


def _number(value: float | None) -> float:
    """NaN for null, JSON's only word for it."""
    return math.nan if value is None else value


def by_budget(clients: pd.DataFrame) -> pd.DataFrame:
    """Mean and sample standard deviation over seeds; the latter is NaN for one seed.

    Args:
        clients: the first frame of `collect`.

    Returns:
        Index (method, budget); columns (one of OF_BUDGET; mean, std, or count: seeds whose clients all have an end).
    """
    return _of_seed(clients).groupby(["method", "budget"]).agg(["mean", "std", "count"])


def paired_differences(clients: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Loss of each method minus the baseline's of the same seed and budget: negative is better than the baseline.

    Returns:
        Index (method, budget), columns mean, std and count of the seeds that both have. The baseline is left out.
    """
    loss = _of_seed(clients)["loss"].unstack("method")
    difference = loss.drop(columns=baseline).sub(loss[baseline], axis="index").stack(future_stack=True)
    return difference.groupby(["method", "budget"]).agg(["mean", "std", "count"])


def _of_seed(clients: pd.DataFrame) -> pd.DataFrame:
    """One row per method, seed and budget, NaN if one of the budget's clients was lost: those left are not the same."""
    of_seed = clients.groupby(["method", "seed", "budget"])[OF_BUDGET]
    return of_seed.mean().where(of_seed.count() == of_seed.size().to_numpy()[:, None])


def markdown(clients: pd.DataFrame, headline: str) -> str:
    """What a person reads first.

    Args:
        clients: the first frame of `collect`.
        headline: the first line: command, machine, seeds.
    """
    parts = [headline, READING, _results(clients)]
    parts += ["Accuracy % by log-likelihood normalised by length:", _normalised(clients)]
    for baseline in BASELINES:
        if baseline in set(clients["method"]) and clients["method"].nunique() > 1:
            parts += [
                f"Loss minus the loss of `{baseline}`, paired by seed (negative is better than `{baseline}`):",
                _differences(clients, baseline),
            ]
    return "\n\n".join(parts) + "\n"


def _results(clients: pd.DataFrame) -> str:
    table = by_budget(clients)
    budgets, seeds = sorted(set(clients["budget"])), clients["seed"].nunique()
    of_run = clients.groupby(["method", "seed"]).agg({"megabytes_sent": "sum", "local_seconds": "max"})
    totals = of_run.groupby("method").mean()
    headings = ["method"]
    headings += [f"{field} β={budget:g}" for budget in budgets for field in ("loss", "accuracy %")]
    headings += [f"{what} β={budgets[0]:g}" for what in ("FLOPs %", "tokens/s (shared cores)", "s/step (shared cores)")]
    headings += ["MB sent", "local seconds, slowest client"]
    rows = []
    for method in dict.fromkeys(clients["method"]):
        row = [f"`{method}`"]
        for budget in budgets:
            found = table.loc[(method, budget)]
            row.append(_plus_minus(found["loss"], digits=4, of=seeds))
            row.append(_plus_minus(found["accuracy"], digits=1, of=seeds, scale=100))
        poorest = table.loc[(method, budgets[0])]
        row.append(_mean(poorest["flops_ratio"], digits=1, scale=100))
        row += [_mean(poorest["tokens_per_second"], digits=0), _mean(poorest["seconds_per_step"], digits=3)]
        row += [f"{totals.loc[method, 'megabytes_sent']:.1f}", f"{totals.loc[method, 'local_seconds']:.1f}"]
        rows.append(row)
    return _table(headings, rows)


def _normalised(clients: pd.DataFrame) -> str:
    table = by_budget(clients)["accuracy_norm"]
    budgets, seeds = sorted(set(clients["budget"])), clients["seed"].nunique()
    rows = [
        [
            f"`{method}`",
            *(_plus_minus(table.loc[(method, budget)], digits=1, of=seeds, scale=100) for budget in budgets),
        ]
        for method in dict.fromkeys(clients["method"])
    ]
    return _table(["method", *(f"β={budget:g}" for budget in budgets)], rows)


def _differences(clients: pd.DataFrame, baseline: str) -> str:
    table = paired_differences(clients, baseline)
    budgets, seeds = sorted(set(clients["budget"])), clients["seed"].nunique()
    rows = [
        [f"`{method}`", *(_plus_minus(table.loc[(method, budget)], digits=4, of=seeds, sign="+") for budget in budgets)]
        for method in dict.fromkeys(clients["method"])
        if method != baseline
    ]
    return _table(["method", *(f"β={budget:g}" for budget in budgets)], rows)


def _plus_minus(found: Mapping[str, float], digits: int, of: int, scale: float = 1.0, sign: str = "") -> str:
    """Mean and spread; of fewer seeds than `of`, how many they are."""
    if not found["count"]:
        return "-"
    spread = "" if pd.isna(found["std"]) else f" ± {scale * found['std']:.{digits}f}"  # one seed has no spread
    fewer = f" (n = {found['count']:.0f})" if found["count"] < of else ""
    return f"{scale * found['mean']:{sign}.{digits}f}{spread}{fewer}"


def _mean(found: Mapping[str, float], digits: int, scale: float = 1.0) -> str:
    return "-" if pd.isna(found["mean"]) else f"{scale * found['mean']:.{digits}f}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machines(runs: Iterable[Run]) -> str:
    """Where the runs were made, each machine once; of runs that do not say, where they are read."""
    found = [_read_mapping(run.exp.run_dir / "summary.json").get("machine") for run in runs]
    return "; ".join(dict.fromkeys(name or f"machine not recorded, table made on {machine()}" for name in found))


def picture(clients: pd.DataFrame, rounds: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Accuracy and loss by budget, loss and utilisation CV by round: one line a method, the legend beside them.

    Args:
        clients, rounds: the frames of `collect`.
        methods: which of them to draw, in the legend's order.
    """
    figure = Figure(figsize=(20, 4.8), layout="constrained")
    by_accuracy, by_end, by_loss, by_cv = figure.subplots(1, 4)
    at_end = by_budget(clients)
    _draw_by_budget(by_accuracy, at_end["accuracy"] * 100, methods, "accuracy %")
    _draw_by_budget(by_end, at_end["loss"], methods, "final loss")
    of_round = rounds.groupby(["method", "round"])[["loss", "training_utilisation_cv"]].mean()
    for axes, column, title in (
        (by_loss, "loss", "evaluation loss"),
        (by_cv, "training_utilisation_cv", "utilisation CV in training"),
    ):
        for place, method in enumerate(methods):
            line = of_round.loc[method, column].dropna()
            axes.plot(line.index, line.values, label=method, **_style(place))
        axes.set(title=f"{title}, mean over seeds", xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*by_loss.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_by_budget(axes: Axes, found: pd.DataFrame, methods: Sequence[str], title: str) -> None:
    """Budgets at equal distances, methods beside each other, so that error bars do not hide one another."""
    budgets = sorted(set(found.index.get_level_values("budget")))
    for place, method in enumerate(methods):
        line = found.loc[method].loc[budgets]
        x = [number + DODGE * (place - (len(methods) - 1) / 2) for number in range(len(budgets))]
        axes.errorbar(x, line["mean"], yerr=line["std"].fillna(0.0), label=method, capsize=2, **_style(place))
    axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axes.set(title=f"{title}, mean ± std over seeds", xlabel="budget of the client")
    axes.grid(alpha=0.3)


def _style(place: int) -> dict[str, Any]:
    """Colour, marker and dash of the line at this place of the legend."""
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a ListedColormap
    return {
        "color": colours[place % len(colours)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(colours) else "--",
        "markersize": 5,
        "linewidth": 1.2,
    }
