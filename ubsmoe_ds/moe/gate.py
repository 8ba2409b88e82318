"""The UB-SMoE gate: Dynamic Modulated Routing (DMR) for any K on top of DeepSpeed's `TopKGate`.

Shapes: T tokens, D model width, E experts, K experts per token, C slots per expert and rank, L layers.
Source: UB-SMoE, arXiv 2605.16690 [paper]; lines marked [ours] are our reading of its summaries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from deepspeed import comm as dist
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor, nn
from torch.nn import functional as F

from ubsmoe_ds.moe.router import Router


class Routing(NamedTuple):
    """A gate's decisions for a batch, detached; pseudo-gradients and statistics read them.

    p_TE: softmax of the modulated logits, or see `Router.weights_of_all`
    active_TE: chosen by the token, dropped or not (bool)
    index_KT: expert of each route, -1 where the route was dropped; location_KT: its slot; weight_KT: its gate weight
    used_T: False for padding; kept_E: number of each expert's routes that were not dropped
    """

    p_TE: Tensor
    active_TE: Tensor
    index_KT: Tensor
    location_KT: Tensor
    weight_KT: Tensor
    used_T: Tensor
    kept_E: Tensor


@dataclass(frozen=True)
class GateConfig:
    """Settings of a gate, the same in every layer of a client's model.

    k: active experts per token.
    candidates: N_p, how many of a token's strongest experts phi modulates; at least k.
    capacity_factor: an expert keeps at most ceil(U / E * capacity_factor * k) routes, U this rank's tokens without
        padding; None: every route is kept.
    min_capacity: least of these limits.
    phi_range: (phi_min, phi_max) of the penalty; None: no modulation, phi stays frozen at 0.
    modulate: "weights", or "selection" [ours]: phi only chooses, and p = softmax(s) weighs.
    learned_scale: whether the K weights are multiplied by a trainable scale of this layer and client, at first 1.
    """

    k: int
    candidates: int
    capacity_factor: float | None = None
    min_capacity: int = 4
    phi_range: tuple[float, float] | None = (-1.0, 1.0)
    modulate: str = "weights"
    learned_scale: bool = False


class UBSMoEGate(TopKGate):
    """Top-K gate with DMR: phi modulates the logits of a token's N_p strongest experts.

        s = W_r x (fp32);  m_i = s_i + phi_i for the N_p largest s_i, else s_i;  p = softmax(m);  top K of p  [paper]

    For routers of another form, see `Router`, s and m are the logits before softmax or sigmoid, the N_p and the K
    experts are the first in the router's own ranking, by which phi reaches the choice; so phi is in the same unit, a
    logit, for all models and learns through p [ours]. Biases of a router are the model's and not trained.

    Differences from the stock gate, for every K alike: no jitter and no sampling; weights are p itself, normalised
    over the K only if the model does so; a dropped route loses its weight and the others keep theirs [ours]; padding
    is not routed and does not count towards the capacity. When dropping, an expert keeps the routes of largest weight,
    before any normalisation over the K, as the stock policy "probs" does. Evaluation never drops.

    Args:
        hidden: D.
        num_experts: E.
        config: see `GateConfig`.
        router: the rule of the model's family.
        biased: whether logits have a bias, `bias_E`; zero until it is loaded, as is `correction_E`.
    """

    def __init__(
        self, hidden: int, num_experts: int, config: GateConfig, router: Router, *, biased: bool = False
    ) -> None:
        factor = config.capacity_factor
        super().__init__(
            hidden, num_experts, config.k, factor or 1.0, 1.0, config.min_capacity, drop_tokens=factor is not None
        )
        self.candidates, self.router = config.candidates, router
        self.phi_range, self.modulate = config.phi_range, config.modulate
        self.scale = nn.Parameter(torch.ones(1)) if config.learned_scale else None
        self.phi = nn.Parameter(torch.zeros(num_experts), requires_grad=config.phi_range is not None)
        self.routing: Routing | None = None
        self.recomputing = False  # a pass that repeats one for its backward
        for name, there in (("bias_E", biased), ("correction_E", router.corrected)):
            self.register_buffer(name, torch.zeros(num_experts) if there else None, persistent=False)
        for name, shape in (("routed_E", (num_experts,)), ("kept_E", (num_experts,)), ("tokens", ())):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64), persistent=False)

    def forward(  # type: ignore[override]  # the stock annotation promises three values; MOELayer unpacks seven
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = True,
        use_tutel: bool = False,
    ) -> tuple[Tensor, Tensor, int, Tensor, Tensor, Tensor, Tensor]:
        """Route x_TD.

        Args:
            input: x_TD in the model's dtype.
            used_token: [T] bool, False for padding; None: all tokens count.
            sparse_routes, use_tutel: DeepSpeed's interface; only sparse routes without Tutel exist here.

        Returns:
            (l_aux, capacity, E, index_KT int32, location_KT int32, weight_KT, routed_E int64); weight_KT is fp32, its
            values those of the input's dtype.
        """
        if not sparse_routes or use_tutel:
            raise ValueError("UBSMoEGate serves MOELayer's sparse routes without Tutel only")
        everything = torch.ones(len(input), dtype=torch.bool, device=input.device)
        used_T = everything if used_token is None else used_token.view(-1).bool()
        s_TE = F.linear(input.float(), self.wg.weight.float(), self.bias_E)
        m_TE = self.modulated_logits(s_TE)
        p_TE = self.router.probabilities(s_TE if self.modulate == "selection" else m_TE)
        index_TK = self.router.ranking(m_TE, self.correction_E).topk(self.k, dim=-1).indices
        weight_TK = p_TE.gather(1, index_TK)
        active_TE = torch.zeros_like(p_TE, dtype=torch.bool).scatter_(1, index_TK, True) & used_T.unsqueeze(-1)
        l_aux = self._load_balancing_loss(p_TE, active_TE, used_T)
        index_KT, location_KT, limit, routed_E = self._assign_slots(index_TK.t(), weight_TK.detach().t(), used_T)
        capacity = self._capacity(len(used_T), routed_E)
        weight_TK = self.router.weights(weight_TK)
        if self.scale is not None:
            weight_TK = weight_TK * self.scale.float()
        # rounded as Hugging Face's router does, but passed on in fp32: `MOELayer` sums in the weights' dtype
        weight_KT = weight_TK.t().contiguous().to(input.dtype).float()
        kept_E = routed_E if limit is None else torch.minimum(routed_E, limit)
        p_TE = self.router.weights_of_all(p_TE).detach()
        self.routing = Routing(p_TE, active_TE, index_KT, location_KT, weight_KT.detach(), used_T, kept_E)
        if not self.recomputing:
            self._count(routed_E, kept_E, used_T)
        return l_aux, capacity, p_TE.shape[1], index_KT.int(), location_KT.int(), weight_KT, routed_E

    def modulated_logits(self, s_TE: Tensor) -> Tensor:
        """Return m_TE: phi added to the logits of the N_p experts that rank first for each token [paper].

        Where the router keeps some groups only, and they have fewer than N_p experts, to theirs [ours].
        """
        if self.phi_range is None:
            return s_TE
        first_TN = self.router.ranking(s_TE, self.correction_E).topk(self.candidates, dim=-1)
        kept_TN = (first_TN.values > -torch.inf).to(s_TE.dtype)
        candidate_TE = torch.zeros_like(s_TE).scatter_(1, first_TN.indices, kept_TN)
        return s_TE + candidate_TE * self.phi.float()

    def range_penalty(self) -> Tensor:
        """Return || ReLU(phi_min - phi) ||^2 + || ReLU(phi - phi_max) ||^2, a scalar [paper]."""
        if self.phi_range is None:
            return self.phi.new_zeros((), dtype=torch.float32)
        low, high = self.phi_range
        phi_E = self.phi.float()
        return F.relu(low - phi_E).square().sum() + F.relu(phi_E - high).square().sum()

    def set_active_experts(self, k: int) -> None:
        """Set K for the batches that follow; evaluation and timing switch between budgets with it.

        Raises:
            ValueError: for a K that is not 1 to N_p.
        """
        if not 1 <= k <= self.candidates:
            raise ValueError(f"k {k} must lie between 1 and the {self.candidates} candidates N_p")
        self.k = k

    @property
    def dropped(self) -> Tensor:
        """Return the number of routes dropped since the counts were reset."""
        return (self.routed_E - self.kept_E).sum()

    def _count(self, routed_E: Tensor, kept_E: Tensor, used_T: Tensor) -> None:
        self.routed_E += routed_E
        self.kept_E += kept_E
        self.tokens += used_T.sum()

    def reset_counts(self) -> None:
        """Set all counts to zero; see `GateCounts` for all gates of a model."""
        for counter in (self.routed_E, self.kept_E, self.tokens):
            counter.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the biases in fp32, as transformers does, where the model is made bf16: they decide by small steps."""
        precise = {name: getattr(self, name) for name in ("bias_E", "correction_E")}
        super()._apply(fn, recurse)
        for name, value in precise.items():
            if value is not None:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    def _load_balancing_loss(self, p_TE: Tensor, active_TE: Tensor, used_T: Tensor) -> Tensor:
        """Return DeepSpeed's l_aux = E / K * sum_e mean_t(p) mean_t(active), over the tokens that are not padding.

        Sigmoids are divided by their sum for it, as DeepSeek-V3 does (arXiv 2412.19437).
        """
        if self.router.score == "sigmoid":
            p_TE = p_TE / p_TE.sum(dim=-1, keepdim=True)
        n = used_T.sum().clamp_min(1)
        mean_p_E = (p_TE * used_T.unsqueeze(-1)).sum(0) / n
        share_E = active_TE.sum(0) / n
        return (mean_p_E * share_E).sum() * p_TE.shape[1] / self.k

    def _assign_slots(
        self, index_KT: Tensor, weight_KT: Tensor, used_T: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Give every route a slot of its expert; routes beyond the limit and those of padding get expert -1.

        Returns:
            (index_KT, location_KT, most routes that an expert keeps or None where nothing is dropped, routed_E).
        """
        num_experts = self.wg.weight.shape[0]
        expert_N = torch.where(used_T, index_KT, num_experts).reshape(-1)  # padding sorts behind the last expert
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_N.device)
        counts.scatter_add_(0, expert_N, torch.ones_like(expert_N))
        # one sort by expert, then, where it matters, by falling weight: the bits of a float >= 0 grow with it
        key_N = (expert_N << 32) - weight_KT.reshape(-1).view(torch.int32) if self.dropping else expert_N
        order = key_N.argsort(stable=True)
        first = counts.cumsum(0) - counts
        location_N = torch.empty_like(expert_N)
        location_N[order] = torch.arange(len(order), device=order.device) - first[expert_N[order]]
        kept_N, limit = expert_N < num_experts, None
        if self.dropping:
            limit = self._limit(used_T)
            kept_N = kept_N & (location_N < limit)
        index_N = torch.where(kept_N, expert_N, -1)
        return index_N.view_as(index_KT), (location_N * kept_N).view_as(index_KT), limit, counts[:-1]

    @property
    def dropping(self) -> bool:
        """Return whether routes beyond the capacity are dropped now."""
        return self.drop_tokens and self.training

    def most_routes(self, num_tokens: int) -> int:
        """Return an upper bound of the routes kept of so many tokens, without asking the device."""
        routes = num_tokens * self.k
        if not self.dropping:
            return routes
        return min(routes, self._slots(num_tokens) * len(self.wg.weight))

    def _slots(self, num_tokens: int) -> int:
        """Return the slots per expert when dropping: what the experts keep of so many tokens without padding."""
        slots = math.ceil(num_tokens / len(self.wg.weight) * self.capacity_factor * self.k)
        return max(slots, self.min_capacity)

    def _limit(self, used_T: Tensor) -> Tensor:
        """Return the most routes that an expert keeps: `_slots` of the tokens in use, whose number the device has."""
        tokens = used_T.sum().double()  # fp64 and the order of `_slots`, so that both round alike
        experts = tokens.new_full((), len(self.wg.weight))  # by a number, CUDA would multiply by its reciprocal
        limit = (tokens / experts * self.capacity_factor * self.k).ceil()
        return limit.clamp(self.min_capacity, self._slots(len(used_T))).long()

    def _capacity(self, num_tokens: int, routed_E: Tensor) -> Tensor:
        """Return the slots per expert; equal on all ranks of an expert group, as the all-to-all needs."""
        if self.dropping:
            return torch.tensor(self._slots(num_tokens))  # on the host; it counts padding, in which ranks differ
        capacity = routed_E.max().clamp_min(1)
        if self.ep_group is not None and dist.get_world_size(self.ep_group) > 1:
            dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=self.ep_group)
        return capacity


class GateCounts:
    """The counts of all gates of a model as parts of one table, which is read and set to zero at once.

    The gates stay where they are from now on: moved to another device they would count elsewhere.

    Args:
        gates: the gates.
    """

    def __init__(self, gates: Sequence[UBSMoEGate]) -> None:
        experts = len(gates[0].routed_E)
        # X = 2 E + 1: side by side kept_E, routed_E, tokens
        self._table_LX = gates[0].routed_E.new_zeros(len(gates), 2 * experts + 1)
        for gate, row_X in zip(gates, self._table_LX, strict=True):
            gate.kept_E, gate.routed_E, gate.tokens = row_X[:experts], row_X[experts:-1], row_X[-1]

    def reset(self) -> None:
        """Set all counts to zero: before local steps, and before an evaluation."""
        self._table_LX.zero_()

    def read(self) -> tuple[Tensor, int]:
        """Return (the tokens that were routed to each expert, last all tokens, [L, E + 1] int64; dropped routes).

        Both are copies on the CPU, for which the device is waited for once.
        """
        table_LX = self._table_LX.cpu()
        experts = table_LX.shape[1] // 2
        kept_LE, routed_LX = table_LX[:, :experts], table_LX[:, experts:].clone()
        return routed_LX, int(routed_LX[:, :-1].sum() - kept_LE.sum())
