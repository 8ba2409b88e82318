"""The trainable state of a model as a list of units, and the flat buffer of those that one rank holds.

Units of a layer, in order: for each projection every expert's LoRA (A then B), the router, the attention adapters, and
one for DMR: phi and, in the same message, the layer's utilisation. All are sent as updates (local minus shared) but
DMR's, which are sent as they are, because the server's step needs phi itself.

Shapes: L layers, E experts of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ubsmoe_ds.federation.exchange import Unit
from ubsmoe_ds.gradients import MasterWeights
from ubsmoe_ds.models.olmoe import ATTENTION_PROJECTIONS, LoraLinear, UBSMoEForCausalLM
from ubsmoe_ds.moe.layer import UBSMoE
from ubsmoe_ds.moe.pseudo_gradient import PROJECTIONS

DMR_SUFFIX = ".dmr"


@dataclass(frozen=True)
class _Block:
    """Named parameters whose rows side by side are `rows` consecutive units of the held buffer.

    DMR's block has one more part in its row, the utilisation. `group` is set where other ranks hold other rows.
    """

    parameters: dict[str, nn.Parameter]
    rows: int
    place: slice  # in the held buffer
    group: ProcessGroup | None = None
    dmr: bool = False

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """This block's part of a held buffer, one tensor for each parameter, in its shape."""
        columns = [p.numel() // self.rows for p in self.parameters.values()]
        values = flat[self.place].view(self.rows, -1)[:, : sum(columns)].split(columns, dim=1)
        return {n: v.reshape(p.shape) for (n, p), v in zip(self.parameters.items(), values, strict=True)}


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
            for name, value in block.split(new).items():
                parameter = block.parameters[name]
                if parameter.requires_grad:
                    self.masters.write(parameter, value.to(parameter.device))
        return torch.stack(utilisation)

    def full_state(self) -> dict[str, Tensor]:
        """The shared state of the whole model by parameter, experts stacked [E, ...], fp32 on the CPU.

        A collective over the expert groups of the client.
        """
        found = {}
        for block in self._blocks:
            for name, value in block.split(self.shared).items():
                if block.group is not None:
                    local = value.contiguous().to(block.parameters[name].device)
                    whole = local.new_empty(dist.get_world_size(block.group) * len(local), *local.shape[1:])
                    dist.all_gather_single(whole, local, group=block.group)
                    value = whole.cpu()
                found[name] = value.clone()
        return found

    def _add_layer(self, name: str, layer: UBSMoE, attention: nn.Module) -> None:
        group = layer.deepspeed_moe.ep_group if layer.ep_size > 1 else None
        for projection in PROJECTIONS:
            A, B = layer.experts.factors()[projection]
            numel = A[0].numel() + B[0].numel()
            self.units += [Unit(f"{name}.experts.{e}.{projection}", numel, e) for e in range(layer.num_experts)]
            prefix = f"{name}.experts.{projection}"
            self._add_block({f"{prefix}.lora_A": A, f"{prefix}.lora_B": B}, rows=len(A), group=group)
        if layer.gate.wg.weight.requires_grad:
            self._add_dense(f"{name}.router", {f"{name}.router.weight": layer.gate.wg.weight})
        for projection in ATTENTION_PROJECTIONS:
            linear = getattr(attention, projection)
            if isinstance(linear, LoraLinear):
                prefix = f"{name}.attention.{projection}"
                self._add_dense(prefix, {f"{prefix}.lora_A": linear.lora_A, f"{prefix}.lora_B": linear.lora_B})
        phi = layer.gate.phi
        self.units.append(Unit(name + DMR_SUFFIX, 2 * phi.numel()))
        self._add_block({f"{name}.phi": phi}, dmr=True)

    def _add_dense(self, name: str, parameters: dict[str, nn.Parameter]) -> None:
        self.units.append(Unit(name, sum(p.numel() for p in parameters.values())))
        self._add_block(parameters)

    def _add_block(
        self, parameters: dict[str, nn.Parameter], rows: int = 1, group: ProcessGroup | None = None, dmr: bool = False
    ) -> None:
        numel = sum(p.numel() for p in parameters.values()) * (2 if dmr else 1)
        start = self._blocks[-1].place.stop if self._blocks else 0
        self._blocks.append(_Block(parameters, rows, slice(start, start + numel), group, dmr))

    def _dmr_blocks(self) -> list[_Block]:
        return [block for block in self._blocks if block.dmr]

    def _pack(self) -> Tensor:
        """Current values, [numel held]; the utilisation places are zero."""
        parts = []
        for block in self._blocks:
            values = [self._read(p).view(block.rows, -1) for p in block.parameters.values()]
            parts.append(torch.cat(values + [torch.zeros_like(values[0])] * block.dmr, dim=1).reshape(-1))
        return torch.cat(parts)

    def _read(self, parameter: nn.Parameter) -> Tensor:
        """fp32 on the CPU; phi without DMR is frozen, has no master and never changes."""
        return self.masters.read(parameter).cpu() if parameter.requires_grad else parameter.detach().float().cpu()
