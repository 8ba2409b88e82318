"""How a model's router ranks a token's experts and weighs the K that it chooses: one description for all families.

Shapes: T tokens, E experts, K experts per token, G groups of experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Router:
    """The rule of a router, in the order in which it is applied to logits m.

    score: p = "softmax" of m over the experts, or "sigmoid" of each.
    corrected: whether a bias is added to p for the choice alone; the weights are p without it.
    groups, kept_groups: the choice is among the experts of the best groups only; 1: of all.
    group_best: a group is ranked by the sum of so many of its experts' best values.
    normalize: whether the K weights are divided by their sum. (A softmax over the K chosen logits is the same thing.)
    least_sum: least divisor there.
    scaling: factor of the K weights.
    """

    score: str = "softmax"
    corrected: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1
    normalize: bool = False
    least_sum: float = 0.0
    scaling: float = 1.0

    def probabilities(self, m_TE: Tensor) -> Tensor:
        """Return p, the softmax or sigmoid of the logits."""
        return F.softmax(m_TE, dim=-1) if self.score == "softmax" else torch.sigmoid(m_TE)

    def ranking(self, m_TE: Tensor, correction_E: Tensor | None) -> Tensor:
        """Return what the experts are ranked by: the logits where that is the same, -inf outside of the kept groups."""
        if correction_E is None and self.groups == 1:
            return m_TE
        rank_TE = self.probabilities(m_TE)
        if correction_E is not None:
            rank_TE = rank_TE + correction_E
        if self.groups == 1:
            return rank_TE
        rank_TGe = rank_TE.unflatten(1, (self.groups, -1))
        group_TG = rank_TGe.topk(self.group_best, dim=-1).values.sum(-1)
        kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
        kept_TG.scatter_(1, group_TG.topk(self.kept_groups, dim=-1).indices, True)
        return rank_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf).flatten(1)

    def weights(self, p_TK: Tensor) -> Tensor:
        """Return the weights of the K chosen experts.

        One normalised weight is 1 whatever the router says, so p gets no gradient: by the rule of the quotient it would
        be the rounding noise of two equal terms, which Adam turns into full steps [ours].
        """
        if self.normalize and p_TK.shape[1] == 1:
            weight_TK = torch.where(p_TK < self.least_sum, p_TK / max(self.least_sum, 1e-30), 1.0 + 0.0 * p_TK)
        elif self.normalize:
            total_T1 = p_TK.sum(dim=-1, keepdim=True)
            weight_TK = p_TK / (total_T1.clamp_min(self.least_sum) if self.least_sum else total_T1)
        else:
            weight_TK = p_TK
        return weight_TK if self.scaling == 1.0 else weight_TK * self.scaling

    def weights_of_all(self, p_TE: Tensor) -> Tensor:
        """Return the weights that the experts would have if all were active, before scaling: p of DMR and PG [ours].

        The softmax itself; of a sigmoid router sigmoid / sum of sigmoids, or the sigmoid where nothing is normalised.
        """
        return p_TE / p_TE.sum(dim=-1, keepdim=True) if self.score == "sigmoid" and self.normalize else p_TE

    def most_candidates(self, num_experts: int) -> int:
        """Return how many experts can be chosen of."""
        return num_experts // self.groups * self.kept_groups
