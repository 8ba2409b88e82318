"""Draw a comparison of methods. Imports no torch."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ubsmoe_ds.config.methods import ABLATIONS, PRESETS
from ubsmoe_ds.studies.comparison_table import by_budget

MARKERS = "osD^vPX<>*hp"  # more of them than colours, so that colour and marker repeat together only after 60 lines
OFFSET = 0.05  # between methods at one budget, in units of the distance between budgets


def picture(clients: pd.DataFrame, rounds: pd.DataFrame, methods: Sequence[str]) -> Figure:
    """Draw accuracy and loss by budget, loss and utilisation CV by round: a line per method, the legend beside them.

    Rows without choices have no accuracy to draw.

    Args:
        clients, rounds: the frames of `comparison_runs.collect`.
        methods: the methods to draw, in the legend's order.
    """
    figure = Figure(figsize=(20, 4.8), layout="constrained")
    final = by_budget(clients)
    has_choices = bool(clients["accuracy"].notna().any())
    *accuracy_axes, end_axes, loss_axes, cv_axes = figure.subplots(1, 4 if has_choices else 3)
    for axes in accuracy_axes:
        _draw_by_budget(axes, final["accuracy"] * 100, methods, "accuracy %")
    _draw_by_budget(end_axes, final["loss"], methods, "final loss")
    by_round = rounds.groupby(["method", "round"])[["loss", "training_utilisation_cv"]].mean()
    for axes, column, title in (
        (loss_axes, "loss", "evaluation loss"),
        (cv_axes, "training_utilisation_cv", "utilisation CV in training"),
    ):
        for method in methods:
            line = by_round.loc[method, column].dropna()
            axes.plot(line.index, line.values, label=method, **_style(method))
        axes.set(title=f"{title}, mean over seeds", xlabel="round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.legend(*loss_axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_by_budget(axes: Axes, figures: pd.DataFrame, methods: Sequence[str], title: str) -> None:
    """Draw budgets at equal distances, methods side by side so that error bars do not hide one another."""
    budgets = sorted(set(figures.index.get_level_values("budget")))
    for place, method in enumerate(methods):
        line = figures.loc[method].loc[budgets]
        x = [number + OFFSET * (place - (len(methods) - 1) / 2) for number in range(len(budgets))]
        axes.errorbar(x, line["mean"], yerr=line["std"].fillna(0.0), label=method, capsize=2, **_style(method))
    axes.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
    axes.set(title=f"{title}, mean ± std over seeds", xlabel="budget of the client")
    axes.grid(alpha=0.3)


def _style(method: str) -> dict[str, Any]:
    """Return colour, marker and dash of a method's line, the same in every picture."""
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]  # of a ListedColormap
    place = [*PRESETS, *ABLATIONS].index(method)
    # ablations are drawn beside ub_smoe and topk, whose colours come first
    colour = place if method in PRESETS else place + 2
    return {
        "color": colours[colour % len(colours)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": "-" if place < len(colours) else "--",
        "markersize": 5,
        "linewidth": 1.2,
    }
