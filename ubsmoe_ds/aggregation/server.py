"""Merge the units that a rank owns: refuse NaN and Inf, clip, merge, server optimiser, DMR's step, reply.

Updates and replies are differences to what the client holds. Where a rule needs values (factor rules; DMR, Dynamic
Modulated Routing) the owner keeps what each client holds; where clients take turns, all go on from one shared state of
the full LoRA rank. Under FLoRA the factors themselves are sent: adapters start anew each round.

Shapes: C clients of the round, L layers, E experts, U units of a segment, N elements of a segment, R LoRA rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ubsmoe_ds.aggregation import dmr, rules
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.rules import Factors
from ubsmoe_ds.aggregation.server_optimizer import ServerOptimizer
from ubsmoe_ds.client.finite import all_finite
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import MergeConfig

Refused = tuple[int, Unit]  # a client's place in the cohort, and a unit of which it sent NaN or Inf


class Usage(NamedTuple):
    """How much clients used experts in a round.

    routed_CLE: tokens that a client routed to an expert, divided by the client's tokens (f of `activation`), fp64.
    utilisation_LE: u, the mean over clients weighted by w_c, fp32.
    """

    routed_CLE: Tensor
    utilisation_LE: Tensor


@dataclass(frozen=True)
class Segment:
    """Consecutive units that are merged together: all "elementwise", all "factors" of one shape, or all "phi"."""

    kind: Literal["elementwise", "factors", "phi"]
    units: Sequence[Unit]

    def numel(self, lora_rank: int) -> int:
        """Return its elements at a LoRA rank."""
        return sum(unit.size(lora_rank) for unit in self.units)


class Server:
    """The arithmetic and state of the aggregator; every rank has one for the units that it owns.

    `lora_ranks`, the current LoRA rank of each client, is the one place where they are kept. The caller sets it to
    new ones (pruning lowers them) once all ranks have merged.

    Args:
        exp: the experiment: rule, DMR and server optimiser.
        units: the owned units, in order.
        weights: w_c of all clients, summing to one.
    """

    def __init__(self, exp: Experiment, units: Sequence[Unit], weights: Sequence[float]) -> None:
        self.exp, self.config, self.row = exp, exp.merge, exp.merge.row
        self.weights = list(weights)
        everybody = range(len(self.weights))
        self.weigh(everybody, [1.0] * len(everybody), [False] * len(everybody))
        self.segments = _segments(units, self.row.elementwise)
        self.lora_ranks = list(exp.lora_ranks)
        self._one_holder = exp.takes_turns
        ranks = [exp.lora.rank] if self._one_holder else self.lora_ranks
        self._scaling = [exp.lora_alpha(rank) / rank for rank in ranks]  # of the holders' modules: pruning keeps it
        self.optimizers = [ServerOptimizer(exp.merge) for _ in self.segments]
        self._held: list[list[Tensor]] = []  # per segment, what each client holds; empty where that is not needed
        self.refused: list[Refused] = []  # of the latest merge

    def weigh(self, cohort: Sequence[int], work: Sequence[float], nonfinite: Sequence[bool]) -> None:
        """Set the clients of the round and their weights, and u* over those whose utilisation counts.

        Args:
            cohort: numbers of the clients of the round, in the order of all that follows.
            work: part of the round's work that each of them did, 0 to 1; its weight is that part of w_c [ours].
            nonfinite: whether each sent NaN or Inf; then neither its utilisation nor its K counts for DMR.
        """
        self.cohort = list(cohort)
        weights = [self.weights[client] for client in cohort]
        weight_C = torch.tensor(weights, dtype=torch.float64) * torch.tensor(work, dtype=torch.float64)
        self.weight_C, self.weight = rules.shares(weight_C), float(weight_C.sum())
        counted_C = rules.shares(weight_C * ~torch.tensor(nonfinite))
        active = [self.exp.active_experts(self.exp.clients[client]) for client in cohort]
        self.target = dmr.target_utilisation(counted_C.tolist(), active, self.exp.num_experts)

    def start(self, values: Sequence[np.ndarray]) -> None:
        """Record the holders' values of the owned units, one array each: the clients, or the first group for all."""
        self._held = []
        values = values[:1] if self._one_holder else values
        for segment, part_C in zip(self.segments, self._split(values), strict=True):
            self._held.append([] if segment.kind == "elementwise" else [part.clone() for part in part_C])

    def merge(self, updates: Sequence[np.ndarray], usage: Usage, new_ranks: Sequence[int]) -> list[np.ndarray]:
        """Merge one round.

        Args:
            updates: updates of the owned units, one fp32 array a client of the round, at the holders' LoRA ranks.
            usage: how much clients used experts in this round.
            new_ranks: LoRA rank of each client of the round from now on.

        Returns:
            The difference that each holder adds to what it holds, one fp32 array each; under FLoRA, for LoRA units,
            the stacked factors themselves. Holders that get the same share one array.
        """
        self.refused = []
        holders = 1 if self._one_holder else len(updates)
        pieces: list[list[Tensor]] = [[] for _ in range(holders)]
        for number, (segment, part_C) in enumerate(zip(self.segments, self._split(updates), strict=True)):
            weight_CU = self._refuse_and_clip(segment, part_C, usage)
            if segment.kind == "factors":
                replies = self._merge_factors(segment, part_C, weight_CU, self._held[number], new_ranks)
            else:
                merged_N = self._merge_elements(segment, part_C, weight_CU)
                replies = [self._finish(number, merged_N, weight_CU, usage)] * holders
            for piece, reply in zip(pieces, replies, strict=True):
                piece.append(reply)
        if all(segment.kind != "factors" for segment in self.segments):
            return [_joined(pieces[0])] * holders
        return [_joined(piece) for piece in pieces]

    def unit_weights(self, units: Sequence[Unit], usage: Usage, refused: Sequence[Refused] = ()) -> Tensor:
        """Return the weight of each client of the round for each unit under a linear rule, [C, U] fp64.

        Args:
            units: the units.
            usage: how much clients used experts in this round.
            refused: what counts for nothing.
        """
        weight_CU = unit_weights(self.config, self.weight_C, units, usage)
        place = {unit.name: u for u, unit in enumerate(units)} if refused else {}
        for client, unit in refused:
            if unit.name in place:
                weight_CU[client, place[unit.name]] = 0
        return weight_CU

    def merge_sum(self, sum_N: np.ndarray, usage: Usage, refused: Sequence[Refused] = ()) -> np.ndarray:
        """Finish one round of a linear rule whose weighted sum was formed in transit.

        Args:
            sum_N: sum over clients of shares times updates of the owned units, fp32; shares are `unit_weights` over
                their sum over the clients.
            usage: how much clients used experts in this round.
            refused: updates that the sum leaves out.

        Returns:
            The difference that every client adds to what it holds.
        """
        self.refused = list(refused)
        rank = self._held_ranks[0]
        parts = torch.from_numpy(sum_N).split([segment.numel(rank) for segment in self.segments])
        deltas = []
        for number, (segment, merged_N) in enumerate(zip(self.segments, parts, strict=True)):
            weight_CU = self.unit_weights(segment.units, usage, refused)
            deltas.append(self._finish(number, merged_N, weight_CU, usage))
        return _joined(deltas)

    @property
    def unit_rank(self) -> int:
        """Return the LoRA rank of what travels, where it is the same for all."""
        return self.exp.lora.rank if self._one_holder else self.lora_ranks[0]

    @property
    def _held_ranks(self) -> list[int]:
        """Return the LoRA rank of what each client of the round sends: the full one where all have one shared state."""
        return [self.exp.lora.rank if self._one_holder else self.lora_ranks[client] for client in self.cohort]

    def _split(self, flat_C: Sequence[np.ndarray]) -> list[list[Tensor]]:
        """Return [segment][client] slices of the clients' arrays, which share their memory."""
        parts = [
            torch.from_numpy(flat).split([segment.numel(rank) for segment in self.segments])
            for flat, rank in zip(flat_C, self._held_ranks, strict=not self._one_holder)
        ]
        return [list(of_segment) for of_segment in zip(*parts, strict=True)]

    def _refuse_and_clip(self, segment: Segment, part_C: list[Tensor], usage: Usage) -> Tensor:
        """Return the weight of each client for each unit, [C, U].

        An update with NaN or Inf gets weight 0 and is zeroed; others are clipped; both in place.
        """
        weight_CU = unit_weights(self.config, self.weight_C, segment.units, usage)
        for client, (part, rank) in enumerate(zip(part_C, self._held_ranks, strict=True)):
            sizes = [unit.size(rank) for unit in segment.units]
            if not all_finite(part):
                for u, piece in enumerate(part.split(sizes)):
                    if not all_finite(piece):
                        piece.zero_()
                        weight_CU[client, u] = 0
                        self.refused.append((client, segment.units[u]))
            if self.config.clip_norm is not None and segment.kind != "phi":
                norm_U = torch.stack([piece.norm() for piece in part.split(sizes)])
                factor_U = rules.clip_factors(norm_U, self.config.clip_norm)
                part *= factor_U.repeat_interleave(torch.tensor(sizes))
        return weight_CU

    def _merge_elements(self, segment: Segment, part_C: list[Tensor], weight_CU: Tensor) -> Tensor:
        """Merge updates element by element, [N]. phi and the router under factor rules are averaged."""
        use_rule = self.row.elementwise and segment.kind != "phi"
        function = self._function() if use_rule else rules.fedavg
        return function(torch.stack(part_C), self._of_elements(segment, weight_CU))

    def _function(self) -> partial:
        """Return the rule's function with its options bound."""
        options = {key: getattr(self.config, key) for key in self.row.options}
        return partial(getattr(rules, self.row.function), **options)

    def _of_elements(self, segment: Segment, weight_CU: Tensor) -> Tensor:
        """Return [C, 1] where all units have the same weights, else [C, N]."""
        if (weight_CU == weight_CU[:, :1]).all():
            return weight_CU[:, :1]
        sizes = torch.tensor([unit.size(self._held_ranks[0]) for unit in segment.units])
        return weight_CU.repeat_interleave(sizes, dim=1)

    def _finish(self, number: int, merged_N: Tensor, weight_CU: Tensor, usage: Usage) -> Tensor:
        """Take DMR's step or the server optimiser's; return the difference that every client gets, [N]."""
        segment = self.segments[number]
        # a unit that nobody sent anything of keeps its value
        sent_N = self._of_elements(segment, (weight_CU > 0).any(dim=0, keepdim=True)).squeeze(0)
        if segment.kind == "phi":
            return self._step_phi(segment, merged_N, sent_N, self._held[number], usage)
        return self.optimizers[number].step(merged_N, sent_N) * sent_N

    def _step_phi(self, segment: Segment, mean_N: Tensor, sent_N: Tensor, held_C: list[Tensor], usage: Usage) -> Tensor:
        """Take DMR's server step on phibar = held + mean update; none where no client's utilisation counts."""
        if self.target == 0:
            return torch.zeros_like(mean_N)
        config, stepped = self.exp.dmr, []
        for unit, phi_E in zip(segment.units, (held_C[0] + mean_N).split(self.exp.num_experts), strict=True):
            utilisation_E = usage.utilisation_LE[unit.layer].float()
            stepped.append(dmr.server_step(phi_E, utilisation_E, self.target, config.zeta, config.eps))
        delta_N = self._as_received(torch.cat(stepped) - held_C[0]) * sent_N
        for held in held_C:
            held += delta_N
        return delta_N

    def _merge_factors(
        self, segment: Segment, part_C: list[Tensor], weight_CU: Tensor, held_C: list[Tensor], new_ranks: Sequence[int]
    ) -> list[Tensor]:
        """Return each holder's difference at its new LoRA rank; under FLoRA the stack."""
        shape = segment.units[0].lora
        assert shape is not None
        products, own_ranks = [], [self.lora_ranks[client] for client in self.cohort]
        for place, (part, held_rank, own_rank) in enumerate(zip(part_C, self._held_ranks, own_ranks, strict=True)):
            holder = 0 if self._one_holder else place
            whole = _factors(held_C[holder] + part, held_rank, shape)
            products.append(_scaled(rules.resize(whole, own_rank), self._scaling[holder]))
        merged = self._function()(products, weight_CU)
        if self.row.stacking:
            return [_flat(merged)] * len(held_C)
        sent_U11 = (weight_CU > 0).any(dim=0)[:, None, None]
        old_ranks, new_ranks = self._held_ranks, self._held_ranks if self._one_holder else new_ranks
        replies = []
        for holder, scaling in enumerate(self._scaling):
            held = rules.resize(_factors(held_C[holder], old_ranks[holder], shape), new_ranks[holder])
            target = _scaled(rules.resize(merged, new_ranks[holder]), 1 / scaling)
            if self._one_holder:
                target = self._beyond(merged, target, held)
            target = Factors(*(torch.where(sent_U11, t, h) for t, h in zip(target, held, strict=True)))
            delta_N = self._as_received(_flat(target) - _flat(held))
            held_C[holder] = _flat(held) + delta_N
            replies.append(delta_N)
        return replies

    def _beyond(self, merged: Factors, target: Factors, held: Factors) -> Factors:
        """Return the target with LoRA ranks that no client of the round has: they stay as they are held [ours].

        After a rule that turns the basis B is zero there, but A stays: with both zero no gradient would reach them.
        """
        first = merged.A_URn.shape[1]
        A_URn, B_UmR = target.A_URn.clone(), target.B_UmR.clone()
        A_URn[:, first:] = held.A_URn[:, first:]
        if not self.row.turns_basis:
            B_UmR[:, :, first:] = held.B_UmR[:, :, first:]
        return Factors(A_URn, B_UmR)

    def _as_received(self, delta: Tensor) -> Tensor:
        """Round as the payload does, so that owner and client go on from the same value."""
        return delta.bfloat16().float() if self.config.payload == "bf16" else delta


def unit_weights(config: MergeConfig, weight_C: Tensor, units: Sequence[Unit], usage: Usage) -> Tensor:
    """Return the weight of each client for each unit before anything is refused, [C, U] fp64."""
    weight_CU = weight_C.unsqueeze(1).repeat(1, len(units))
    weighed = units if config.row.by_utilisation else ()
    of_expert = [(u, unit.layer, unit.expert) for u, unit in enumerate(weighed) if unit.expert is not None]
    if of_expert:
        place, layer, expert = (list(part) for part in zip(*of_expert, strict=True))
        weight_CU[:, place] = rules.activation_weight(weight_C, usage.routed_CLE[:, layer, expert], config.temperature)
    return weight_CU


def _segments(units: Sequence[Unit], elementwise: bool) -> list[Segment]:
    """Join consecutive units that can be merged together."""

    def key(unit: Unit) -> tuple:
        if unit.kind == "phi":
            return ("phi",)
        return ("elementwise",) if elementwise or unit.lora is None else ("factors", unit.lora)

    groups: list[tuple[tuple, list[Unit]]] = []
    for unit in units:
        if groups and groups[-1][0] == key(unit):
            groups[-1][1].append(unit)
        else:
            groups.append((key(unit), [unit]))
    return [Segment(kind[0], members) for kind, members in groups]


def _factors(flat_N: Tensor, lora_rank: int, shape: tuple[int, int]) -> Factors:
    """Read units as they travel: of each unit A [R, n], then B [m, R]."""
    m, n = shape
    A_UX, B_UX = flat_N.view(-1, lora_rank * (m + n)).split([lora_rank * n, lora_rank * m], dim=1)
    return Factors(A_UX.reshape(-1, lora_rank, n), B_UX.reshape(-1, m, lora_rank))


def _flat(factors: Factors) -> Tensor:
    """Lay factors out as they travel; the inverse of `_factors`."""
    return torch.cat([factors.A_URn.flatten(1), factors.B_UmR.flatten(1)], dim=1).reshape(-1)


def _scaled(factors: Factors, scaling: float) -> Factors:
    """Multiply B, and so the product, by a number such as alpha / r."""
    return Factors(factors.A_URn, factors.B_UmR * scaling)


def _joined(pieces: list[Tensor]) -> np.ndarray:
    """Join fp32 pieces; an owner without units has none."""
    if len(pieces) == 1:
        return np.ascontiguousarray(pieces[0].numpy(), dtype=np.float32)
    return torch.cat(pieces).float().numpy() if pieces else np.empty(0, dtype=np.float32)
