"""Measure how close each pseudo-gradient (PG) estimator comes to the gradient of a dense model, expert by expert.

The reference is the gradient of the same model with all M experts active, weighted by the router's softmax. Compared
with it are the real gradient at K experts alone (`none`), and that gradient completed by each estimator. The paper's
Corollary 1 says that the bias of plain Top-K routing grows as K falls (arXiv 2605.16690).

Shapes: L layers, E experts, P elements of an expert's LoRA factors.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.data.batches import StepBatch
from ubsmoe_ds.moe.collector import PseudoGradientCollector
from ubsmoe_ds.moe.estimators import ESTIMATORS

COMPARED = ("none", *ESTIMATORS)  # "none": the real gradient at K experts alone


class Measured(NamedTuple):
    """One batch: gradients of all experts, and which of them some token activated."""

    dense_LEP: Tensor
    completed_LEP: Tensor
    active_LE: Tensor


def measure(client: Client, batches: Iterator[StepBatch], k: int, estimators: Sequence[str], count: int) -> dict:
    """Measure gradients at K = k on the rows of `count` steps.

    Pseudo-gradients have their full weight rho: `pseudo_gradient.scale` is left out, because the dense gradient has no
    such factor. The client's weights do not change; its own collector is detached.

    Returns:
        {estimator: [Measured, one per step]}.
    """
    configured = client.exp.pseudo_gradient.rho
    rho = 1 - k / client.exp.num_experts if configured == "sparsity" else configured
    measured: dict[str, list[Measured]] = {estimator: [] for estimator in estimators}
    collectors = {e: None if e == "none" else PseudoGradientCollector(client.model.layers, e, rho) for e in estimators}
    if client.collector is not None:
        client.collector.detach()
    for _ in range(count):
        batch = next(batches)
        dense_LEP, _ = _gradients(client, batch, client.exp.num_experts, None)
        for estimator, collector in collectors.items():
            completed_LEP, active_LE = _gradients(client, batch, k, collector)
            measured[estimator].append(Measured(dense_LEP, completed_LEP, active_LE))
    return measured


def summary(measured: dict[str, list[Measured]], k: int) -> pd.DataFrame:
    """Return a row for each estimator, layer and group of experts.

    The groups are "never" (no token of the batch activated the expert) and "some". Columns: k, estimator, layer, group,
    experts (their number, over all batches), cosine (mean; 0 where there is no gradient at all), size (median of
    ||completed|| / ||dense||).
    """
    rows = []
    for estimator, batches in measured.items():
        cosine_NLE = torch.stack([F.cosine_similarity(m.completed_LEP, m.dense_LEP, dim=-1) for m in batches])
        size_NLE = torch.stack(
            [m.completed_LEP.norm(dim=-1) / m.dense_LEP.norm(dim=-1).clamp_min(1e-12) for m in batches]
        )
        active_NLE = torch.stack([m.active_LE for m in batches])
        for layer in range(cosine_NLE.shape[1]):
            for group, chosen_NE in (("never", ~active_NLE[:, layer]), ("some", active_NLE[:, layer])):
                cosine, size = cosine_NLE[:, layer][chosen_NE], size_NLE[:, layer][chosen_NE]
                row: dict[str, object] = {
                    "k": k,
                    "estimator": estimator,
                    "layer": layer,
                    "group": group,
                    "experts": len(cosine),
                }
                if len(cosine):
                    row |= {"cosine": float(cosine.mean()), "size": float(size.quantile(0.5))}
                rows.append(row)
    return pd.DataFrame(rows)


def bias(measured: dict[str, list[Measured]], k: int) -> pd.DataFrame:
    """Return each estimator's relative bias ||mean completed - mean dense|| / ||mean dense||, median over experts.

    The median is over the experts of all layers, the mean over batches: bias is the error left when noise averages out.
    """
    rows = []
    for estimator, batches in measured.items():
        dense_LEP = torch.stack([m.dense_LEP for m in batches]).mean(0)
        completed_LEP = torch.stack([m.completed_LEP for m in batches]).mean(0)
        relative_LE = (completed_LEP - dense_LEP).norm(dim=-1) / dense_LEP.norm(dim=-1).clamp_min(1e-12)
        rows.append({"k": k, "estimator": estimator, "bias": float(relative_LE.median())})
    return pd.DataFrame(rows)


def _gradients(
    client: Client, batch: StepBatch, k: int, collector: PseudoGradientCollector | None
) -> tuple[Tensor, Tensor]:
    """Return (gradients of the step's rows, completed by the collector, [L, E, P]; active experts, [L, E] bool)."""
    layers = client.model.layers
    client.model.train()
    for layer in layers:
        layer.gate.k = k  # may exceed the candidates N_p: the reference activates all experts
        layer.gate.reset_counts()
    if collector is not None:
        collector.attach()
        collector.reset()
    client.model.zero_grad()
    answers = batch.answer_tokens
    for tokens in batch.micro:
        logits_AV = client.model(*tokens.to(client.device)[:3])
        (F.cross_entropy(logits_AV, tokens.target_A.to(client.device), reduction="sum") / answers).backward()
    additions = {}
    if collector is not None:
        additions = {id(p): gradient for p, gradient in collector.reduce()}
        collector.detach()
    gradients = []
    for layer in layers:
        parts = [p for pair in layer.experts.factors().values() for p in pair]
        whole = [p.grad.float() + additions.get(id(p), 0.0) for p in parts if p.grad is not None]
        gradients.append(torch.cat([part.flatten(1) for part in whole], dim=1))
    active_LE = torch.stack([layer.gate.routed_E > 0 for layer in layers])
    client.model.zero_grad()
    return torch.stack(gradients).detach().cpu(), active_LE.cpu()
