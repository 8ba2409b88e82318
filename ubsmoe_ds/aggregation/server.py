"""What an owner does with the clients' updates of its units: refuse, clip, merge, server optimiser, DMR's step, reply.

Updates arrive and replies leave as differences to what the client holds. Where a rule needs values (factor rules, DMR)
the owner keeps what each client holds. FLoRA's factors are values by themselves: its adapters start anew each round.

Shapes: C clients, L layers, E experts, U units of a segment, N elements of a segment, R LoRA rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation import dmr, rules
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.rules import ElementwiseRule, FactorRule, Factors
from ubsmoe_ds.aggregation.server_optimizer import ServerOptimizer
from ubsmoe_ds.aggregation.units import DMR_SUFFIX
from ubsmoe_ds.config.experiment import ELEMENTWISE_RULES, Experiment
from ubsmoe_ds.config.sections import MergeConfig


class Usage(NamedTuple):
    """How much clients used experts in a round; see statistics.py.

    used_CLE: share of the client's tokens that count for an expert in the merge (f of `activation`)
    utilisation_LE: global u
    """

    used_CLE: Tensor
    utilisation_LE: Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive units that are merged together: `kind` is "elementwise", "factors" (of one shape) or "phi"."""

    kind: str
    units: Sequence[Unit]

    def numel(self, rank: int) -> int:
        """Elements at a LoRA rank."""
        return sum(unit.size(rank) for unit in self.units)


class Server:
    """The aggregator's arithmetic and state; every rank has one for the units it owns.

    Args:
        exp: the experiment: rule, DMR and server optimiser.
        units: the owned units, in order.
        weights: w_c, summing to one.
    """

    def __init__(self, exp: Experiment, units: Sequence[Unit], weights: Sequence[float]) -> None:
        self.exp, self.config = exp, exp.merge
        self.weights = list(weights)
        self.weigh([1.0] * len(self.weights), [False] * len(self.weights))
        self.segments = _segments(units, exp.merge.rule in ELEMENTWISE_RULES)
        self.ranks = list(exp.lora_ranks)
        self._scaling = [exp.lora.alpha / rank for rank in self.ranks]  # of the modules: pruning does not change it
        self.optimizers = [ServerOptimizer(exp.merge) for _ in self.segments]
        self._held: list[list[Tensor]] = []  # per segment, what each client holds; empty where that is not needed
        self.refused: list[tuple[int, Unit]] = []  # (client, unit) of the latest merge

    def weigh(self, worked: Sequence[float], astray: Sequence[bool]) -> None:
        """Weights of the round, and u* over the clients whose utilisation counts.

        Args:
            worked: which part of its round each client did, 0 to 1; its weight is that part of w_c [ours].
            astray: whether a client sent NaN or Inf; neither its utilisation nor its K counts for DMR then.
        """
        weight_C = torch.tensor(self.weights, dtype=torch.float64) * torch.tensor(worked, dtype=torch.float64)
        self.weight_C = rules.shares(weight_C)
        heard_C = rules.shares(weight_C * ~torch.tensor(astray))
        active = [self.exp.active_experts(client) for client in self.exp.clients]
        self.target = dmr.target_utilisation(heard_C.tolist(), active, self.exp.num_experts)

    def start(self, values: Sequence[np.ndarray]) -> None:
        """Take note of what the clients hold: their values of the owned units, one array a client."""
        self._held = []
        for segment, part_C in zip(self.segments, self._split(values), strict=True):
            self._held.append([] if segment.kind == "elementwise" else [part.clone() for part in part_C])

    def merge(self, updates: Sequence[np.ndarray], usage: Usage, ranks: Sequence[int]) -> list[np.ndarray]:
        """One round; `self.ranks` is set to the new ones by the caller, once they hold everywhere.

        Args:
            updates: of the owned units, one fp32 array a client.
            usage: of this round.
            ranks: LoRA rank of each client from now on (pruning lowers it).

        Returns:
            What to add to what each client holds, one fp32 array a client; under FLoRA, for LoRA units, the stacked
            factors themselves. Clients that get the same share one array.
        """
        self.refused = []
        pieces: list[list[Tensor]] = [[] for _ in updates]
        for number, (segment, part_C) in enumerate(zip(self.segments, self._split(updates), strict=True)):
            weight_CU = self._weights(segment, part_C, usage)
            if segment.kind == "factors":
                reply_C = self._merge_factors(segment, part_C, weight_CU, self._held[number], ranks)
            else:
                merged_N = self._rule(segment)(torch.stack(part_C), self._of_elements(segment, weight_CU))
                reply_C = [self._finish(number, merged_N, weight_CU, usage)] * len(updates)
            for piece, reply in zip(pieces, reply_C, strict=True):
                piece.append(reply)
        if all(segment.kind != "factors" for segment in self.segments):
            return [_joined(pieces[0])] * len(updates)
        return [_joined(piece) for piece in pieces]

    @property
    def is_linear(self) -> bool:
        """Whether the merge is a weighted sum with weights that every rank knows, if nothing has to be refused."""
        return self.config.rule in ("fedavg", "activation") and self.config.clip_norm is None

    def shares(self, units: Sequence[Unit], usage: Usage, client: int) -> Tensor:
        """What a linear rule multiplies a client's update of each unit with, [U] fp32."""
        return rules.shares(unit_weights(self.config, self.weight_C, units, usage))[client].float()

    def merge_sum(self, merged: np.ndarray, usage: Usage) -> np.ndarray:
        """One round of a linear rule whose weighted sum has been formed on the way here.

        Args:
            merged: fp32, the sum over clients of shares times updates, of the owned units; see `shares`.
            usage: of this round.

        Returns:
            What every client adds to what it holds.
        """
        self.refused = []
        parts = torch.from_numpy(merged).split([segment.numel(self.ranks[0]) for segment in self.segments])
        deltas = []
        for number, (segment, merged_N) in enumerate(zip(self.segments, parts, strict=True)):
            weight_CU = unit_weights(self.config, self.weight_C, segment.units, usage)
            deltas.append(self._finish(number, merged_N, weight_CU, usage))
        return _joined(deltas)

    def _split(self, flat_C: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """[segment][client] views of the clients' arrays."""
        parts = [
            torch.from_numpy(flat).split([segment.numel(rank) for segment in self.segments])
            for flat, rank in zip(flat_C, self.ranks, strict=True)
        ]
        return [list(of_segment) for of_segment in zip(*parts, strict=True)]

    def _weights(self, segment: Segment, part_C: list[Tensor], usage: Usage) -> Tensor:
        """Weight of each client for each unit, [C, U]. Updates are refused (weight 0, zeroed) and clipped in place."""
        weight_CU = unit_weights(self.config, self.weight_C, segment.units, usage)
        for client, (part, rank) in enumerate(zip(part_C, self.ranks, strict=True)):
            sizes = [unit.size(rank) for unit in segment.units]
            if not torch.isfinite(part).all():
                for u, piece in enumerate(part.split(sizes)):
                    if not torch.isfinite(piece).all():
                        piece.zero_()
                        weight_CU[client, u] = 0
                        self.refused.append((client, segment.units[u]))
            if self.config.clip_norm is not None and segment.kind != "phi":
                norm_U = torch.stack([piece.norm() for piece in part.split(sizes)])
                factor_U = rules.clip_factors(norm_U, self.config.clip_norm)
                part *= factor_U.repeat_interleave(torch.tensor(sizes))
        return weight_CU

    def _rule(self, segment: Segment) -> ElementwiseRule:
        """Activation differs from FedAvg by its weights alone; phi is no weight of the model and always averaged."""
        named: dict[str, ElementwiseRule] = {
            "median": rules.coordinate_median,
            "trimmed_mean": partial(rules.trimmed_mean, trim=self.config.trim),
        }
        return rules.fedavg if segment.kind == "phi" else named.get(self.config.rule, rules.fedavg)

    def _of_elements(self, segment: Segment, weight_CU: Tensor) -> Tensor:
        """[C, 1] where all units have the same weights, else [C, N]."""
        if (weight_CU == weight_CU[:, :1]).all():
            return weight_CU[:, :1]
        sizes = torch.tensor([unit.size(self.ranks[0]) for unit in segment.units])
        return weight_CU.repeat_interleave(sizes, dim=1)

    def _finish(self, number: int, merged_N: Tensor, weight_CU: Tensor, usage: Usage) -> Tensor:
        """DMR's step, or the server optimiser's; the difference that every client gets, [N]."""
        segment = self.segments[number]
        # a unit of which nobody sent anything keeps its value
        heard_N = self._of_elements(segment, (weight_CU > 0).any(dim=0, keepdim=True)).squeeze(0)
        if segment.kind == "phi":
            return self._step_phi(segment, merged_N, heard_N, self._held[number], usage)
        return self.optimizers[number].step(merged_N, heard_N) * heard_N

    def _step_phi(
        self, segment: Segment, mean_N: Tensor, heard_N: Tensor, held_C: list[Tensor], usage: Usage
    ) -> Tensor:
        """DMR's server step on phibar = held + mean update; none where no client's utilisation counts."""
        if self.target == 0:
            return torch.zeros_like(mean_N)
        config, new = self.exp.dmr, []
        for unit, phi_E in zip(segment.units, (held_C[0] + mean_N).split(self.exp.num_experts), strict=True):
            utilisation_E = usage.utilisation_LE[unit.layer].float()
            new.append(dmr.server_step(phi_E, utilisation_E, self.target, config.zeta, config.eps))
        delta_N = self._rounded(torch.cat(new) - held_C[0]) * heard_N
        for held in held_C:
            held += delta_N
        return delta_N

    def _merge_factors(
        self, segment: Segment, part_C: list[Tensor], weight_CU: Tensor, held_C: list[Tensor], ranks: Sequence[int]
    ) -> list[Tensor]:
        """Each client's difference at its new rank; under FLoRA the stack."""
        shape = segment.units[0].lora
        assert shape is not None
        named: dict[str, FactorRule] = {
            "zero_pad": rules.zero_pad,
            "hetlora": rules.hetlora,
            "flexlora": rules.flexlora,
            "florist": partial(rules.florist, energy=self.config.energy),
            "flora": rules.flora,
        }
        scaled = [
            _scaled(_factors(held + part, rank, shape), scaling)
            for held, part, rank, scaling in zip(held_C, part_C, self.ranks, self._scaling, strict=True)
        ]
        whole = named[self.config.rule](scaled, weight_CU)
        if self.config.rule == "flora":
            return [_flat(whole)] * len(part_C)
        heard_U11 = (weight_CU > 0).any(dim=0)[:, None, None]
        replies = []
        for client, (scaling, old_rank, rank) in enumerate(zip(self._scaling, self.ranks, ranks, strict=True)):
            kept = rules.resize(_factors(held_C[client], old_rank, shape), rank)
            new = _scaled(rules.resize(whole, rank), 1 / scaling)
            new = Factors(*(torch.where(heard_U11, n, k) for n, k in zip(new, kept, strict=True)))
            delta_N = self._rounded(_flat(new) - _flat(kept))
            held_C[client] = _flat(kept) + delta_N
            replies.append(delta_N)
        return replies

    def _rounded(self, delta: Tensor) -> Tensor:
        """As the client will receive it, so that both go on from the same value."""
        return delta.bfloat16().float() if self.config.payload == "bf16" else delta


def unit_weights(config: MergeConfig, weight_C: Tensor, units: Sequence[Unit], usage: Usage) -> Tensor:
    """Weight of each client for each unit before anything is refused, [C, U] fp64."""
    weight_CU = weight_C.unsqueeze(1).repeat(1, len(units))
    of_expert = [(u, unit.layer, unit.expert) for u, unit in enumerate(units) if unit.expert is not None]
    if config.rule == "activation" and of_expert:
        place, layer, expert = (list(part) for part in zip(*of_expert, strict=True))
        weight_CU[:, place] = rules.activation_weight(weight_C, usage.used_CLE[:, layer, expert], config.temperature)
    return weight_CU


def _segments(units: Sequence[Unit], elementwise: bool) -> list[Segment]:
    """Units in their order, joined where they can be merged together."""

    def key(unit: Unit) -> tuple:
        if unit.name.endswith(DMR_SUFFIX):
            return ("phi",)
        return ("elementwise",) if elementwise or unit.lora is None else ("factors", unit.lora)

    groups: list[tuple[tuple, list[Unit]]] = []
    for unit in units:
        if groups and groups[-1][0] == key(unit):
            groups[-1][1].append(unit)
        else:
            groups.append((key(unit), [unit]))
    return [Segment(kind[0], members) for kind, members in groups]


def _factors(flat_N: Tensor, rank: int, shape: tuple[int, int]) -> Factors:
    """Units as they travel: each A [R, n], then B [m, R]."""
    m, n = shape
    A_UX, B_UX = flat_N.view(-1, rank * (m + n)).split([rank * n, rank * m], dim=1)
    return Factors(A_UX.reshape(-1, rank, n), B_UX.reshape(-1, m, rank))


def _flat(factors: Factors) -> Tensor:
    """The way back."""
    return torch.cat([factors.A_URn.flatten(1), factors.B_UmR.flatten(1)], dim=1).reshape(-1)


def _scaled(factors: Factors, scaling: float) -> Factors:
    """alpha / r multiplied into B, or taken out again."""
    return Factors(factors.A_URn, factors.B_UmR * scaling)


def _joined(pieces: list[Tensor]) -> np.ndarray:
    """Of an owner without units: nothing."""
    if len(pieces) == 1:
        return np.ascontiguousarray(pieces[0].numpy(), dtype=np.float32)
    return torch.cat(pieces).float().numpy() if pieces else np.empty(0, dtype=np.float32)
