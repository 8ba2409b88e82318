"""Make, multiply and split LoRA factors for the tests of the merge rules.

Shapes: U units of one shape, m x n a unit's Delta W, R LoRA rank.
"""

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.rules import Factors


def one_unit(A_Rn: list, B_mR: list) -> Factors:
    return Factors(torch.tensor([A_Rn], dtype=torch.float32), torch.tensor([B_mR], dtype=torch.float32))


def random_factors(units: int, m: int, n: int, rank: int, generator: torch.Generator) -> Factors:
    A_URn = torch.randn(units, rank, n, generator=generator)
    return Factors(A_URn, torch.randn(units, m, rank, generator=generator) / rank)


def delta(factors: Factors) -> Tensor:
    return factors.B_UmR @ factors.A_URn


def unit_of(factors: Factors, unit: int) -> Factors:
    return Factors(*(part[unit : unit + 1] for part in factors))
