"""The trainable state of a model as a list of units, and the flat buffer of those that one rank holds.

Units of a layer, in order: for each projection every expert's LoRA (A then B), the router, the attention adapters, and
one for DMR: phi and, in the same message, the layer's utilisation. All are sent as updates (local minus shared) but
DMR's, which are sent as they are, because the server's step needs phi itself.

Shapes: L layers, E experts of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ubsmoe_ds.federation.exchange import Unit
from ubsmoe_ds.gradients import MasterWeights
from ubsmoe_ds.models.olmoe import ATTENTION_PROJECTIONS, LoraLinear, UBSMoEForCausalLM
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS

DMR_SUFFIX = ".dmr"


@dataclass(frozen=True)
class _Block:
    """Parameters whose rows side by side are `rows` consecutive units; DMR's has one more row part, the utilisation."""

    parameters: tuple[nn.Parameter, ...]
    rows: int
    place: slice  # in the held buffer
    dmr: bool = False


class UnitStore:
    """Reads and writes the units of this rank as one flat fp32 buffer on the CPU, in unit order.

    Args:
        model: the converted model of this client.
        masters: its fp32 values.
    """

    def __init__(self, model: UBSMoEForCausalLM, masters: MasterWeights) -> None:
        self.masters = masters
        self.units: list[Unit] = []
        self._blocks: list[_Block] = []
        self._held_names: list[str] = []
        for index, decoder in enumerate(model.decoders):
            self._add_layer(f"layers.{index}", decoder.mlp, decoder.self_attn)
        self.shared = self._pack()

    def updates(self, utilisation_LE: Tensor) -> Tensor:
        """What this rank sends: local minus shared state; for DMR phi and the client's utilisation as they are.

        A collective over the client under ZeRO.
        """
        update = self._pack() - self.shared
        for block, utilisation_E in zip(self._dmr_blocks(), utilisation_LE.float().cpu(), strict=True):
            phi_E = update[block.place].chunk(2)[0] + self.shared[block.place].chunk(2)[0]
            update[block.place] = torch.cat([phi_E, utilisation_E])
        return update

    def apply(self, merged: Tensor) -> Tensor:
        """Make the merged state the new shared state and load it; returns the global utilisation [L, E]."""
        new = self.shared + merged
        utilisation = []
        for block in self._dmr_blocks():
            phi_E, utilisation_E = merged[block.place].chunk(2)
            utilisation.append(utilisation_E.clone())
            new[block.place] = torch.cat([phi_E, torch.zeros_like(utilisation_E)])
        self.shared = new
        for block in self._blocks:
            values = new[block.place].view(block.rows, -1)
            columns = [p.numel() // block.rows for p in block.parameters]
            for parameter, value in zip(block.parameters, values[:, : sum(columns)].split(columns, dim=1), strict=True):
                if parameter.requires_grad:
                    self.masters.write(parameter, value.reshape(parameter.shape).to(parameter.device))
        return torch.stack(utilisation)

    def named_tensors(self) -> dict[str, Tensor]:
        """The shared state of this rank, one flat fp32 tensor a unit it holds."""
        found = {}
        held = iter(self._held_names)
        for block in self._blocks:
            for row in self.shared[block.place].view(block.rows, -1):
                found[next(held)] = row.clone()
        return found

    def _add_layer(self, name: str, layer: UBSMoE, attention: nn.Module) -> None:
        first = layer.experts.first
        for projection in PROJECTIONS:
            pair = layer.experts.factors()[projection]
            numel = sum(p[0].numel() for p in pair)
            names = [f"{name}.experts.{expert}.{projection}" for expert in range(layer.num_experts)]
            self.units += [Unit(unit, numel, expert) for expert, unit in enumerate(names)]
            self._add_block(pair, names[first : first + len(pair[0])])
        if layer.gate.wg.weight.requires_grad:
            self._add_dense(f"{name}.router", (layer.gate.wg.weight,))
        for projection in ATTENTION_PROJECTIONS:
            linear = getattr(attention, projection)
            if isinstance(linear, LoraLinear):
                self._add_dense(f"{name}.attention.{projection}", (linear.lora_A, linear.lora_B))
        phi = layer.gate.phi
        self.units.append(Unit(name + DMR_SUFFIX, 2 * phi.numel()))
        self._add_block((phi,), [name + DMR_SUFFIX], dmr=True)

    def _add_dense(self, name: str, parameters: tuple[nn.Parameter, ...]) -> None:
        self.units.append(Unit(name, sum(p.numel() for p in parameters)))
        self._add_block(parameters, [name])

    def _add_block(self, parameters: tuple[nn.Parameter, ...], names: list[str], dmr: bool = False) -> None:
        numel = sum(p.numel() for p in parameters) * (2 if dmr else 1)
        start = self._blocks[-1].place.stop if self._blocks else 0
        self._blocks.append(_Block(parameters, len(names), slice(start, start + numel), dmr))
        self._held_names += names

    def _dmr_blocks(self) -> list[_Block]:
        return [block for block in self._blocks if block.dmr]

    def _pack(self) -> Tensor:
        """Current values, [numel held]; the utilisation places are zero."""
        parts = []
        for block in self._blocks:
            values = [self._read(p).view(block.rows, -1) for p in block.parameters]
            parts.append(torch.cat(values + [torch.zeros_like(values[0])] * block.dmr, dim=1).reshape(-1))
        return torch.cat(parts)

    def _read(self, parameter: nn.Parameter) -> Tensor:
        """fp32 on the CPU; phi without DMR is frozen, has no master and never changes."""
        return self.masters.read(parameter).cpu() if parameter.requires_grad else parameter.detach().float().cpu()
