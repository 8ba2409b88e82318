"""Frozen weights in 4 or 8 bits, in the formats and with the kernels of bitsandbytes, on CPUs and accelerators alike.

nf4: blocks of 64 consecutive values as 4-bit NormalFloat with one fp32 scale (QLoRA, arXiv 2305.14314).
int8: rows as 8-bit integers with one fp32 scale, the largest magnitude (LLM.int8(), arXiv 2208.07339, without its
outliers, as only weights are quantised here).

Shapes: E matrices (one for each expert), O outputs, I inputs.
"""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ubsmoe_ds.base.errors import UserError

BLOCK = 64  # values with one scale in nf4
PIECE = 2**20  # values that are quantised at a time: the library's own temporaries are several times as large
GROUP = 2**24  # values that are dequantised at a time on their way into a wider matrix


@cache
def library() -> Any:
    """Return bitsandbytes.functional.

    Imported on first use, because it takes seconds. With the package `kernels` installed its import would fetch
    a kernel that is not needed here from the network; without it, it warns. Both are prevented.

    Raises:
        UserError: if it is not installed.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        with _hidden("kernels"):
            from bitsandbytes import functional
    except ModuleNotFoundError as error:
        raise UserError(f"model.quantize: {error.name} is missing; pip install '.[quantize]'") from error
    return functional


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Make imports of a package fail."""
    before = {package: sys.modules[package]} if package in sys.modules else {}
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
        sys.modules.update(before)


class QuantizedWeight(nn.Module):
    """A frozen weight that is kept in few bits. Its values are set by `quantize_` and read by `dequantized`.

    Scales are kept as bytes, because DeepSpeed's bf16 would otherwise round them like every other fp32 buffer.

    Args:
        scheme: "nf4" or "int8".
        shape: [E, O, I], or [O, I].
        dtype: of the dequantised values.

    Raises:
        UserError: for nf4, if a matrix cannot be cut into blocks, which must not depend on who holds which experts.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.scheme, self.shape, self.dtype = scheme, torch.Size(shape), dtype
        self.matrices, (outputs, inputs) = math.prod(shape[:-2]), shape[-2:]
        if scheme == "nf4" and outputs * inputs % BLOCK:
            raise UserError(
                f"model.quantize: 'nf4' needs weights whose size is a multiple of {BLOCK}, the model has one of "
                f"{outputs} x {inputs}; use int8"
            )
        sizes, codes = (
            ((outputs * inputs // 2, outputs * inputs // BLOCK), torch.uint8)
            if scheme == "nf4"
            else ((outputs * inputs, outputs), torch.int8)
        )
        self.register_buffer("codes", torch.empty(self.matrices, sizes[0], dtype=codes))
        self.register_buffer("scales", torch.empty(self.matrices, sizes[1], dtype=torch.float32).view(torch.uint8))

    @torch.no_grad()
    def quantize_(self, number: int, value_OI: Tensor) -> None:
        """Set a matrix; pieces of it at a time, so that this takes little memory beside it."""
        scales = self.scales.view(torch.float32)[number]
        if self.scheme == "nf4":
            for codes, scale, piece in zip(
                self.codes[number].split(PIECE // 2),
                scales.split(PIECE // BLOCK),
                value_OI.reshape(-1).split(PIECE),
                strict=True,
            ):
                packed, state = library().quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
                codes.copy_(packed.view(-1))
                scale.copy_(state.absmax)
            return
        rows = max(1, PIECE // value_OI.shape[1])
        for codes, scale, piece in zip(
            self.codes[number].view(value_OI.shape).split(rows), scales.split(rows), value_OI.split(rows), strict=True
        ):
            rounded, largest, _ = library().int8_vectorwise_quant(piece)
            codes.copy_(rounded)  # anything in a row of zeros, whose scale is zero
            scale.copy_(largest)

    def dequantized(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return new values of the matrices [first, last), [n, O, I]; of a weight [O, I] its own."""
        codes, scales = self.codes[first:last], self.scales.view(torch.float32)[first:last]
        if self.scheme == "nf4":
            # through the operator itself: of its wrappers one wants a state object, the other works on CUDA alone
            library()
            flat = torch.ops.bitsandbytes.dequantize_4bit.default(
                codes.reshape(-1), scales.reshape(-1), BLOCK, "nf4", [2 * codes.numel() // BLOCK, BLOCK], self.dtype
            )
        else:
            rows = codes.reshape(-1, self.shape[-1])
            flat = library().int8_vectorwise_dequant(rows, scales.reshape(-1)).to(self.dtype)
        return flat.view(*((len(codes),) if len(self.shape) > 2 else ()), *self.shape[-2:])

    def dequantize_into(self, target_EOI: Tensor) -> None:
        """Copy all matrices to a tensor of any strides, some at a time."""
        count = max(1, GROUP // math.prod(self.shape[-2:]))
        for first in range(0, self.matrices, count):
            target_EOI[first : first + count] = self.dequantized(first, first + count)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is dequantised in every pass, forward and backward.

    Args:
        linear: what it replaces; its bias is kept as it is.
        scheme: see `QuantizedWeight`.
    """

    def __init__(self, linear: nn.Linear, scheme: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = QuantizedWeight(scheme, tuple(linear.weight.shape), linear.weight.dtype)
        self.weight.quantize_(0, linear.weight.data)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return _Linear.apply(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """y = W x + b, of which only x learns; the graph holds the quantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:  # noqa: D102
        ctx.weight = weight
        return F.linear(x, weight.dequantized(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: D102
        return gradients[0] @ ctx.weight.dequantized(), None, None
