"""SwiGLU experts with LoRA on rows sorted by expert: forward and backward by hand, as grouped matrix products.

A row is one route of a token. Rows of an expert lie side by side, in numbers that the device alone knows: no padding,
no host synchronisation and no loop over experts of ours. (torch's grouped product is one kernel on CUDA for bf16 on
Hopper or newer; elsewhere torch itself loops over the experts, and on CUDA reads their numbers of rows first.)

LoRA makes no pass of its own over rows, because a projection y = W x + s B A x is one product with an extended weight,
forward and backward:

    [x, A x] [W, s B]^T        [dy, s B^T dy] [W; A]        with [[W, s B], [A, 0]] kept as one matrix per expert.

Shapes: T tokens, K experts per token, N rows, E local experts, D model width, F expert width, R LoRA rank, I and O the
inputs and outputs of a projection (gate and up are one of O = 2 F), Q its LoRA columns (2 R, or R for down).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ALIGNMENT = 8  # elements; grouped products want strides that are multiples of 16 bytes


class Rows(NamedTuple):
    """Which rows belong to which expert and route.

    ends_E: int32, where each expert's rows end; rows from the last of them on belong to nobody and hold anything
    token_N, slot_TK, kept_TK: the token of each row; the row of each route, 0 where it was dropped (its `kept` is
        False). None: rows come and go as they are, as under expert parallelism.
    """

    ends_E: Tensor
    token_N: Tensor | None = None
    slot_TK: Tensor | None = None
    kept_TK: Tensor | None = None


def route_rows(index_KT: Tensor, location_KT: Tensor, kept_E: Tensor, num_rows: int) -> Rows:
    """Rows of experts that are all on this rank.

    Args:
        index_KT: expert of each route, -1 where it was dropped.
        location_KT: its place among the kept routes of the expert.
        kept_E: how many each expert keeps.
        num_rows: at least the sum of `kept_E`, known without asking the device.
    """
    k, tokens = index_KT.shape
    kept_KT = index_KT >= 0
    ends_E = kept_E.cumsum(0)
    slot_KT = torch.where(kept_KT, (ends_E - kept_E)[index_KT] + location_KT, num_rows)
    token_N = torch.zeros(num_rows + 1, dtype=torch.int64, device=index_KT.device)
    token_N.scatter_(0, slot_KT.reshape(-1), torch.arange(tokens, device=index_KT.device).repeat(k))
    slot_TK = torch.where(kept_KT, slot_KT, 0).t().contiguous()
    ends_E[-1:].clamp_(min=1)  # without any route, row 0 is token 0, so that what `slot_TK` points at is a number
    return Rows(ends_E.int(), token_N[:-1], slot_TK, kept_KT.t().contiguous())


def room(experts: int, outputs: int, inputs: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[[W, s B], [A, 0]], all zero, for W [outputs, inputs] and `columns` columns of s B, every stride aligned."""
    return torch.zeros(experts, _aligned(outputs + columns), _aligned(inputs + columns), dtype=dtype)


class Weights(NamedTuple):
    """Of the local experts: frozen weights extended by the scaled LoRA factors.

    gate_up: [[W_gate, s B_gate, 0], [W_up, 0, s B_up], [A_gate, 0, 0], [A_up, 0, 0]]; down: [[W, s B], [A, 0]]
    """

    gate_up: Tensor
    down: Tensor
    width: int  # D
    hidden: int  # F
    rank: int
    scaling: float


class Observer(NamedTuple):
    """Told of a pass over the rows, where set: forward of (x_ND, gate_up_NO), backward of (h_NF, dL/d gate_up_NO)."""

    forward: Callable[[Tensor, Tensor], None] | None = None
    backward: Callable[[Tensor, Tensor], None] | None = None


class ExpertMLP(torch.autograd.Function):
    """y = sum over a token's kept routes of weight * expert(x); without routes, y = expert(x) of each row.

    The six factors (A, B of gate, up, down) are arguments for the sake of their gradients; their values are read from
    `weights`. Of the rows only what the experts made of them is saved; x and h are cheaper to make again.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any,
        weights: Weights,
        rows: Rows,
        observer: Observer,
        x_TD: Tensor,
        weight_TK: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        gate_up, down, width, hidden, rank, _ = weights
        num_rows = len(x_TD) if rows.token_N is None else len(rows.token_N)
        xt_NI = _with_tail(x_TD, num_rows, gate_up.shape[2], width)
        x_ND, xa_NQ = xt_NI[:, :width], xt_NI[:, width : width + 2 * rank]
        _take(x_TD, rows.token_N, x_ND)
        xa_NQ.copy_(_product(x_ND, gate_up[:, 2 * hidden : 2 * hidden + 2 * rank, :width].mT, rows))
        gate_up_NO = _product(xt_NI, gate_up[:, : 2 * hidden].mT, rows)
        if observer.forward is not None:
            observer.forward(x_ND, gate_up_NO)
        ht_NI = _with_tail(x_TD, num_rows, down.shape[2], hidden)
        h_NF, ha_NQ = ht_NI[:, :hidden], ht_NI[:, hidden : hidden + rank]
        silu_NF = F.silu(gate_up_NO[:, :hidden])
        torch.mul(silu_NF, gate_up_NO[:, hidden:], out=h_NF)
        ha_NQ.copy_(_product(h_NF, down[:, width : width + rank, :hidden].mT, rows))
        y_ND = _product(ht_NI, down[:, :width].mT, rows)
        ctx.weights, ctx.rows, ctx.observer = weights, rows, observer
        ctx.factors, ctx.versions = factors, [factor._version for factor in factors]
        ctx.save_for_backward(x_TD, xa_NQ.clone(), gate_up_NO, silu_NF, ha_NQ.clone(), weight_TK)
        if weight_TK is None:
            return y_ND
        assert rows.slot_TK is not None and rows.kept_TK is not None
        return _bag(y_ND, rows.slot_TK, weight_TK.detach() * rows.kept_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: D102
        x_TD, xa_NQ, gate_up_NO, silu_NF, ha_NQ, weight_TK = ctx.saved_tensors
        rows, (gate_up, down, width, hidden, rank, scaling) = ctx.rows, ctx.weights
        if [factor._version for factor in ctx.factors] != ctx.versions:
            raise RuntimeError("LoRA factors were changed between forward and backward")
        learning = any(ctx.needs_input_grad[5:])
        gate_NF, up_NF = gate_up_NO.split(hidden, dim=1)
        dyt_NO = _with_tail(gate_up_NO, len(gate_up_NO), down.shape[1], width)
        dy_ND, dya_NQ = dyt_NO[:, :width], dyt_NO[:, width : width + rank]
        _take(gradients[0], rows.token_N, dy_ND)
        scaled_B_ERD = down[:, :width, hidden : hidden + rank].mT.contiguous()  # twice as fast as columns far apart
        dya_NQ.copy_(_product(dy_ND, scaled_B_ERD.mT, rows))
        dh_NF = _product(dyt_NO, down[:, :, :hidden], rows)
        h_NF = torch.mul(silu_NF, up_NF, out=_aligned_empty(gate_up_NO, hidden))
        dweight_TK = None
        if weight_TK is not None:
            if ctx.needs_input_grad[4]:
                dot_N = torch.linalg.vecdot(dh_NF, h_NF)
                dweight_TK = torch.where(rows.kept_TK, dot_N[rows.slot_TK], 0.0)
            weight_N1 = _of_rows(weight_TK, rows).unsqueeze(1)
            dh_NF.mul_(weight_N1)
            ha_NQ, dya_NQ = ha_NQ * weight_N1, dya_NQ * weight_N1
        if learning:
            down_A = _product(_aligned_copy(dya_NQ).t(), h_NF, rows)
            down_B = _product(_aligned_copy(ha_NQ * scaling).t(), dy_ND, rows).mT
        dgut_NO = _with_tail(gate_up_NO, len(gate_up_NO), gate_up.shape[1], 2 * hidden)
        dgu_NO, dgua_NQ = dgut_NO[:, : 2 * hidden], dgut_NO[:, 2 * hidden : 2 * hidden + 2 * rank]
        torch.mul(dh_NF, silu_NF, out=dgu_NO[:, hidden:])
        torch.ops.aten.silu_backward.grad_input(dh_NF.mul_(up_NF), gate_NF, grad_input=dgu_NO[:, :hidden])
        if ctx.observer.backward is not None:
            ctx.observer.backward(h_NF, dgu_NO)
        dgua_NQ.copy_(_product(dgu_NO, gate_up[:, : 2 * hidden, width : width + 2 * rank], rows))
        dx = None
        if ctx.needs_input_grad[3]:
            dx = _product(dgut_NO, gate_up[:, :, :width], rows)
            if weight_TK is not None:
                dx = _bag(dx, rows.slot_TK, rows.kept_TK.to(dx.dtype))
        if not learning:
            return None, None, None, dx, dweight_TK, *(None,) * 6
        x_ND = _take(x_TD, rows.token_N, _aligned_empty(gate_up_NO, width))
        A_EQD = _product(_aligned_copy(dgua_NQ).t(), x_ND, rows)  # where the tail begins is not aligned
        B_EOQ = _product(_aligned_copy(xa_NQ * scaling).t(), dgu_NO, rows).mT
        gate_up_grads = (A_EQD[:, :rank], B_EOQ[:, :hidden, :rank], A_EQD[:, rank:], B_EOQ[:, hidden:, rank:])
        return None, None, None, dx, dweight_TK, *gate_up_grads, down_A, down_B


def _product(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """Rows [N, I] times each expert's [E, I, O]; or [X, N] times [N, Y], summed over each expert's rows: [E, X, Y]."""
    product = F.grouped_mm(a, b, offs=rows.ends_E)
    if a.is_cuda and b.ndim == 2:  # sums of no rows: seen not to be zero on Blackwell (pytorch issue 172439)
        used_E11 = torch.diff(rows.ends_E, prepend=rows.ends_E.new_zeros(1)).view(-1, 1, 1) > 0
        product = torch.where(used_E11, product, 0.0)
    return product


def _take(x_TD: Tensor, token_N: Tensor | None, out_ND: Tensor) -> Tensor:
    """out = x[token]."""
    return out_ND.copy_(x_TD) if token_N is None else torch.index_select(x_TD, 0, token_N, out=out_ND)


def _bag(rows_ND: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """sum_k weight_TK * rows[slot_TK] in one pass; what weighs nothing must be finite all the same."""
    return F.embedding_bag(slot_TK, rows_ND, mode="sum", per_sample_weights=weight_TK)


def _of_rows(weight_TK: Tensor, rows: Rows) -> Tensor:
    """The weight of each row's route, [N]."""
    assert rows.token_N is not None and rows.slot_TK is not None and rows.kept_TK is not None
    weight_N = weight_TK.new_zeros(len(rows.token_N) + 1)
    slot_TK = torch.where(rows.kept_TK, rows.slot_TK, len(rows.token_N))
    return weight_N.scatter_(0, slot_TK.reshape(-1), weight_TK.reshape(-1))[:-1]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _aligned_empty(like: Tensor, columns: int) -> Tensor:
    """[N, columns] with aligned strides."""
    return like.new_empty(len(like), _aligned(columns))[:, :columns]


def _aligned_copy(x_NQ: Tensor) -> Tensor:
    return _aligned_empty(x_NQ, x_NQ.shape[1]).copy_(x_NQ)


def _with_tail(like: Tensor, num_rows: int, columns: int, used: int) -> Tensor:
    """[num_rows, columns], not filled up to `used` and zero from there on."""
    buffer = like.new_empty(num_rows, columns)
    buffer[:, used:] = 0
    return buffer
