"""The experts' hand-written forward and backward against a loop over tokens that autograd differentiates."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support import reference
from ubsmoe_ds.moe import expert_mlp
from ubsmoe_ds.moe.activations import ClampedSwish
from ubsmoe_ds.moe.expert_mlp import ExpertMLP, Observer, Rows, Weights, room, route_rows

EXPERTS, SCALING = 5, 0.7
CLAMPED = ClampedSwish(alpha=1.7, limit=0.8)
NAMES = ("y", "x", "weight", "gate A", "gate B", "up A", "up B", "down A", "down B")
SHAPES = {"small": (16, 12, 3), "rank 1": (16, 12, 1), "odd width": (16, 5, 3), "aligned": (64, 32, 8)}  # D, F, R


def routes(name: str, generator: torch.Generator) -> Tensor:
    """Return the expert of each route, [K, T], -1 where dropped."""
    chosen_KT = torch.rand(EXPERTS, 9, generator=generator).argsort(0)[:2]
    return {
        "two of five": chosen_KT,
        "some dropped": torch.where(torch.rand(2, 9, generator=generator) < 0.4, -1, chosen_KT),
        "all on one expert": torch.full((1, 9), 3),
        "empty experts at both ends": torch.tensor([[1, 1, 3, 1], [3, 3, 1, 3]]),
        "one token": torch.full((1, 1), 4),
        "no route": torch.full((2, 4), -1),
    }[name]


def rows_of(index_KT: Tensor) -> Rows:
    """Return the rows of routes, placed in the order of routes."""
    location_KT, kept_E = torch.zeros_like(index_KT), torch.zeros(EXPERTS, dtype=torch.int64)
    for k, t in torch.cartesian_prod(*(torch.arange(n) for n in index_KT.shape)).tolist():
        if (e := int(index_KT[k, t])) >= 0:
            location_KT[k, t] = kept_E[e]
            kept_E[e] += 1
    return route_rows(index_KT, location_KT, kept_E, index_KT.numel())


def inputs(shape: str, index_KT: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """Base weights; x, weights of routes and the six factors; dL/dy."""
    generator = torch.Generator().manual_seed(1)
    width, hidden, rank = SHAPES[shape]

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).div(size[-1] ** 0.5).to(dtype)

    sizes = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    base = {name: draw(EXPERTS, *size) for name, size in sizes.items()}
    factors = [f for o, i in sizes.values() for f in (draw(EXPERTS, rank, i), draw(EXPERTS, o, rank))]
    k, tokens = index_KT.shape
    weight_TK = torch.rand(tokens, k, generator=generator).to(dtype)
    return base, [3 * draw(tokens, width), weight_TK, *factors], draw(tokens, width)


def extended(base: dict[str, Tensor], factors: list[Tensor], bias: dict[str, Tensor] | None = None) -> Weights:
    """Write out [[W, s B], [A, 0]]; with biases [[W, s B, b], [A, 0, 0]] and the clamped activation."""
    gate_A, gate_B, up_A, up_B, down_A, down_B = factors
    (_, hidden, width), rank = base["gate"].shape, gate_A.shape[1]
    gate_up = torch.zeros(room(EXPERTS, 2 * hidden, width, 2 * rank + bool(bias)), dtype=gate_A.dtype)
    gate_up[:, : 2 * hidden, :width] = torch.cat([base["gate"], base["up"]], dim=1)
    down = torch.zeros(room(EXPERTS, width, hidden, rank + bool(bias)), dtype=gate_A.dtype)
    down[:, :width, :hidden] = base["down"]
    gate_up[:, :hidden, width : width + rank] = SCALING * gate_B
    gate_up[:, hidden : 2 * hidden, width + rank : width + 2 * rank] = SCALING * up_B
    gate_up[:, 2 * hidden : 2 * hidden + 2 * rank, :width] = torch.cat([gate_A, up_A], dim=1)
    down[:, :width, hidden : hidden + rank] = SCALING * down_B
    down[:, width : width + rank, :hidden] = down_A
    if bias is None:
        return Weights(lambda: gate_up, lambda: down, width, hidden, rank, SCALING)
    gate_up[:, : 2 * hidden, width + 2 * rank] = torch.cat([bias["gate"], bias["up"]], dim=1)
    down[:, :width, hidden + rank] = bias["down"]
    return Weights(lambda: gate_up, lambda: down, width, hidden, rank, SCALING, CLAMPED, biased=True)


def biases(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a bias of each projection."""
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(w.shape[:2], generator=generator).to(w.dtype) for n, w in base.items()}


def loop(
    base: dict[str, Tensor],
    leaves: list[Tensor],
    index_KT: Tensor,
    bias: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute the output token by token and route by route, in fp32 or fp64."""
    activate = reference.activate if bias else lambda _, g, u: F.silu(g) * u
    added = bias or {name: torch.zeros(weight.shape[:2]) for name, weight in base.items()}
    x, weight_TK, gate_A, gate_B, up_A, up_B, down_A, down_B = leaves
    outputs = []
    for t in range(len(x)):
        y = 0 * x[t]
        for k in range(len(index_KT)):
            if (e := int(index_KT[k, t])) >= 0:
                gate, up, down = (
                    base[name][e].to(dtype) + SCALING * B[e] @ A[e]
                    for name, A, B in (("gate", gate_A, gate_B), ("up", up_A, up_B), ("down", down_A, down_B))
                )
                b_gate, b_up, b_down = (added[name][e].to(dtype) for name in ("gate", "up", "down"))
                h = activate(CLAMPED, gate @ x[t] + b_gate, up @ x[t] + b_up)
                y = y + weight_TK[t, k] * (down @ h + b_down)
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped, biased"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "routing",
    ["two of five", "some dropped", "all on one expert", "empty experts at both ends", "one token", "no route"],
)
def test_equals_the_loop_over_tokens(routing, shape, clamped, dtype):
    """Output and all gradients: fp32 within 1e-5, bf16 within 2e-2 of the norm (one token's dot products: 4e-2).

    A clamped bf16 value may lie on the other side of the limit, where the derivative is 0: 1e-1 there.
    """
    index_KT = routes(routing, torch.Generator().manual_seed(0))
    base, values, dy = inputs(shape, index_KT, dtype)
    bias = biases(base) if clamped else None
    leaves = [value.clone().requires_grad_() for value in values]
    y = ExpertMLP.apply(extended(base, values[2:], bias), rows_of(index_KT), Observer(), *leaves)
    results = [y, *torch.autograd.grad(y, leaves, dy)]
    precise = [value.float().requires_grad_() for value in values]
    y = loop(base, precise, index_KT, bias)
    expected = [y, *torch.autograd.grad(y, precise, dy.float(), allow_unused=True)]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2 if routing == "one token" else 2e-2
    tolerance = 1e-1 if clamped and dtype == torch.bfloat16 else tolerance
    for name, ours, theirs in zip(NAMES, results, expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() <= tolerance * theirs.norm(), name


def grouped_loop(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
    """Multiply expert by expert, in any precision; torch's grouped product has no fp64."""
    ends = [0, *offs.tolist()]
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    if b.ndim == 2:
        return torch.stack([a[:, part] @ b[part] for part in parts])
    rest = a.new_zeros(len(a) - ends[-1], b.shape[2])
    return torch.cat([*(a[part] @ b[e] for e, part in enumerate(parts)), rest])


@pytest.mark.parametrize("clamped", [False, True], ids=["swiglu", "clamped, biased"])
def test_gradients_in_fp64(clamped, monkeypatch):
    """torch's gradcheck: finite differences of the output in x, the routes' weights and all factors."""
    monkeypatch.setattr(expert_mlp.F, "grouped_mm", grouped_loop)
    index_KT = routes("some dropped", torch.Generator().manual_seed(0))[:, :4]
    base, values, _ = inputs("odd width", index_KT, torch.float64)
    bias = biases(base) if clamped else None

    def output(*leaves: Tensor) -> Tensor:
        return ExpertMLP.apply(extended(base, list(leaves[2:]), bias), rows_of(index_KT), Observer(), *leaves)

    leaves = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(output, leaves)
    torch.testing.assert_close(output(*leaves), loop(base, leaves, index_KT, bias, torch.float64))


def test_frozen_factors_and_a_frozen_input_get_nothing():
    index_KT = routes("two of five", torch.Generator().manual_seed(0))
    base, values, dy = inputs("small", index_KT, torch.float32)
    wholly = [value.clone().requires_grad_() for value in values]
    expected = torch.autograd.grad(
        ExpertMLP.apply(extended(base, values[2:]), rows_of(index_KT), Observer(), *wholly), wholly, dy
    )
    for learning in ([0, 1], [2, 3, 4, 5, 6, 7]):
        leaves = [value.clone().requires_grad_(i in learning) for i, value in enumerate(values)]
        ExpertMLP.apply(extended(base, values[2:]), rows_of(index_KT), Observer(), *leaves).backward(dy)
        for i, leaf in enumerate(leaves):
            assert (leaf.grad is None) == (i not in learning)
            assert leaf.grad is None or torch.equal(leaf.grad, expected[i])


def test_factors_that_changed_since_forward_are_refused():
    """Backward reads their values from the extended weights, where autograd does not see a change."""
    index_KT = routes("two of five", torch.Generator().manual_seed(0))
    base, values, dy = inputs("small", index_KT, torch.float32)
    leaves = [value.clone().requires_grad_() for value in values]
    y = ExpertMLP.apply(extended(base, values[2:]), rows_of(index_KT), Observer(), *leaves)
    with torch.no_grad():
        leaves[3].add_(1.0)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        y.backward(dy)


def test_rows_by_hand():
    """Expert 0 keeps the route of token 1, expert 1 those of tokens 0 and 2; the rest is dropped."""
    rows = route_rows(
        torch.tensor([[1, 0, 1], [-1, -1, -1]]), torch.tensor([[0, 0, 1], [0, 0, 0]]), torch.tensor([1, 2]), 4
    )
    assert rows.ends_E.tolist() == [1, 3] and rows.ends_E.dtype == torch.int32
    assert rows.token_N[:3].tolist() == [1, 0, 2] and len(rows.token_N) == 4
    assert rows.slot_TK.tolist() == [[1, 0], [0, 0], [2, 0]]
    assert rows.kept_TK.tolist() == [[True, False], [True, False], [True, False]]


def test_observer_sees_hidden_units_and_their_gradients():
    """h = silu(g) u, and d(gate, up) as autograd has them, for rows as they are."""
    index_KT = torch.zeros(1, 4, dtype=torch.int64)
    base, values, dy = inputs("small", index_KT, torch.float32)
    seen = {}
    observer = Observer(
        lambda x, gu: seen.update(x=x.clone(), gate_up=gu.clone()), lambda h, d: seen.update(h=h.clone(), d=d.clone())
    )
    ends_E = torch.full((EXPERTS,), 4, dtype=torch.int32)
    x = values[0].clone().requires_grad_()
    y = ExpertMLP.apply(extended(base, values[2:]), Rows(ends_E), observer, x, None, *values[2:])
    y.backward(dy)
    gate_A, gate_B, up_A, up_B, down_A, down_B = (f[0] for f in values[2:])
    gate = (values[0] @ (base["gate"][0] + SCALING * gate_B @ gate_A).T).requires_grad_()
    up = (values[0] @ (base["up"][0] + SCALING * up_B @ up_A).T).requires_grad_()
    h = F.silu(gate) * up
    gradients = torch.autograd.grad(h @ (base["down"][0] + SCALING * down_B @ down_A).T, [gate, up], dy)
    torch.testing.assert_close(seen["x"], values[0])
    torch.testing.assert_close(seen["gate_up"], torch.cat([gate, up], dim=1).detach())
    torch.testing.assert_close(seen["h"], h.detach())
    torch.testing.assert_close(seen["d"], torch.cat(gradients, dim=1))
