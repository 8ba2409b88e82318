"""Write the fidelity report as Markdown and as a picture."""

import platform

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.studies.markdown import markdown_table

GROUPS = {"never": "experts that no token of the batch activated", "some": "experts that some token activated"}


def markdown(table: pd.DataFrame, bias: pd.DataFrame, command: str, exp: Experiment) -> str:
    """Return cosine and size by layer, group and K, and the bias by K.

    Args:
        table, bias: see `fidelity.summary` and `fidelity.bias`.
        command: the command that was run.
        exp: the experiment it was run for.
    """
    parts = [
        "# Fidelity of pseudo-gradients",
        f"`{command}`  \n{exp.model.path}, {exp.num_experts} experts, seed {exp.seed}, rho {exp.pseudo_gradient.rho}; "
        f"torch {torch.__version__}, {platform.machine()}",
        "Cosine with the gradient of the dense model, and in brackets the size relative to it; mean over experts, then "
        "layer by layer. `none` is plain Top-K, `dense_oracle` runs all experts.",
    ]
    for group, meaning in GROUPS.items():
        of_group = table[(table.group == group) & (table.experts > 0)]
        parts.append(f"## {meaning[0].upper()}{meaning[1:]}")
        parts.append(_grid(of_group, sorted(table.k.unique())) if len(of_group) else "There were none.")
    parts.append("## Relative bias of the mean gradient (median over experts)")
    wide = bias.pivot(index="estimator", columns="k", values="bias").loc[bias.estimator.unique()]
    rows = [[name, *(f"{value:.3f}" for value in line)] for name, line in zip(wide.index, wide.values, strict=True)]
    parts.append(markdown_table(["estimator", *(f"K = {k}" for k in wide.columns)], rows))
    return "\n\n".join(parts)


def picture(table: pd.DataFrame, bias: pd.DataFrame) -> Figure:
    """Draw three panels over K: cosine of never and of sometimes active experts, and the bias."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, (group, meaning) in zip(panels, GROUPS.items(), strict=False):
        for estimator, of_one in table[(table.group == group) & (table.experts > 0)].groupby("estimator", sort=False):
            by_k = {k: np.average(rows.cosine, weights=rows.experts) for k, rows in of_one.groupby("k")}
            panel.plot(list(by_k), list(by_k.values()), label=estimator, marker="o")
            panel.plot(of_one.k, of_one.cosine, ".", color=panel.lines[-1].get_color(), alpha=0.4)  # layer by layer
        panel.set(title=meaning, xlabel="K active experts", ylabel="cosine with the dense gradient")
    for estimator, of_one in bias.groupby("estimator", sort=False):
        panels[2].plot(of_one.k, of_one.bias, marker="o", label=estimator)
    panels[2].set(title="bias of the mean gradient", xlabel="K active experts", ylabel="relative bias")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(table.k.unique()), [str(k) for k in sorted(table.k.unique())])
    panels[2].legend()
    return figure


def _grid(of_group: pd.DataFrame, ks: list[int]) -> str:
    """Return a row for each estimator and a column for each K; the figures of the layers end a cell."""
    rows = []
    for estimator, of_one in of_group.groupby("estimator", sort=False):
        cells = []
        for k in ks:
            at_k = of_one[of_one.k == k]
            layers = " ".join(f"{value:.2f}" for value in at_k.cosine)
            if not len(at_k):
                cells.append("-")
                continue
            mean, size = (np.average(at_k[column], weights=at_k.experts) for column in ("cosine", "size"))
            cells.append(f"{mean:.3f} ({size:.2f}); {layers}")
        rows.append([str(estimator), *cells])
    return markdown_table(["estimator", *(f"K = {k}" for k in ks)], rows)
