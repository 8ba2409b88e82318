"""The activations of experts: h = f(g, u) of the gate's and the up projection's outputs, and its derivatives.

Each is split into a factor a(g), which the backward pass computes again, and a factor b(u): h = a(g) b(u).

Shapes: N rows, F expert width.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Activation(Protocol):
    """Define what the experts' computation asks of an activation."""

    def __call__(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """Return h, differentiably."""
        ...

    def factor(self, gate_NF: Tensor) -> Tensor:
        """Return a(g)."""
        ...

    def hidden(self, factor_NF: Tensor, up_NF: Tensor, out: Tensor) -> Tensor:
        """Write h = a(g) b(u) to `out` and return it."""
        ...

    def backward(
        self, dh_NF: Tensor, factor_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, dgate: Tensor, dup: Tensor
    ) -> None:
        """Write dL/dg and dL/du to `dgate` and `dup`; uses up `dh_NF`."""
        ...

    def slopes(self, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return h, dh/dg and dh/du."""
        ...


@dataclass(frozen=True)
class SwiGLU:
    """h = silu(g) u."""

    def __call__(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:  # noqa: D102
        return F.silu(gate_NF) * up_NF

    def factor(self, gate_NF: Tensor) -> Tensor:  # noqa: D102
        return F.silu(gate_NF)

    def hidden(self, factor_NF: Tensor, up_NF: Tensor, out: Tensor) -> Tensor:  # noqa: D102
        return torch.mul(factor_NF, up_NF, out=out)

    def backward(  # noqa: D102
        self, dh_NF: Tensor, factor_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, dgate: Tensor, dup: Tensor
    ) -> None:
        torch.mul(dh_NF, factor_NF, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh_NF.mul_(up_NF), gate_NF, grad_input=dgate)

    def slopes(self, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        return silu_NF * up_NF, (sigmoid_NF + silu_NF * (1 - sigmoid_NF)) * up_NF, silu_NF


@dataclass(frozen=True)
class ClampedSwish:
    """h = g' sigmoid(alpha g') (u' + 1), g' = min(g, limit), u' = u clamped to +-limit (gpt-oss).

    As torch's clamp has it, the derivative is one at a limit and zero beyond.
    """

    alpha: float
    limit: float

    def __call__(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:  # noqa: D102
        return self.factor(gate_NF) * (up_NF.clamp(-self.limit, self.limit) + 1)

    def factor(self, gate_NF: Tensor) -> Tensor:  # noqa: D102
        clamped_NF = gate_NF.clamp(max=self.limit)
        return clamped_NF * torch.sigmoid(self.alpha * clamped_NF)

    def hidden(self, factor_NF: Tensor, up_NF: Tensor, out: Tensor) -> Tensor:  # noqa: D102
        return torch.mul(factor_NF, up_NF.clamp(-self.limit, self.limit).add_(1), out=out)

    def backward(  # noqa: D102
        self, dh_NF: Tensor, factor_NF: Tensor, gate_NF: Tensor, up_NF: Tensor, dgate: Tensor, dup: Tensor
    ) -> None:
        _, by_gate_NF, by_up_NF = self.slopes(gate_NF, up_NF)
        torch.mul(dh_NF, by_gate_NF, out=dgate)
        torch.mul(dh_NF, by_up_NF, out=dup)

    def slopes(self, gate_NF: Tensor, up_NF: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: D102
        clamped_NF, shifted_NF = gate_NF.clamp(max=self.limit), up_NF.clamp(-self.limit, self.limit) + 1
        sigmoid_NF = torch.sigmoid(self.alpha * clamped_NF)
        swish_NF = clamped_NF * sigmoid_NF
        by_gate_NF = (sigmoid_NF + self.alpha * swish_NF * (1 - sigmoid_NF)) * (gate_NF <= self.limit)
        return swish_NF * shifted_NF, by_gate_NF * shifted_NF, swish_NF * (up_NF.abs() <= self.limit)


SWIGLU = SwiGLU()
