"""Read and write the trainable state of a model as units: one flat buffer of the units that this rank holds.

Units of a layer, in order: for each projection every expert's LoRA (A, then B), the router, the attention adapters, and
with DMR phi. The gate's learned scale, which a client keeps for itself, is no unit. Units travel as differences to the
shared state, which client and owners know. Under FLoRA the adapters themselves travel: their shared state is zero,
because each round ends with merging them into the frozen weights.

Shapes: E local experts, R LoRA rank, m x n a projection's weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from ubsmoe_ds.aggregation.blocks import Block, Place, Places
from ubsmoe_ds.aggregation.host_copies import to_device, to_host
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.client.gradients import MasterWeights
from ubsmoe_ds.models.causal_lm import LoraAdapter, UBSMoEForCausalLM, lora_generator, moe_of
from ubsmoe_ds.moe.layer import UBSMoE


@dataclass(frozen=True)
class Loaded:
    """Hold the state that a client began its turn with; see `UnitStore.begin_turn`."""

    loaded: Tensor
    full_rank: int
    factor: float


class UnitStore:
    """Reads and writes the units of this rank as one flat fp32 buffer on the CPU, in unit order.

    The caller passes the client's current LoRA rank (see `Server.lora_ranks`) wherever the buffer's size depends on it.
    Where clients take turns the shared state has the full LoRA rank: `begin_turn` loads what a client has of it, and
    `widened` returns its update at the full rank.

    Args:
        model: the converted model of this client.
        masters: its fp32 values.
        lora_rank: LoRA rank of the client at the start; the full one where clients take turns.
        dmr: whether phi is shared.
        stacking: under FLoRA: adapters travel whole, and come back as a stack to merge into the frozen weights.
        seed: seed of FLoRA's new adapters.
    """

    def __init__(
        self,
        model: UBSMoEForCausalLM,
        masters: MasterWeights,
        *,
        lora_rank: int,
        dmr: bool = True,
        stacking: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.masters, self.stacking, self.seed = model, masters, stacking, seed
        self.units: list[Unit] = []
        self.blocks: list[Block] = []
        self.remainders: dict[str, Tensor] = {}  # by block: the part of FLoRA's merges that bf16 weights cannot hold
        self._places: dict[int, Places] = {}  # by LoRA rank
        self._moe_layers = 0
        self._device = next(model.parameters()).device
        adapters = list(model.adapters())
        for index, decoder in enumerate(model.decoders):
            of_decoder = [adapter for adapter in adapters if adapter.decoder == index]
            self._add_decoder(f"layers.{index}", decoder, of_decoder, dmr)
        self.shared = self._current(lora_rank)
        self._turn: Loaded | None = None
        if stacking:
            for block, part in self.parts(self.shared, lora_rank):
                if block.shape is not None:
                    part.zero_()

    @property
    def loaded(self) -> Tensor:
        """Return what the client's local steps began with, at its LoRA rank: the shared state, or its part of that."""
        return self.shared if self._turn is None else self._turn.loaded

    def updates(self, lora_rank: int) -> Tensor:
        """Return local state minus what was loaded (a collective over the client under ZeRO)."""
        return self._current(lora_rank).sub_(self.loaded)

    def begin_turn(self, lora_rank: int, full_rank: int, factor: float, round_number: int) -> None:
        """Load the first LoRA ranks of the shared state into the model of a client that takes its turn.

        Under FLoRA, whose adapters start anew, load those that are drawn for the round.

        Args:
            lora_rank: the client's current LoRA rank.
            full_rank: that of the shared state.
            factor: of B: the shared state's alpha / r over that of the client's modules, which pruning keeps.
            round_number: the round.
        """
        self._turn = Loaded(self._recut(self.shared, full_rank, lora_rank, factor), full_rank, factor)
        whole = self._turn.loaded
        if self.stacking:
            whole = self._with_fresh_adapters(whole, lora_rank, round_number - 1)
        self._write(whole, lora_rank)

    def widened(self, update: Tensor, lora_rank: int) -> Tensor:
        """Return the update of the client that has its turn as it travels: at the full LoRA rank and in its scale."""
        assert self._turn is not None
        return self._recut(update, lora_rank, self._turn.full_rank, 1 / self._turn.factor)

    def _recut(self, flat: Tensor, old_rank: int, new_rank: int, factor: float) -> Tensor:
        """Return a held buffer at another LoRA rank: ranks are cut, or zero; B is multiplied by the factor."""
        if old_rank == new_rank and factor == 1:
            return flat
        pieces = []
        for block, part in self.parts(flat, old_rank):
            if block.shape is None:
                pieces.append(part)
                continue
            A, B = block.split(part, old_rank).values()
            more = max(new_rank - old_rank, 0)
            pieces.append(block.join([F.pad(A, (0, 0, 0, more)), F.pad(B * factor, (0, more))], new_rank))
        return torch.cat(pieces)

    def apply(self, difference: Tensor, old_rank: int, new_rank: int, round_number: int, *, load: bool = True) -> None:
        """Add a reply to the shared state, and load it into the model.

        Args:
            difference: reply for the held units at `new_rank`; see `Exchange.distribute`.
            old_rank: LoRA rank that the client had.
            new_rank: LoRA rank from now on (LoRA ranks beyond it become zero); under FLoRA the LoRA rank of the stack.
            round_number: round for which FLoRA's new adapters are drawn.
            load: False where clients take turns: each loads what it needs.
        """
        self._turn = None
        if self.stacking:
            self._merge_stacked(difference, old_rank, new_rank)
            whole = self._with_fresh_adapters(self.shared, old_rank, round_number) if load else self.shared
            new_rank = old_rank
        else:  # cut the shared state to the new LoRA rank before the reply is added
            # in place: a copy of it to the device has ended, because local steps have read the device since
            whole = self.shared = self._recut(self.shared, old_rank, new_rank, 1).add_(difference)
        if load:
            self._write(whole, new_rank)

    def _merge_stacked(self, stack: Tensor, old_rank: int, stack_rank: int) -> None:
        """Merge FLoRA's stack into the frozen weights, W <- W + B A; the shared state of the adapters stays zero."""
        parts = []
        for (block, shared), (_, change) in zip(
            self.parts(self.shared, old_rank), self.parts(stack, stack_rank), strict=True
        ):
            if block.shape is None:
                parts.append(shared + change)
                continue
            A, B = block.split(change, stack_rank).values()
            self._merge_into_base(block, B, A)
            parts.append(shared)
        self.shared = torch.cat(parts)

    def load(self, lora_rank: int) -> None:
        """Set the client's parameters to the shared state."""
        self._turn = None
        self._write(self.shared, lora_rank)

    def parts(self, flat: Tensor, lora_rank: int) -> Iterator[tuple[Block, Tensor]]:
        """Yield each block with its part of a held buffer."""
        return zip(self.blocks, flat.split([block.numel(lora_rank) for block in self.blocks]), strict=True)

    def full_state(self, lora_rank: int) -> dict[str, Tensor]:
        """Return the state of the whole model by parameter, experts stacked [E, ...], fp32 on the CPU.

        Under FLoRA the changed weights are part of it. A collective over the expert groups of the client.
        """
        state = {}
        for block, part in self.parts(self._current(lora_rank), lora_rank):
            values = block.split(part, lora_rank)
            if block.base is not None and self.stacking:
                prefix = next(iter(values)).removesuffix(".lora_A")
                values[f"{prefix}.weight"] = block.base.detach().float().cpu()
            for name, value in values.items():
                state[name] = self._gathered(value, block.group)
        return state

    def _gathered(self, value: Tensor, group: ProcessGroup | None) -> Tensor:
        """Gather the rows of all ranks of an expert group."""
        if group is None:
            return value.clone()
        local = value.contiguous().to(next(self.model.parameters()).device)
        whole = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
        dist.all_gather_single(whole, local, group=group)
        return whole.cpu()

    def _add_decoder(self, name: str, decoder: nn.Module, adapters: Sequence[LoraAdapter], dmr: bool) -> None:
        """Add a decoder layer's units in their order: experts' LoRA, router, attention's LoRA, phi."""
        layer = moe_of(decoder)
        number = self._moe_layers
        for adapter in adapters:
            if adapter.moe is not None:
                self._add_experts(adapter, adapter.moe, number)
        if layer is not None:
            self._moe_layers += 1
            router = layer.gate.wg.weight
            if router.requires_grad:
                self.units.append(Unit(f"{name}.router", "router", router.numel(), layer=number))
                self.blocks.append(Block({f"{name}.router.weight": router}, 1))
        for adapter in adapters:
            if adapter.moe is None:
                m, n = adapter.shape
                self.units.append(Unit(adapter.name, "lora", lora=(m, n)))
                self.blocks.append(Block(_factors(adapter), 1, adapter.shape, adapter.base))
        if layer is not None and dmr:
            self.units.append(Unit(f"{name}.phi", "phi", layer.gate.phi.numel(), layer=number))
            self.blocks.append(Block({f"{name}.phi": layer.gate.phi}, 1))

    def _add_experts(self, adapter: LoraAdapter, layer: UBSMoE, number: int) -> None:
        """Add LoRA of one projection of all experts of the `number`-th UB-SMoE layer."""
        group = layer.deepspeed_moe.ep_group if layer.ep_size > 1 else None
        before, projection = adapter.name.rsplit(".", 1)
        _, m, n = adapter.shape
        self.units += [
            Unit(f"{before}.{e}.{projection}", "lora", expert=e, lora=(m, n), layer=number)
            for e in range(layer.num_experts)
        ]
        self.blocks.append(
            Block(_factors(adapter), len(adapter.A), adapter.shape, adapter.base, group, layer.experts.first)
        )

    def _places_at(self, lora_rank: int) -> Places:
        """Return the place of every parameter in a held buffer of this LoRA rank."""
        if lora_rank not in self._places:
            flat = torch.empty(sum(block.numel(lora_rank) for block in self.blocks), device="meta")
            every = [
                Place(block.parameters[name], tuple(value.shape), value.stride(), int(value.storage_offset()))
                for block, part in self.parts(flat, lora_rank)
                for name, value in block.split(part, lora_rank).items()
            ]
            live, cut = None, []
            if self.masters.are_parameters:
                live = [place.part(place.parameter.data) for place in every]
                cut = [place.parameter.data for place in every if place.parameter.shape != place.shape]
            self._places[lora_rank] = Places(every, len(flat), live, cut)
        return self._places[lora_rank]

    def _current(self, lora_rank: int) -> Tensor:
        """Return the local state of the held units, one flat fp32 tensor on the CPU."""
        places = self._places_at(lora_rank)
        flat = torch.empty(places.numel, device=self._device)
        values = places.live
        if values is None:
            values = [place.part(self.masters.view(place.parameter)) for place in places.every]
        torch._foreach_copy_([place.of(flat) for place in places.every], values)
        return to_host(flat)

    def _write(self, flat: Tensor, lora_rank: int) -> None:
        """Load a held buffer; the LoRA ranks that it lacks become zero, so that these neither act nor learn."""
        places, whole = self._places_at(lora_rank), to_device(flat, self._device)
        views = [place.of(whole) for place in places.every]
        if places.live is not None:
            if places.cut:
                torch._foreach_zero_(places.cut)
            torch._foreach_copy_(places.live, views)
            return
        values = {}
        for place, value in zip(places.every, views, strict=True):
            shape = place.parameter.shape
            if value.shape != shape:
                (m, n), (rows, columns) = shape[-2:], value.shape[-2:]
                value = F.pad(value, (0, n - columns, 0, m - rows))
            values[place.parameter] = value
        self.masters.write_all(values)

    def _with_fresh_adapters(self, flat: Tensor, lora_rank: int, round_number: int) -> Tensor:
        """Return a held buffer with a new A for every LoRA block, drawn as at the start but for another round."""
        generators = [lora_generator(self.seed, index, round_number) for index in range(len(self.model.decoders))]
        fresh = {f"{a.name}.lora_A": a.draw(generators[a.decoder]) for a in self.model.adapters()}
        parts = []
        for block, part in self.parts(flat, lora_rank):
            values = block.split(part, lora_rank)
            parts.append(block.join([fresh.get(name, value) for name, value in values.items()], lora_rank))
        return torch.cat(parts)

    @torch.no_grad()
    def _merge_into_base(self, block: Block, B: Tensor, A: Tensor) -> None:
        """Add B A to W, in fp64 and one matrix at a time, so that every rank of every client gets the same bits.

        The part that bf16 weights cannot hold is kept beside them for the next round.
        """
        base = block.base
        assert base is not None
        matrices = base.data.view(-1, *base.shape[-2:])
        if base.dtype != torch.float32 and block.name not in self.remainders:
            self.remainders[block.name] = torch.zeros_like(matrices)
        remainders = self.remainders.get(block.name)
        pairs = zip(B.view(len(matrices), *B.shape[-2:]), A.view(len(matrices), *A.shape[-2:]), strict=True)
        for number, (B_mR, A_Rn) in enumerate(pairs):
            # W + B A + the remainder of earlier rounds; then the new remainder is exact - round(exact)
            exact = matrices[number].double() + (B_mR.double() @ A_Rn.double()).to(base.device)
            if remainders is not None:
                exact += remainders[number]
                remainders[number] = exact - exact.to(base.dtype)
            matrices[number] = exact


def _factors(adapter: LoraAdapter) -> dict[str, nn.Parameter]:
    """Return A and B by the names under which they are saved."""
    return {f"{adapter.name}.lora_A": adapter.A, f"{adapter.name}.lora_B": adapter.B}
