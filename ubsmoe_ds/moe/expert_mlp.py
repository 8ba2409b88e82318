"""Gated experts with LoRA on rows sorted by expert: forward and backward by hand, as grouped matrix products.

A row is one route of a token. Rows of an expert lie side by side; only the device knows how many. So there is no
padding, no host synchronisation and no loop over experts of ours. (torch's grouped product is one kernel on CUDA for
bf16 on Hopper or newer; elsewhere torch itself loops over the experts, and on CUDA reads their numbers of rows first.)

LoRA makes no pass of its own over the rows, because a projection y = W x + s B A x is one product with an extended
weight, forward and backward:

    [x, A x] [W, s B]^T        [dy, s B^T dy] [W; A]        with [[W, s B], [A, 0]] kept as one matrix per expert.

A bias is one more column, and x has a 1 there: [x, A x, 1] [W, s B, b]^T.

A *tail* below is the part behind x, h or a gradient: A x, A h or s B^T dy, then zeros up to an aligned width.

Shapes: T tokens, K experts per token, N rows, E local experts, D model width, F expert width, R LoRA rank, I and O the
inputs and outputs of a projection (gate and up are one of O = 2 F), Q its LoRA columns (2 R, or R for down).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ubsmoe_ds.moe.activations import SWIGLU, Activation

ALIGNMENT = 8  # elements; grouped products want strides that are multiples of 16 bytes


class Rows(NamedTuple):
    """Which rows belong to which expert and route.

    ends_E: int32, where each expert's rows end; rows behind the last end belong to no expert and hold anything
    token_N: the token of each row
    slot_TK: the row of each route, 0 where the route was dropped; kept_TK: False where it was dropped
    Without token_N, slot_TK and kept_TK, rows come and go as they are: under expert parallelism.
    """

    ends_E: Tensor
    token_N: Tensor | None = None
    slot_TK: Tensor | None = None
    kept_TK: Tensor | None = None


def route_rows(index_KT: Tensor, location_KT: Tensor, kept_E: Tensor, num_rows: int) -> Rows:
    """Assign rows to the routes, where all experts are on this rank.

    Args:
        index_KT: expert of each route, -1 where it was dropped.
        location_KT: its place among the kept routes of the expert.
        kept_E: number of routes that each expert keeps.
        num_rows: at least the sum of `kept_E`; known without asking the device.
    """
    k, tokens = index_KT.shape
    kept_KT = index_KT >= 0
    ends_E = kept_E.cumsum(0)
    slot_KT = torch.where(kept_KT, (ends_E - kept_E)[index_KT] + location_KT, num_rows)
    token_N = torch.zeros(num_rows + 1, dtype=torch.int64, device=index_KT.device)
    token_N.scatter_(0, slot_KT.reshape(-1), torch.arange(tokens, device=index_KT.device).repeat(k))
    slot_TK = torch.where(kept_KT, slot_KT, 0).t().contiguous()
    ends_E[-1:].clamp_(min=1)  # without any route, row 0 is token 0: dropped routes point at it, it must be finite
    return Rows(ends_E.int(), token_N[:-1], slot_TK, kept_KT.t().contiguous())


def room(experts: int, outputs: int, inputs: int, columns: int) -> tuple[int, int, int]:
    """Return the shape of [[W, s B, b], [A, 0, 0]], with W [outputs, inputs] and `columns` columns behind it, aligned.

    What is not W, s B, b or A is zero.
    """
    return experts, _aligned(outputs + columns), _aligned(inputs + columns)


class Weights(NamedTuple):
    """The local experts' frozen weights, extended by the scaled LoRA factors.

    gate_up: gives [[W_gate, s B_gate, 0], [W_up, 0, s B_up], [A_gate, 0, 0], [A_up, 0, 0]]; down: [[W, s B], [A, 0]].
    A matrix is valid until the next is asked for, because quantised weights have one buffer for all.
    biased: whether the column behind s B holds biases
    """

    gate_up: Callable[[], Tensor]
    down: Callable[[], Tensor]
    width: int  # D
    hidden: int  # F
    lora_rank: int
    scaling: float
    activation: Activation = SWIGLU
    biased: bool = False


class Observer(NamedTuple):
    """Functions to call during a pass: forward(x_ND, gate_up_NO), backward(h_NF, dL/d gate_up_NO)."""

    forward: Callable[[Tensor, Tensor], None] | None = None
    backward: Callable[[Tensor, Tensor], None] | None = None


class ExpertMLP(torch.autograd.Function):
    """y = sum over a token's kept routes of weight * expert(x); without routes, y = expert(x) of each row.

    The six factors (A, B of gate, up, down) are arguments so that they get gradients; their values are read from
    `weights`. Only what products give is saved of the rows; x, silu(g) and h are cheaper to make again.
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
        _, _, width, hidden, rank, _, activation, biased = weights
        gate_up = weights.gate_up()
        # [x, A x] of each row
        xt_NI = _with_tail(x_TD, len(x_TD) if rows.token_N is None else len(rows.token_N), gate_up.shape[2], width)
        x_ND, xa_NQ = xt_NI[:, :width], xt_NI[:, width : width + 2 * rank]
        _take(x_TD, rows.token_N, x_ND)
        xa_NQ.copy_(_product(x_ND, gate_up[:, 2 * hidden : 2 * hidden + 2 * rank, :width].mT, rows))
        if biased:
            xt_NI[:, width + 2 * rank] = 1
        # g and u: W x + s B A x of both projections at once
        gate_up_NO = _product(xt_NI, gate_up[:, : 2 * hidden].mT, rows)
        if observer.forward is not None:
            observer.forward(x_ND, gate_up_NO)
        # [h, A h] with h = a(g) b(u), silu(g) u for most
        down = weights.down()
        ht_NI = _with_tail(x_TD, len(xt_NI), down.shape[2], hidden)
        h_NF, ha_NQ = ht_NI[:, :hidden], ht_NI[:, hidden : hidden + rank]
        factor_NF = activation.factor(gate_up_NO[:, :hidden])
        activation.hidden(factor_NF, gate_up_NO[:, hidden:], out=h_NF)
        ha_NQ.copy_(_product(h_NF, down[:, width : width + rank, :hidden].mT, rows))
        if biased:
            ht_NI[:, hidden + rank] = 1
        ctx.weights, ctx.rows, ctx.observer = weights, rows, observer
        ctx.factors, ctx.versions = factors, [factor._version for factor in factors]
        ctx.save_for_backward(x_TD, xa_NQ.clone(), gate_up_NO, ha_NQ.clone(), weight_TK)
        # y = W h + s B A h of each row, then the weighted sum over a token's routes
        down_EID = down[:, :width].mT
        if weight_TK is None:
            return _product(ht_NI, down_EID, rows)
        assert rows.slot_TK is not None and rows.kept_TK is not None
        return summed_down(ht_NI, down_EID, rows.ends_E, rows.slot_TK, weight_TK.detach() * rows.kept_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # noqa: D102
        if [factor._version for factor in ctx.factors] != ctx.versions:
            raise RuntimeError("LoRA factors were changed between forward and backward")
        x_TD, xa_NQ, gate_up_NO, ha_NQ, weight_TK = ctx.saved_tensors
        rows, weights = ctx.rows, ctx.weights
        learning = any(ctx.needs_input_grad[5:])
        # down: dL/dh before the route's weight, and dL/dweight = dL/dh . h without a bias
        down = weights.down()
        dy_ND, dya_NQ, dh_NF = _through_down(gradients[0], down, weights, rows, gate_up_NO)
        factor_NF = weights.activation.factor(gate_up_NO[:, : weights.hidden])
        up_NF, h_NF = gate_up_NO[:, weights.hidden :], _aligned_empty(gate_up_NO, weights.hidden)
        weights.activation.hidden(factor_NF, up_NF, out=h_NF)
        dweight_TK = None
        if weight_TK is not None:
            if ctx.needs_input_grad[4]:
                dot_N = torch.linalg.vecdot(dh_NF, h_NF)
                if weights.biased:  # dL/dweight = dy . (W h + s B A h + b)
                    dot_N = dot_N + torch.linalg.vecdot(dy_ND, _down_bias(down, weights, rows, len(dy_ND)))
                dweight_TK = torch.where(rows.kept_TK, dot_N[rows.slot_TK], 0.0)
            # the route's weight scales dy: taken into dL/dh, and into one factor each of dA and dB
            weight_N1 = _of_rows(weight_TK, rows).unsqueeze(1)
            dh_NF.mul_(weight_N1)
            ha_NQ, dya_NQ = ha_NQ * weight_N1, dya_NQ * weight_N1
        if learning:  # dA = (s B^T dy)^T h, dB = dy^T (s A h)
            down_A = _product(_aligned_copy(dya_NQ).t(), h_NF, rows)
            down_B = _product(_aligned_copy(ha_NQ * weights.scaling).t(), dy_ND, rows).mT
        # the activation: dL/dg and dL/du, [dh u silu'(g), dh silu(g)] for most, with an empty tail
        gate_up, width = weights.gate_up(), weights.width
        dgut_NO = _with_tail(gate_up_NO, len(gate_up_NO), gate_up.shape[1], 2 * weights.hidden)
        dgate_NF, dup_NF = dgut_NO[:, : 2 * weights.hidden].split(weights.hidden, dim=1)
        weights.activation.backward(dh_NF, factor_NF, gate_up_NO[:, : weights.hidden], up_NF, dgate_NF, dup_NF)
        del factor_NF  # before the gradients of x take as much room
        dgu_NO, dgua_NQ = dgut_NO[:, : 2 * weights.hidden], dgut_NO[:, 2 * weights.hidden :][:, : 2 * weights.lora_rank]
        if ctx.observer.backward is not None:
            ctx.observer.backward(h_NF, dgu_NO)
        # gate and up: the tail s B^T dgu, then dL/dx = W^T dgu + A^T (s B^T dgu), summed over a token's routes
        dgua_NQ.copy_(_product(dgu_NO, gate_up[:, : 2 * weights.hidden, width : width + 2 * weights.lora_rank], rows))
        dx = None
        if ctx.needs_input_grad[3]:
            dx = _product(dgut_NO, gate_up[:, :, :width], rows)
            if weight_TK is not None:
                dx = _bag(dx, rows.slot_TK, rows.kept_TK.to(dx.dtype))
        if not learning:
            return None, None, None, dx, dweight_TK, *(None,) * 6
        gate_up_grads = _gate_up_gradients(weights, rows, x_TD, xa_NQ, dgu_NO, dgua_NQ)
        return None, None, None, dx, dweight_TK, *gate_up_grads, down_A, down_B


@torch.library.custom_op("ubsmoe_ds::summed_down", mutates_args=())
def summed_down(h_NI: Tensor, down_EID: Tensor, ends_E: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return the weighted sum over a token's routes of its rows' products, [T, D].

    An operation of its own, so that activation checkpointing can keep its result, which is small: nothing in backward
    needs what it multiplies.
    """
    return _bag(_product(h_NI, down_EID, Rows(ends_E)), slot_TK, weight_TK)


@summed_down.register_fake
def _(h_NI: Tensor, down_EID: Tensor, ends_E: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    return h_NI.new_empty(len(slot_TK), down_EID.shape[2])


def _through_down(
    dy_TD: Tensor, down: Tensor, weights: Weights, rows: Rows, like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dy, s B^T dy, dL/dh = W^T dy + A^T (s B^T dy)) of each row, without the routes' weights."""
    width, hidden, rank = weights.width, weights.hidden, weights.lora_rank
    dyt_NO = _with_tail(like, len(like), down.shape[1], width)
    dy_ND, dya_NQ = dyt_NO[:, :width], dyt_NO[:, width : width + rank]
    _take(dy_TD, rows.token_N, dy_ND)
    scaled_B_ERD = down[:, :width, hidden : hidden + rank].mT.contiguous()  # twice as fast as columns far apart
    dya_NQ.copy_(_product(dy_ND, scaled_B_ERD.mT, rows))
    return dy_ND, dya_NQ, _product(dyt_NO, down[:, :, :hidden], rows)


def _down_bias(down: Tensor, weights: Weights, rows: Rows, num_rows: int) -> Tensor:
    """Return the bias of each row's expert, [N, D]."""
    expert_N = torch.searchsorted(
        rows.ends_E, torch.arange(num_rows, device=down.device, dtype=torch.int32), right=True
    )
    return down[:, : weights.width, weights.hidden + weights.lora_rank][expert_N.clamp_(max=len(down) - 1)]


def _gate_up_gradients(
    weights: Weights, rows: Rows, x_TD: Tensor, xa_NQ: Tensor, dgu_NO: Tensor, dgua_NQ: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dA = (s B^T dgu)^T x and dB = dgu^T (s A x) of gate, then of up.

    Gate and up are one product with A stacked; of B only the two blocks on the diagonal are theirs.
    """
    hidden, rank = weights.hidden, weights.lora_rank
    x_ND = _take(x_TD, rows.token_N, _aligned_empty(dgu_NO, weights.width))
    A_EQD = _product(_aligned_copy(dgua_NQ).t(), x_ND, rows)  # where the tail begins is not aligned
    B_EOQ = _product(_aligned_copy(xa_NQ * weights.scaling).t(), dgu_NO, rows).mT
    return A_EQD[:, :rank], B_EOQ[:, :hidden, :rank], A_EQD[:, rank:], B_EOQ[:, hidden:, rank:]


def _product(a: Tensor, b: Tensor, rows: Rows) -> Tensor:
    """Multiply rows [N, I] by their expert's matrix of [E, I, O]; or, expert by expert, [X, N] by [N, Y]: [E, X, Y]."""
    product = F.grouped_mm(a, b, offs=rows.ends_E)
    if a.is_cuda and b.ndim == 2:  # sums over no rows were seen not to be zero on Blackwell (pytorch issue 172439)
        used_E11 = torch.diff(rows.ends_E, prepend=rows.ends_E.new_zeros(1)).view(-1, 1, 1) > 0
        product = torch.where(used_E11, product, 0.0)
    return product


def _take(x_TD: Tensor, token_N: Tensor | None, out_ND: Tensor) -> Tensor:
    """Copy x[token] to out and return it."""
    return out_ND.copy_(x_TD) if token_N is None else torch.index_select(x_TD, 0, token_N, out=out_ND)


def _bag(rows_ND: Tensor, slot_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Return sum_k weight_TK * rows[slot_TK] in one pass; rows of weight 0 must be finite too."""
    return F.embedding_bag(slot_TK, rows_ND, mode="sum", per_sample_weights=weight_TK)


def _of_rows(weight_TK: Tensor, rows: Rows) -> Tensor:
    """Return the weight of each row's route, [N]."""
    assert rows.token_N is not None and rows.slot_TK is not None and rows.kept_TK is not None
    weight_N = weight_TK.new_zeros(len(rows.token_N) + 1)
    slot_TK = torch.where(rows.kept_TK, rows.slot_TK, len(rows.token_N))
    return weight_N.scatter_(0, slot_TK.reshape(-1), weight_TK.reshape(-1))[:-1]


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT


def _aligned_empty(like: Tensor, columns: int) -> Tensor:
    """Return an empty [N, columns] with aligned strides."""
    return like.new_empty(len(like), _aligned(columns))[:, :columns]


def _aligned_copy(x_NQ: Tensor) -> Tensor:
    return _aligned_empty(x_NQ, x_NQ.shape[1]).copy_(x_NQ)


def _with_tail(like: Tensor, num_rows: int, columns: int, used: int) -> Tensor:
    """Return [num_rows, columns], not filled up to `used` and zero from there on."""
    buffer = like.new_empty(num_rows, columns)
    buffer[:, used:] = 0
    return buffer
