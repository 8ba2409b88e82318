"""Test merge rules as pure functions: by hand, and against numpy, which forms the m x n products.

Shapes: C clients, N elements, U units of one shape, m x n a unit's Delta W, R LoRA rank.
"""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests.support.factors import delta, one_unit, random_factors, unit_of
from ubsmoe_ds.aggregation import rules

quarter_cut = partial(rules.trimmed_mean, trim=0.25)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


@pytest.mark.parametrize(
    "weights, expected",
    [
        ([[1.0], [3.0]], [5.0, -1.0, 7.75]),
        ([[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]], [5.0, -4.0, 0.0]),
        ([[0.0], [0.0]], [0.0, 0.0, 0.0]),
    ],
)
def test_fedavg(weights, expected):
    """(1 * 2 + 3 * 6) / 4 = 5, (1 * -4 + 3 * 0) / 4 = -1, (7 + 3 * 8) / 4 = 7.75.

    Where one client counts its update is the mean; where none counts the mean is 0.
    """
    update_CN = torch.tensor([[2.0, -4.0, 7.0], [6.0, 0.0, 8.0]])
    assert_close(rules.fedavg(update_CN, torch.tensor(weights)), torch.tensor(expected))


@pytest.mark.parametrize("weights", [[[-1.0], [2.0]], [[math.nan], [1.0]], [[math.inf], [1.0]]])
def test_fedavg_refuses_impossible_weights(weights):
    with pytest.raises(ValueError, match="client weights"):
        rules.fedavg(torch.ones(2, 3), torch.tensor(weights))


def test_fedavg_sums_bf16_in_fp32():
    """256 + 1 is 256 in bf16, but the mean of 256 and 1 twice is 86 (bf16 of 86.0)."""
    stack = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    merged = rules.fedavg(stack, torch.ones(3, 1))
    assert merged.dtype == torch.bfloat16 and merged.item() == 86.0


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("weights", [[1.0, 2.0], [[1.0], [2.0]], [[1.0, 1.0], [2.0, 2.0]]])
def test_shares_refuse_bad_weights(weights, bad):
    weight_C = torch.tensor(weights)
    assert_close(rules.shares(weight_C), weight_C.double() / 3)
    weight_C.view(-1)[-1] = bad
    with pytest.raises(ValueError, match="client weights"):
        rules.shares(weight_C)


@pytest.mark.parametrize(
    "temperature, weights, expected",
    [
        (0, [[1.0, 1.0, 0.0], [3.0, 0.0, 0.0]], [5.0, 5.0, 0.0]),
        (1, [[0.5, 0.2, 0.0], [0.75, 0.0, 0.0]], [4.4, 5.0, 0.0]),
        (2, [[0.25, 0.04, 0.0], [0.1875, 0.0, 0.0]], [26 / 7, 5.0, 0.0]),
    ],
)
def test_activation_weight(temperature, weights, expected):
    """Data weights 1 and 3; expert 0 used 1/2 and 1/4 of the time, expert 1 by one client, expert 2 by none.

    Expert 0, updates 2 and 6: t = 0: (1 * 2 + 3 * 6) / 4 = 5; t = 1: (1/2 * 2 + 3/4 * 6) / (5/4) = 4.4;
    t = 2: (1/4 * 2 + 3/16 * 6) / (7/16) = 26/7. The expert that no client used gets a zero update.
    """
    used_CU = torch.tensor([[0.5, 0.2, 0.0], [0.25, 0.0, 0.0]])
    weight_CU = rules.activation_weight(torch.tensor([1.0, 3.0]), used_CU, temperature)
    assert_close(weight_CU, torch.tensor(weights))
    update_CU = torch.tensor([[2.0, 5.0, 9.0], [6.0, 7.0, 9.0]])
    assert_close(rules.fedavg(update_CU, weight_CU), torch.tensor(expected))


@pytest.mark.parametrize(
    "rule, updates, weights, expected",
    [
        (rules.coordinate_median, (9, -1, 5), (1, 1, 1), 5),
        (rules.coordinate_median, (100, 1, 4, 2), (1, 9, 1, 1), 3),
        (rules.coordinate_median, (100, 1, 2), (0, 3, 1), 1.5),
        (rules.coordinate_median, (-100, 7), (0, 3), 7),
        (rules.coordinate_median, (1, 2), (0, 0), 0),
        (quarter_cut, (50, 1, -100, 3), (1, 9, 1, 1), 2),
        (quarter_cut, (50, 1000, 1, -100, 3), (1, 0, 1, 1, 1), 2),
        (quarter_cut, (1, 1000, 2, 6), (1, 0, 1, 1), 3),
        (quarter_cut, (1, 2), (0, 0), 0),
    ],
)
def test_robust_rules(rule, updates, weights, expected):
    """Median: the middle, or (2 + 4) / 2. Trimmed mean: (1 + 3) / 2; of three clients floor(3/4) = 0 are cut: 9 / 3.

    Clients of weight 0 do not count, in all elements or in one element; other weights' sizes do not matter.
    """
    update_C1, weight_C1 = column(*updates), column(*weights)
    assert_close(rule(update_C1, weight_C1), torch.tensor([float(expected)]))
    everyone = rule(update_C1, torch.ones_like(weight_C1))
    both = rule(update_C1.expand(-1, 2), torch.cat([weight_C1, torch.ones_like(weight_C1)], dim=1))
    assert_close(both, torch.tensor([float(expected), everyone.item()]))


def test_trimmed_mean_cuts_what_the_share_says():
    """0.21 * 300 = 63 values are cut at either end; fp32 gives 62.99999, which would cut 62."""
    merged = rules.trimmed_mean(column(*range(300)) ** 2, torch.ones(300, 1), 0.21)
    assert merged.item() == pytest.approx(np.mean(np.arange(63, 237) ** 2), rel=1e-5)


def test_clip_factors():
    """Clip to a norm of 1: 5 * 0.2, 2 * 0.5; smaller norms and zero stay."""
    norm_CU = torch.tensor([[5.0, 0.5], [0.0, 2.0]])
    assert_close(rules.clip_factors(norm_CU, 1.0), torch.tensor([[0.2, 1.0], [1.0, 0.5]]))


def test_resize():
    factors = one_unit([[1, 2, 0], [3, 4, 0]], [[5, 6]])
    assert_close(rules.resize(factors, 1), one_unit([[1, 2, 0]], [[5]]))
    assert_close(rules.resize(factors, 2), factors)
    assert_close(rules.resize(factors, 3), one_unit([[1, 2, 0], [3, 4, 0], [0, 0, 0]], [[5, 6, 0]]))


PADDED = [one_unit([[2, 0]], [[4]]), one_unit([[6, 4], [8, 0]], [[0, 2]])]
NORMS_5_AND_15 = [one_unit([[3, 4]], [[1]]), one_unit([[1, 0], [0, 1]], [[9, 12]])]
NO_NORMS = [one_unit([[4, 0]], [[0]]), one_unit([[8, 4]], [[0]])]
STACKED = [one_unit([[1, 2]], [[1], [0]]), one_unit([[4, 0]], [[2], [1]])]


@pytest.mark.parametrize(
    "rule, clients, weights, A_Rn, B_mR",
    [
        (rules.zero_pad, PADDED, (1, 3), [[5, 3], [6, 0]], [[1, 1.5]]),
        (rules.hetlora, NORMS_5_AND_15, (7, 1), [[1.5, 1], [0, 0.75]], [[7, 9]]),
        (rules.hetlora, NORMS_5_AND_15, (7, 0), [[3, 4], [0, 0]], [[1, 0]]),
        (rules.hetlora, NO_NORMS, (1, 3), [[7, 3]], [[0]]),
        (rules.flora, STACKED, (1, 3), [[0.25, 0.5], [3, 0]], [[1, 2], [0, 1]]),
    ],
)
def test_factors(rule, clients, weights, A_Rn, B_mR):
    """zero_pad: (2 + 3 * 6) / 4 = 5, (0 + 3 * 4) / 4 = 3; the padded row: (0 + 3 * 8) / 4 = 6, (0 + 3 * 2) / 4 = 1.5.

    hetlora: B A = (3, 4) and (9, 12), so weights 1/4 and 3/4 for any nonzero data weights; where all norms
    are zero the data weights decide: (4 + 3 * 8) / 4 = 7. flora: the weights 1/4 and 3/4 go into A.
    """
    assert_close(rule(clients, column(*weights)), one_unit(A_Rn, B_mR))


@pytest.mark.parametrize("energy, kept", [(0.6, [3, 0, 0]), (0.9, [3, 2, 0]), (0.93, [3, 2, 1]), (1.0, [3, 2, 1])])
def test_florist(energy, kept):
    """The mean of diag(6, 4, 0) and diag(0, 0, 2) is diag(3, 2, 1): 9 / 14 = 0.643 and (9 + 4) / 14 = 0.929."""
    clients = [one_unit([[0, 1, 0], [1, 0, 0]], [[0, 6], [4, 0], [0, 0]]), one_unit([[0, 0, 1]], [[0], [0], [2]])]
    merged = rules.florist(clients, column(1, 1), energy)
    assert_close(delta(merged)[0], torch.diag(torch.tensor(kept).float()))
    assert_close(merged.B_UmR.norm(dim=1)[0], torch.tensor(kept).float())


def test_florist_keeps_unlearned_units_trainable():
    """Where B = 0, as for an expert that no client has used yet, A must not become zero too."""
    merged = rules.florist([one_unit([[1, 2]], [[0], [0]])] * 2, column(1, 1), energy=0.9)
    assert (merged.B_UmR == 0).all() and (merged.A_URn.norm(dim=2) > 0.99).all()


RANKS = (1, 2, 4, 8)
assert_near = partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)


@pytest.fixture(params=[1, 5], ids="U={}".format)
def units(request):
    return request.param


@pytest.fixture(params=[(40, 30), (20, 10), (10, 20), (12, 10)], ids=str)
def clients_and_svd(request, units):
    """Return clients of RANKS, weights with a zero, and numpy's SVD of sum w_c B_c A_c. The stack has LoRA rank 15."""
    generator = torch.Generator().manual_seed(0)
    clients = [random_factors(units, *request.param, rank, generator) for rank in RANKS]
    weight_CU = torch.rand(len(RANKS), units, generator=generator) + 0.2
    weight_CU[1, 0] = 0
    wide_CU = weight_CU.double().numpy()
    product_CUmn = np.stack([f.B_UmR.double().numpy() @ f.A_URn.double().numpy() for f in clients])
    direct_Umn = np.einsum("cu,cumn->umn", wide_CU / wide_CU.sum(axis=0), product_CUmn)
    return clients, weight_CU, np.linalg.svd(direct_Umn, full_matrices=False)


def truncated(svd, rank):
    U, S, Vh = svd
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def test_flora_and_delta_norm_equal_numpy(clients_and_svd):
    clients, weight_CU, svd = clients_and_svd
    merged = rules.flora(clients, weight_CU)
    assert merged.A_URn.shape[1] == merged.B_UmR.shape[2] == sum(RANKS)
    assert_near(delta(merged), truncated(svd, sum(RANKS)))
    for factors in (*clients, merged):
        assert_near(rules.delta_norm(factors), np.linalg.norm(delta(factors).numpy(), axis=(1, 2)))


def test_flexlora_equals_numpy(clients_and_svd):
    """The first LoRA ranks are the truncated SVD: rows of A are orthonormal, columns of B orthogonal with norms S."""
    clients, weight_CU, svd = clients_and_svd
    A_URn, B_UmR = merged = rules.flexlora(clients, weight_CU)
    for rank in (*RANKS, sum(RANKS)):
        assert_near(delta(rules.resize(merged, rank)), truncated(svd, rank))
    eye_RR = np.eye(A_URn.shape[1])
    assert_near(A_URn @ A_URn.mT, np.broadcast_to(eye_RR, (len(A_URn), *eye_RR.shape)))
    assert_near(B_UmR.mT @ B_UmR, np.square(svd.S[:, None, : len(eye_RR)]) * eye_RR)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_florist_equals_numpy(clients_and_svd, energy):
    """Each unit has the LoRA rank and the product that the energy cut of the direct singular values gives."""
    clients, weight_CU, (U, S_UR, Vh) = clients_and_svd
    merged = rules.florist(clients, weight_CU, energy)
    rank_U = (np.cumsum(S_UR**2, axis=1) < energy * np.sum(S_UR**2, axis=1, keepdims=True)).sum(axis=1) + 1
    for unit, p in enumerate(rank_U):
        assert (merged.B_UmR[unit].norm(dim=0) > 0).sum() == p
        assert_near(
            merged.A_URn[unit].norm(dim=1), np.ones(merged.A_URn.shape[1])
        )  # the LoRA ranks that were cut can be learned again
        assert_near(delta(unit_of(merged, unit))[0], truncated((U[unit], S_UR[unit], Vh[unit]), p))
