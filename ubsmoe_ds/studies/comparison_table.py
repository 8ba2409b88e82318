"""Statistics over the seeds of a comparison, and its Markdown report. Imports no torch.

Clients of equal budget are averaged within a run, before mean and sample standard deviation are taken over the seeds.
`clients` and `rounds` are the frames of `comparison_runs.collect` throughout.
"""

from collections.abc import Mapping

import pandas as pd

from ubsmoe_ds.studies.markdown import markdown_table

BASELINES = ("topk", "ub_smoe")  # methods that paired differences are taken against
SPEED = ["tokens_per_second", "seconds_per_step"]
AVERAGED = ["loss", "accuracy", "accuracy_norm", "flops_ratio", *SPEED]
FAIRNESS = {"worst_tenth": "loss of the worst tenth", "variance": "variance of losses"}
READING_NOTE = (
    "Mean ± sample standard deviation over the seeds, after the last round. Each seed has evaluation rows of its own, "
    "so the spread is in large part theirs; differences of methods are taken seed by seed, below. FLOPs % are those of "
    "training, relative to K_max experts at the whole LoRA rank. Tokens/s and s/step are wall time of local steps, "
    "measured while all clients of a run share the machine's cores: compare them within one table only."
)


def by_budget(clients: pd.DataFrame) -> pd.DataFrame:
    """Return mean and sample standard deviation over seeds; the latter is NaN for one seed.

    Returns:
        Index (method, budget); columns (one of AVERAGED; mean, std, or count: seeds in which every client of the
        budget finished).
    """
    return _by_seed(clients).groupby(["method", "budget"]).agg(["mean", "std", "count"])


def paired_differences(clients: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Return each method's loss minus the baseline's of the same seed and budget: negative is better than the baseline.

    Returns:
        Index (method, budget), columns mean, std and count of the seeds that both have. The baseline is left out.
    """
    loss = _by_seed(clients)["loss"].unstack("method")
    difference = loss.drop(columns=baseline).sub(loss[baseline], axis="index").stack(future_stack=True)
    return difference.groupby(["method", "budget"]).agg(["mean", "std", "count"])


def _by_seed(clients: pd.DataFrame) -> pd.DataFrame:
    """Return a row per method, seed and budget.

    It is NaN if a client of the budget was lost: the mean over those left is not comparable with the other seeds. Speed
    is that of the clients that took part in some round.
    """
    groups = clients.groupby(["method", "seed", "budget"])[AVERAGED]
    whole = groups.count() == groups.size().to_numpy()[:, None]
    whole[SPEED] = whole[["loss"] * len(SPEED)].to_numpy()
    return groups.mean().where(whole)


def markdown(clients: pd.DataFrame, rounds: pd.DataFrame, headline: str) -> str:
    """Return the report.

    Args:
        clients, rounds: results.
        headline: the first line: command, machine, seeds.
    """
    parts = [headline, READING_NOTE, _results(clients)]
    if clients["accuracy_norm"].notna().any():
        parts += ["Accuracy % by log-likelihood normalised by length:", _normalised(clients)]
    if "variance" in rounds:
        parts += ["Fairness: losses of the clients with evaluation rows of their own, after the last round:"]
        parts += [_fairness(rounds)]
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
    by_run = clients.groupby(["method", "seed"]).agg({"megabytes_sent": "sum", "busy_seconds": "max"})
    totals = by_run.groupby("method").mean()
    headings = ["method"]
    fields = ("loss", "accuracy %") if _has_choices(clients) else ("loss",)
    headings += [f"{field} β={budget:g}" for budget in budgets for field in fields]
    costs = ("FLOPs %", "tokens/s (shared cores)", "s/step (shared cores)")
    headings += [f"{cost} β={budgets[0]:g}" for cost in costs]
    headings += ["MB sent", "local seconds, slowest client or group"]
    rows = []
    for method in dict.fromkeys(clients["method"]):
        row = [f"`{method}`"]
        for budget in budgets:
            figures = table.loc[(method, budget)]
            row.append(_plus_minus(figures["loss"], digits=4, of=seeds))
            if len(fields) > 1:
                row.append(_plus_minus(figures["accuracy"], digits=1, of=seeds, scale=100))
        poorest = table.loc[(method, budgets[0])]
        row.append(_mean(poorest["flops_ratio"], digits=1, scale=100))
        row += [_mean(poorest["tokens_per_second"], digits=0), _mean(poorest["seconds_per_step"], digits=3)]
        row += [f"{totals.loc[method, 'megabytes_sent']:.1f}", f"{totals.loc[method, 'busy_seconds']:.1f}"]
        rows.append(row)
    return markdown_table(headings, rows)


def _has_choices(clients: pd.DataFrame) -> bool:
    """Return whether some client was evaluated on rows with choices."""
    return bool(clients["accuracy"].notna().any())


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
    return markdown_table(["method", *(f"β={budget:g}" for budget in budgets)], rows)


def _fairness(rounds: pd.DataFrame) -> str:
    """Return the last evaluation's fairness of each method, mean and spread over the seeds."""
    last = rounds.dropna(subset=["variance"]).groupby(["method", "seed"])[list(FAIRNESS)].last()
    table, seeds = last.groupby("method").agg(["mean", "std", "count"]), rounds["seed"].nunique()
    rows = [
        [f"`{method}`", *(_plus_minus(table.loc[method, column], digits=4, of=seeds) for column in FAIRNESS)]
        for method in dict.fromkeys(rounds["method"])
        if method in table.index
    ]
    return markdown_table(["method", *FAIRNESS.values()], rows)


def _differences(clients: pd.DataFrame, baseline: str) -> str:
    table = paired_differences(clients, baseline)
    budgets, seeds = sorted(set(clients["budget"])), clients["seed"].nunique()
    rows = [
        [f"`{method}`", *(_plus_minus(table.loc[(method, budget)], digits=4, of=seeds, sign="+") for budget in budgets)]
        for method in dict.fromkeys(clients["method"])
        if method != baseline
    ]
    return markdown_table(["method", *(f"β={budget:g}" for budget in budgets)], rows)


def _plus_minus(figure: Mapping[str, float], digits: int, of: int, scale: float = 1.0, sign: str = "") -> str:
    """Return mean and spread as text, with the number of seeds where it is smaller than `of`."""
    if not figure["count"]:
        return "-"
    spread = "" if pd.isna(figure["std"]) else f" ± {scale * figure['std']:.{digits}f}"  # one seed has no spread
    fewer = f" (n = {figure['count']:.0f})" if figure["count"] < of else ""
    return f"{scale * figure['mean']:{sign}.{digits}f}{spread}{fewer}"


def _mean(figure: Mapping[str, float], digits: int, scale: float = 1.0) -> str:
    return "-" if pd.isna(figure["mean"]) else f"{scale * figure['mean']:.{digits}f}"
