"""One rank's frozen expert weights, as matrices with room for the scaled LoRA factors beside them: whole, or quantised.

Shapes: E local experts, D model width, F expert width, R LoRA rank, I and O the inputs and outputs of a matrix.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ubsmoe_ds.moe.expert_mlp import room
from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS, LoraFactors
from ubsmoe_ds.moe.quantized import QuantizedWeight

MATRICES = ("gate_up", "down")
Views = Mapping[str, Tensor]
Opener = Callable[[], Tensor]  # gives a matrix, see `Weights` of expert_mlp.py


class Sizes(NamedTuple):
    """Hold what the shapes of the matrices follow from: E, F, D, R, and whether every projection has a bias."""

    experts: int
    hidden: int
    width: int
    lora_rank: int
    biased: bool = False

    @property
    def gate_up(self) -> tuple[int, int, int]:
        """Return O, I and the columns behind W of gate and up, which are one matrix."""
        return 2 * self.hidden, self.width, 2 * self.lora_rank + self.biased

    @property
    def down(self) -> tuple[int, int, int]:
        """Return O, I and the columns behind W of down."""
        return self.width, self.hidden, self.lora_rank + self.biased

    @property
    def projections(self) -> dict[str, tuple[int, int, int]]:
        """Return the shape [E, O, I] of each projection's weight."""
        inwards = (self.experts, self.hidden, self.width)
        return {"gate": inwards, "up": inwards, "down": (self.experts, self.width, self.hidden)}


class FrozenExperts(ABC, nn.Module):
    """The frozen weights of one rank's experts, and biases if there are some.

    Args:
        sizes: of this rank's experts.
        dtype: precision of the weights, or of what they are dequantised to.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.dtype = sizes, dtype

    @abstractmethod
    def base(self) -> Views:
        """Return each projection's weight: "gate", "up" [E, F, D], "down" [E, D, F]."""

    @abstractmethod
    def bias(self) -> Views:
        """Return a view of each projection's bias: "gate", "up" [E, F], "down" [E, D]; empty without biases."""

    @abstractmethod
    def fill(self, read: Callable[[Views, Views], None]) -> None:
        """Set the values.

        Args:
            read: writes weights and biases into views like `base` and `bias`, which may hold some projections only.
        """

    @abstractmethod
    def openers(self, factors: LoraFactors, scaling: float) -> tuple[Opener, Opener]:
        """Return what gives gate_up and down with these LoRA factors beside the weights."""


class WholeExperts(FrozenExperts):
    """Frozen weights as parameters [[W, s B, b], [A, 0, 0]] of each expert; they start at zero."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(sizes, dtype)
        self.gate_up = _zeros(room(sizes.experts, *sizes.gate_up), dtype)
        self.down = _zeros(room(sizes.experts, *sizes.down), dtype)

    def base(self) -> Views:
        """Return views."""
        gate, up = _halves(self.gate_up.data[:, :, : self.sizes.width], self.sizes.hidden)
        return {"gate": gate, "up": up, "down": self.down.data[:, : self.sizes.width, : self.sizes.hidden]}

    def bias(self) -> Views:  # noqa: D102
        if not self.sizes.biased:
            return {}
        gate, up = _halves(_bias_column(self.gate_up.data, self.sizes, "gate_up"), self.sizes.hidden)
        return {"gate": gate, "up": up, "down": _bias_column(self.down.data, self.sizes, "down")}

    def fill(self, read: Callable[[Views, Views], None]) -> None:  # noqa: D102
        read(self.base(), self.bias())

    def openers(self, factors: LoraFactors, scaling: float) -> tuple[Opener, Opener]:  # noqa: D102
        extend(self.gate_up.data, self.sizes, "gate_up", factors, scaling)
        extend(self.down.data, self.sizes, "down", factors, scaling)
        return (lambda: self.gate_up), (lambda: self.down)


class Workspace:
    """One buffer for all layers of a model, which are dequantised one after the other; it grows to the largest."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the buffer in this shape. It holds anything, and what was taken before is lost."""
        numel, flat = math.prod(shape), self._flat
        if flat is None or flat.numel() < numel or (flat.dtype, flat.device) != (dtype, device):
            self._flat = flat = None  # frees the old one first
            self._flat = flat = torch.empty(numel, dtype=dtype, device=device)
        return flat[:numel].view(shape)

    @property
    def nbytes(self) -> int:
        """Return the size of the buffer."""
        return 0 if self._flat is None else self._flat.nbytes


class QuantizedExperts(FrozenExperts):
    """Frozen weights in 4 or 8 bits; biases stay as they are. What is opened is valid until the next is.

    Args:
        sizes, dtype: as `FrozenExperts`.
        scheme: see `QuantizedWeight`.
        workspace: where they are opened.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype, scheme: str, workspace: Workspace) -> None:
        super().__init__(sizes, dtype)
        self.workspace = workspace
        for name in MATRICES:
            outputs, inputs, _ = getattr(sizes, name)
            self.add_module(name, QuantizedWeight(scheme, (sizes.experts, outputs, inputs), dtype))
            if sizes.biased:
                self.register_parameter(f"{name}_bias", _zeros((sizes.experts, outputs), dtype))
            self._room(name)  # so that the workspace need not grow later

    def base(self) -> Views:
        """Return the weights, each dequantised when it is asked for, into new memory."""
        return _Dequantized(self)

    def bias(self) -> Views:  # noqa: D102
        if not self.sizes.biased:
            return {}
        gate, up = _halves(self.get_parameter("gate_up_bias").data, self.sizes.hidden)
        return {"gate": gate, "up": up, "down": self.get_parameter("down_bias").data}

    def fill(self, read: Callable[[Views, Views], None]) -> None:  # noqa: D102
        bias = self.bias()
        for name in MATRICES:
            weight = self.weight(name)
            values = self.workspace.take(weight.shape, self.dtype, weight.codes.device)
            gate_up = dict(zip(("gate", "up"), _halves(values, self.sizes.hidden), strict=True))
            views = gate_up if name == "gate_up" else {"down": values}
            read(views, {projection: bias[projection] for projection in views if bias})
            for number, value_OI in enumerate(values):
                weight.quantize_(number, value_OI)

    def openers(self, factors: LoraFactors, scaling: float) -> tuple[Opener, Opener]:  # noqa: D102
        return partial(self._open, "gate_up", factors, scaling), partial(self._open, "down", factors, scaling)

    def weight(self, name: str) -> QuantizedWeight:
        """Return "gate_up" or "down"."""
        weight = self.get_submodule(name)
        assert isinstance(weight, QuantizedWeight)
        return weight

    def _room(self, name: str) -> Tensor:
        """Take the workspace for a matrix."""
        shape = room(self.sizes.experts, *getattr(self.sizes, name))
        return self.workspace.take(shape, self.dtype, self.weight(name).codes.device)

    @torch.no_grad()
    def _open(self, name: str, factors: LoraFactors, scaling: float) -> Tensor:
        """Dequantise a matrix, with the factors beside it, as `WholeExperts` keeps it."""
        (outputs, inputs, _), matrix = getattr(self.sizes, name), self._room(name)
        matrix[:, outputs:] = 0
        matrix[:, :outputs, inputs:] = 0
        self.weight(name).dequantize_into(matrix[:, :outputs, :inputs])
        if self.sizes.biased:
            _bias_column(matrix, self.sizes, name).copy_(self.get_parameter(f"{name}_bias"))
        extend(matrix, self.sizes, name, factors, scaling)
        return matrix


class _Dequantized(Mapping[str, Tensor]):
    """Weights by projection, dequantised when asked for."""

    def __init__(self, experts: QuantizedExperts) -> None:
        self.experts = experts

    def __getitem__(self, name: str) -> Tensor:
        weight = self.experts.weight("down" if name == "down" else "gate_up")
        value = torch.empty(weight.shape, dtype=weight.dtype, device=weight.codes.device)
        weight.dequantize_into(value)
        return value if name == "down" else _halves(value, self.experts.sizes.hidden)[name == "up"]

    def __iter__(self) -> Iterator[str]:
        return iter(PROJECTIONS)

    def __len__(self) -> int:
        return len(PROJECTIONS)


@torch.no_grad()
def extend(matrix: Tensor, sizes: Sizes, name: str, factors: LoraFactors, scaling: float) -> None:
    """Copy A, and B times `scaling`, to their places beside the weights of "gate_up" or "down"."""
    hidden, width, rank = sizes.hidden, sizes.width, sizes.lora_rank
    outputs, inputs, _ = getattr(sizes, name)
    for i, projection in enumerate(("gate", "up") if name == "gate_up" else ("down",)):
        A_ERI, B_EOR = factors[projection]
        rows = slice(i * hidden, (i + 1) * hidden) if name == "gate_up" else slice(width)
        matrix[:, outputs + i * rank : outputs + (i + 1) * rank, :inputs].copy_(A_ERI)
        torch.mul(B_EOR, scaling, out=matrix[:, rows, inputs + i * rank : inputs + (i + 1) * rank])


def _bias_column(matrix: Tensor, sizes: Sizes, name: str) -> Tensor:
    """Return a view of the biases in "gate_up" or "down", [E, O]."""
    outputs, inputs, columns = getattr(sizes, name)
    return matrix[:, :outputs, inputs + columns - 1]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)


def _halves(gate_up: Tensor, hidden: int) -> tuple[Tensor, Tensor]:
    """Return views of gate and of up, [E, F, ..]."""
    return gate_up[:, :hidden], gate_up[:, hidden : 2 * hidden]
