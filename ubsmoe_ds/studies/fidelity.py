"""How near each pseudo-gradient estimator comes to the gradient of a dense model, expert by expert.

The yardstick is the gradient of the same model with all M experts active, weighted by the router's softmax. Against it
stand the real gradient at K experts alone (`none`) and completed by each estimator. A bias that grows as K falls is
what the paper's Corollary 1 says of plain Top-K routing (arXiv 2605.16690).

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
from ubsmoe_ds.moe.pseudo_gradient import ESTIMATORS

COMPARED = ("none", *ESTIMATORS)  # "none": the real gradient at K experts alone


class Measured(NamedTuple):
    """One batch: gradients of all experts, and which of them some token activated."""

    dense_LEP: Tensor
    completed_LEP: Tensor
    active_LE: Tensor


def measure(client: Client, batches: Iterator[StepBatch], k: int, estimators: Sequence[str], count: int) -> dict:
    """Gradients at K = k on `count` steps' rows; the client's weights stay as they are, its own collector is detached.

    Returns:
        {estimator: [Measured, one a step]}.
    """
    rho = client.exp.pseudo_gradient.rho
    scale = 1 - k / client.exp.num_experts if rho == "sparsity" else rho
    found: dict[str, list[Measured]] = {estimator: [] for estimator in estimators}
    collectors = {
        e: None if e == "none" else PseudoGradientCollector(client.model.layers, e, scale) for e in estimators
    }
    if client.collector is not None:
        client.collector.detach()
    for _ in range(count):
        batch = next(batches)
        dense_LEP, _ = _gradients(client, batch, client.exp.num_experts, None)
        for estimator, collector in collectors.items():
            completed_LEP, active_LE = _gradients(client, batch, k, collector)
            found[estimator].append(Measured(dense_LEP, completed_LEP, active_LE))
    return found


def summary(measured: dict[str, list[Measured]], k: int) -> pd.DataFrame:
    """One row for each estimator, layer and group of experts ("never" or "some" of a batch's tokens activated them).

    Columns: k, estimator, layer, group, experts (how many, over all batches), cosine (mean; 0 for no gradient at all),
    size (median of ||completed|| / ||dense||).
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
    """Relative bias ||mean completed - mean dense|| / ||mean dense|| of each estimator, median over experts and layers.

    The mean is over batches, which is what is left of the error when noise averages out.
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
    """(gradients of the step's rows, completed by the collector, [L, E, P]; which experts were active, [L, E])."""
    layers = client.model.layers
    client.model.train()
    for layer in layers:
        layer.gate.k = k  # beyond N_p too: all experts is the yardstick
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
    found = []
    for layer in layers:
        parts = [p for pair in layer.experts.factors().values() for p in pair]
        whole = [p.grad.float() + additions.get(id(p), 0.0) for p in parts if p.grad is not None]
        found.append(torch.cat([part.flatten(1) for part in whole], dim=1))
    active_LE = torch.stack([layer.gate.routed_E > 0 for layer in layers])
    client.model.zero_grad()
    return torch.stack(found).detach().cpu(), active_LE.cpu()
