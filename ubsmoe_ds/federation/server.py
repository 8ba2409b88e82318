"""What an owner does with the stack of updates of its units: merge them, then DMR's step on phi.

Shapes: C clients, N elements of the owned units, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ubsmoe_ds.federation import modulation
from ubsmoe_ds.federation.exchange import Unit
from ubsmoe_ds.federation.merge import MergeRule
from ubsmoe_ds.federation.units import DMR_SUFFIX
from ubsmoe_ds.sections import DmrConfig


@dataclass(frozen=True)
class Server:
    """The aggregator's arithmetic; every rank has one and applies it to the units it owns.

    rule: see `merge.py`; weights: w_c, summing to one; target: u*; dmr: the config's section.
    """

    units: Sequence[Unit]
    rule: MergeRule
    weights: Sequence[float]
    target: float
    dmr: DmrConfig

    def merge_owned(self, owned: range, update_CN: np.ndarray) -> np.ndarray:
        """The merged value of each owned unit, [N] fp32; `Exchange.merge` calls this."""
        merged_N = self.rule(torch.from_numpy(update_CN), torch.tensor(self.weights))
        start = 0
        for index in owned:
            unit = self.units[index]
            if self.dmr.enabled and unit.name.endswith(DMR_SUFFIX):
                phi_E, utilisation_E = merged_N[start : start + unit.numel].chunk(2)
                phi_E.copy_(modulation.server_step(phi_E, utilisation_E, self.target, self.dmr.zeta, self.dmr.eps))
            start += unit.numel
        return merged_N.numpy()
