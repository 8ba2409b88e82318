"""Frozen SwiGLU experts stacked per projection, with LoRA, computed as batched products over the local experts.

Shapes: E local experts, P ranks, C slots per rank, N = P C slots, D model width, F expert width, R LoRA rank,
X = 3 F + 1
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS, Moments, moment_values


class Activations(NamedTuple):
    """Intermediate results of a forward pass whose values or gradients a pseudo-gradient needs.

    gate_ENF, up_ENF: pre-activations g, u; hidden_ENF: silu(g) * u
    """

    gate_ENF: Tensor
    up_ENF: Tensor
    hidden_ENF: Tensor


class StackedExperts(nn.Module):
    """The experts that one rank holds: W frozen [E, out, in], LoRA A [E, R, in] and B [E, out, R] trainable.

    A starts uniform as in PEFT (kaiming, a = sqrt 5) and B at zero, so that the model starts as the base model.
    Every parameter carries DeepSpeed's marks of an expert (`allreduce`, `group_name`).

    Args:
        base: frozen weights "gate" [E, F, D], "up" [E, F, D], "down" [E, D, F].
        rank: R.
        full_rank: rank of the largest client; A is drawn at this rank and cut, so that clients start alike.
        alpha: LoRA's alpha; the product B A is scaled by s = alpha / R.
        group_name: DeepSpeed's name of the expert group, "ep_size_N".
        generator: draws A for all `num_experts` experts of the model, so that A does not depend on expert parallelism.
        num_experts: experts of the whole model.
        first: global index of the first local expert.
    """

    def __init__(
        self,
        base: dict[str, Tensor],
        *,
        rank: int,
        full_rank: int,
        alpha: float,
        group_name: str,
        generator: torch.Generator,
        num_experts: int,
        first: int,
    ) -> None:
        super().__init__()
        self.scaling = alpha / rank
        self.first, self.num_experts, self.full_rank = first, num_experts, full_rank
        self.num_local_experts = len(base["gate"])
        self.keep_activations = False
        self.activations: Activations | None = None
        self.moments: Moments | None = None  # of the local experts, used by pseudo-gradients
        self.moment_sums_EX: Tensor | None = None  # adds up where set: three moments [E, F] and a count
        self.moment_every = 1  # of how many slots one is looked at for moments
        for name in PROJECTIONS:
            self.register_parameter(f"{name}_weight", nn.Parameter(base[name], requires_grad=False))
        for name, A_ERI in self.draw_adapters(generator).items():
            weight = base[name]
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A_ERI[:, :rank].clone()))
            self.register_parameter(
                f"{name}_lora_B", nn.Parameter(torch.zeros(self.num_local_experts, weight.shape[1], rank))
            )
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]

    def draw_adapters(self, generator: torch.Generator) -> dict[str, Tensor]:
        """New A of the local experts for each projection, [E local, full rank, in], fp32 on the CPU."""
        drawn = {}
        for name, weight in self.base().items():
            bound = 1 / math.sqrt(weight.shape[2])  # kaiming uniform with a = sqrt 5
            A_all = torch.empty(self.num_experts, self.full_rank, weight.shape[2])
            A_all.uniform_(-bound, bound, generator=generator)
            drawn[name] = A_all[self.first : self.first + self.num_local_experts]
        return drawn

    def start_moments(self, every: int) -> None:
        """Begin to sum up moments over every `every`-th token that training brings to an expert from one rank."""
        base_EFD = self.base()["gate"]
        columns = 3 * base_EFD.shape[1] + 1
        self.moment_every = every
        self.moment_sums_EX = torch.zeros(self.num_local_experts, columns, device=base_EFD.device)

    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """(A, B) of each projection: the live parameters."""
        return {name: (getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")) for name in PROJECTIONS}

    def base(self) -> dict[str, Tensor]:
        """The frozen weight of each projection."""
        return {name: getattr(self, f"{name}_weight") for name in PROJECTIONS}

    def forward(self, slots: Tensor) -> Tensor:
        """Run every local expert on its slots.

        Args:
            slots: [ranks, E, C, D], as `MOELayer` hands them over after the all-to-all.

        Returns:
            The experts' outputs in the same shape.
        """
        ranks, num_experts, capacity, width = slots.shape
        x_END = slots.transpose(0, 1).reshape(num_experts, ranks * capacity, width)
        gate_ENF, up_ENF = self._project("gate", x_END), self._project("up", x_END)
        hidden_ENF = F.silu(gate_ENF) * up_ENF
        y_END = self._project("down", hidden_ENF)
        if self.moment_sums_EX is not None and self.training:
            self._sum_moments(*(part.detach().unflatten(1, (ranks, capacity)) for part in (x_END, gate_ENF, up_ENF)))
        if self.keep_activations:
            self.activations = Activations(gate_ENF, up_ENF, hidden_ENF)
        return y_END.view(num_experts, ranks, capacity, width).transpose(0, 1)

    def _sum_moments(self, *slots_EPCx: Tensor) -> None:
        """Add x, gate and up of the slots [E, ranks, C, ...]: an expert's tokens from one rank fill its first slots."""
        x_END, gate_ENF, up_ENF = (part[:, :, :: self.moment_every].flatten(1, 2) for part in slots_EPCx)
        values = moment_values(gate_ENF, up_ENF)  # zero in empty slots
        found = [value_ENF.sum(1, dtype=torch.float32) for value_ENF in values]
        assert self.moment_sums_EX is not None
        self.moment_sums_EX += torch.cat([*found, x_END.any(2).sum(1, keepdim=True)], dim=1)

    def _project(self, name: str, x_ENI: Tensor) -> Tensor:
        """W x + s B (A x) for all experts."""
        A_ERI, B_EOR = self.factors()[name]
        ax_ENR = torch.bmm(x_ENI, A_ERI.mT)
        base_ENO = torch.bmm(x_ENI, getattr(self, f"{name}_weight").mT)
        return torch.baddbmm(base_ENO, ax_ENR, B_EOR.mT, alpha=self.scaling)
