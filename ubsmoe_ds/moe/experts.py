"""One rank's gated experts with LoRA: the parameters for `expert_mlp.py`, and the moments summed up on them.

Shapes: E local experts, P ranks, C slots per rank, N rows, S sampled rows, T tokens, K experts per token,
D model width, F expert width, R LoRA rank, X = 3 F + 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ubsmoe_ds.moe.activations import SWIGLU, Activation
from ubsmoe_ds.moe.expert_mlp import ExpertMLP, Observer, Rows, Weights
from ubsmoe_ds.moe.frozen import FrozenExperts, Views
from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS, Moments


class StackedExperts(nn.Module):
    """The experts that one rank holds: frozen weights, LoRA A [E, R, in] and B [E, out, R] trainable.

    A starts uniform as in PEFT (kaiming, a = sqrt 5) and B at zero, so that the model starts as the base model.
    Every parameter carries DeepSpeed's marks of an expert (`allreduce`, `group_name`).

    Args:
        frozen: the weights, with the sizes; adapters start in fp32.
        full_rank: LoRA rank of the shared adapters; A is drawn at this rank and cut, so that clients start alike.
        alpha: LoRA's alpha; the product B A is scaled by s = alpha / R.
        group_name: DeepSpeed's name of the expert group, "ep_size_N".
        generator: draws A for all `num_experts` experts of the model, so that A does not depend on expert parallelism.
        num_experts: experts of the whole model.
        first: global index of the first local expert.
        activation: of the hidden units.
    """

    def __init__(
        self,
        frozen: FrozenExperts,
        *,
        full_rank: int,
        alpha: float,
        group_name: str,
        generator: torch.Generator,
        num_experts: int,
        first: int,
        activation: Activation = SWIGLU,
    ) -> None:
        super().__init__()
        self.frozen, self.activation = frozen, activation
        self.num_local_experts, self.hidden, self.width, self.lora_rank, self.biased = frozen.sizes
        self.scaling = alpha / self.lora_rank
        self.first, self.num_experts, self.full_rank = first, num_experts, full_rank
        self.on_backward: Callable[[Tensor, Tensor], None] | None = None  # see `expert_mlp.Observer`
        self.moments: Moments | None = None  # of the local experts, used by pseudo-gradients
        self.moment_sums_EX: Tensor | None = None  # where set, sums of three moments [E, F] and a count
        self.recomputing = False  # a pass that repeats one for its backward
        self.moment_every = 1  # one of so many rows is looked at for moments
        for name, (_, outputs, _) in frozen.sizes.projections.items():
            A_ERI = self.draw_adapter(name, generator)[:, : self.lora_rank].clone()
            B_EOR = torch.zeros(self.num_local_experts, outputs, self.lora_rank)
            self.register_parameter(f"{name}_lora_A", nn.Parameter(A_ERI))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(B_EOR))
        for parameter in self.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]

    def draw_adapter(self, name: str, generator: torch.Generator) -> Tensor:
        """Draw a new A of a projection for the model's experts and return the local ones.

        Returns:
            [E local, full LoRA rank, in], fp32 on the CPU.
        """
        inputs = self.frozen.sizes.projections[name][2]
        bound = 1 / math.sqrt(inputs)  # kaiming uniform with a = sqrt 5
        A_all = torch.empty(self.num_experts, self.full_rank, inputs).uniform_(-bound, bound, generator=generator)
        return A_all[self.first : self.first + self.num_local_experts]

    def factors(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Return the live parameters (A, B) of each projection."""
        return {name: (getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B")) for name in PROJECTIONS}

    def base(self) -> Views:
        """Return each projection's frozen weight: "gate", "up" [E, F, D], "down" [E, D, F]; see `FrozenExperts`."""
        return self.frozen.base()

    def bias(self) -> Views:
        """Return a view of each projection's frozen bias: "gate", "up" [E, F], "down" [E, D]; empty without biases."""
        return self.frozen.bias()

    def forward(self, slots: Tensor) -> Tensor:
        """Run every local expert on its slots, under expert parallelism.

        Args:
            slots: [P, E, C, D], as `MOELayer` passes them after the all-to-all; empty slots are zero.

        Returns:
            The experts' outputs in the same shape.
        """
        ranks, num_experts, capacity, width = slots.shape
        x_ND = slots.transpose(0, 1).reshape(-1, width)
        rows = Rows(torch.arange(1, num_experts + 1, dtype=torch.int32, device=slots.device) * (ranks * capacity))
        y_ND = self.run(x_ND, None, rows)
        return y_ND.view(num_experts, ranks, capacity, width).transpose(0, 1)

    def run(self, x: Tensor, weight_TK: Tensor | None, rows: Rows) -> Tensor:
        """Map tokens x_TD to sum_k weight * expert(x) [T, D]; without weights, rows x_ND to expert(x) [N, D]."""
        factors = self.factors()
        summing = self.training and self.moment_sums_EX is not None and not self.recomputing
        observer = Observer(self._sum_moments(rows) if summing else None, self.on_backward)
        matrices = self.frozen.openers(factors, self.scaling)
        sizes = self.width, self.hidden, self.lora_rank
        weights = Weights(*matrices, *sizes, self.scaling, self.activation, self.biased)
        return ExpertMLP.apply(weights, rows, observer, x, weight_TK, *(f for pair in factors.values() for f in pair))

    def _sum_moments(self, rows: Rows) -> Callable[[Tensor, Tensor], None]:
        """Return a function that sums moments over all rows, or over a sample whose size does not depend on routing."""

        def add(x_ND: Tensor, gate_up_NO: Tensor) -> None:
            assert self.moment_sums_EX is not None
            count = len(x_ND)
            row_S = torch.arange(count, device=x_ND.device)
            if self.moment_every > 1:
                row_S = torch.randint(count, (-(-count // self.moment_every),), device=x_ND.device)
            gate_SF, up_SF = gate_up_NO[row_S].split(self.hidden, dim=1)
            expert_S = torch.searchsorted(rows.ends_E, row_S.int(), right=True)
            filled_S1 = x_ND[row_S].any(dim=1, keepdim=True)  # empty slots are zero, but biases may stand in their h
            values_SX = torch.cat([*self.activation.slopes(gate_SF.float(), up_SF.float()), filled_S1], dim=1)
            values_SX = torch.where(filled_S1, values_SX, 0.0)
            if rows.kept_TK is not None:
                values_SX = values_SX * rows.kept_TK.any()  # without any route, `ends_E` has one all the same
            sums_EX = self.moment_sums_EX.new_zeros(self.num_local_experts + 1, values_SX.shape[1])
            self.moment_sums_EX += sums_EX.index_add_(0, expert_S, values_SX)[:-1]  # the last: rows of no expert

        return add
