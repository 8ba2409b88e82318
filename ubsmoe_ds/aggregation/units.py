"""The trainable state of a model as a list of units, and the flat buffer of those that one rank holds.

Units of a layer, in order: for each projection every expert's LoRA (A then B), the router, the attention adapters, and
with DMR phi. What a client learns for itself alone (the gates' learned scale) is no unit. Everything travels as a
difference to the shared state, which client and owners know; under FLoRA the adapters themselves, whose shared state is
nothing, because each round ends with merging them into the frozen weights.

Shapes: E local experts, R LoRA rank, m x n a projection's weight.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup

from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.checkpoint.storage import Piece, Reader
from ubsmoe_ds.client.gradients import MasterWeights
from ubsmoe_ds.models.causal_lm import ATTENTION_PROJECTIONS, LoraLinear, UBSMoEForCausalLM, lora_generator
from ubsmoe_ds.moe.layer import UBSMoE

DMR_SUFFIX = ".dmr"


@dataclass(frozen=True)
class _Block:
    """Consecutive units of one kind: named parameters whose rows side by side are the `rows` units.

    A LoRA block has A, stacked or not, then B, and the frozen weight they belong to; the units hold their first ranks.
    `group` is set where other ranks hold other rows; `first` is the number of the first row here.
    """

    parameters: dict[str, nn.Parameter]
    rows: int
    base: Tensor | None = None
    group: ProcessGroup | None = None
    first: int = 0

    @property
    def name(self) -> str:
        """That of its first parameter."""
        return next(iter(self.parameters))

    def numel(self, rank: int) -> int:
        """Elements in the held buffer at a LoRA rank."""
        if self.base is None:
            return sum(p.numel() for p in self.parameters.values())
        return self.rows * rank * sum(self.base.shape[-2:])

    def join(self, values: Sequence[Tensor], rank: int) -> Tensor:
        """Values in their parameters' shapes -> this block's part of the held buffer."""
        if self.base is not None:
            values = [values[0][..., :rank, :], values[1][..., :rank]]
        return torch.cat([value.reshape(self.rows, -1) for value in values], dim=1).reshape(-1)

    def split(self, flat: Tensor, rank: int) -> dict[str, Tensor]:
        """The way back; a LoRA factor keeps the buffer's rank."""
        shapes = [p.shape for p in self.parameters.values()]
        if self.base is not None:
            shapes = [torch.Size([*shapes[0][:-2], rank, shapes[0][-1]]), torch.Size([*shapes[1][:-1], rank])]
        columns = [shape.numel() // self.rows for shape in shapes]
        values = flat.view(self.rows, -1).split(columns, dim=1)
        return {n: v.reshape(shape) for n, v, shape in zip(self.parameters, values, shapes, strict=True)}


class UnitStore:
    """Reads and writes the units of this rank as one flat fp32 buffer on the CPU, in unit order.

    Args:
        model: the converted model of this client.
        masters: its fp32 values.
        rank: LoRA rank of the client.
        dmr: whether phi is shared.
        stacking: FLoRA: adapters travel whole, and come back as a stack that is merged into the frozen weights.
        seed: of FLoRA's new adapters.
    """

    def __init__(
        self,
        model: UBSMoEForCausalLM,
        masters: MasterWeights,
        *,
        rank: int,
        dmr: bool = True,
        stacking: bool = False,
        seed: int = 0,
    ) -> None:
        self.model, self.masters, self.rank, self.stacking, self.seed = model, masters, rank, stacking, seed
        self.units: list[Unit] = []
        self._blocks: list[_Block] = []
        self._moe_layers = 0
        self._remainders: dict[int, Tensor] = {}  # what a bf16 weight cannot hold of what was merged into it
        for index, decoder in enumerate(model.decoders):
            self._add_decoder(f"layers.{index}", decoder, dmr)
        self.shared = self._joined(self._read)
        if stacking:
            for block, part in self._places(self.shared, rank):
                if block.base is not None:
                    part.zero_()

    def updates(self) -> Tensor:
        """What this rank sends: local minus shared state (a collective over the client under ZeRO)."""
        return self._joined(self._read) - self.shared

    def apply(self, difference: Tensor, reply_rank: int, round_number: int) -> None:
        """Add to the shared state what came back, and load it.

        Args:
            difference: of the held units at `reply_rank`; see `Exchange.distribute`.
            reply_rank: LoRA rank of this client from now on (ranks beyond it become zero), or of FLoRA's stack.
            round_number: what FLoRA's new adapters are drawn for.
        """
        fresh = self._fresh_adapters(round_number) if self.stacking else {}
        new = []
        for (block, shared), (_, change) in zip(
            self._places(self.shared, self.rank), self._places(difference, reply_rank), strict=True
        ):
            if block.base is not None and self.stacking:
                name_A, name_B = block.parameters
                stack = block.split(change, reply_rank)
                self._merge_into_base(block.base, stack[name_B], stack[name_A])
                self._write(block, {name_A: fresh[name_A], name_B: torch.zeros(block.parameters[name_B].shape)})
                new.append(shared)  # zero
                continue
            if block.base is not None:
                shared = block.join(list(block.split(shared, self.rank).values()), reply_rank)
            new.append(shared + change)
            self._write(block, block.split(new[-1], reply_rank))
        self.shared = torch.cat(new)
        self.rank = self.rank if self.stacking else reply_rank

    def pieces(self, owner: str, client_rank: int, whole: bool) -> Iterator[Piece]:
        """The shared state for a checkpoint, and under FLoRA the frozen weights that it has changed.

        Args:
            owner: whose they are in the checkpoint.
            client_rank: this rank's place; of those that hold the same the first writes it.
            whole: of a client whose frozen weights are saved for all, which have the same.
        """
        for block, value in self._places(self.shared, self.rank):
            if client_rank >= (1 if block.group is None else dist.get_world_size(block.group)):
                continue
            yield Piece("shared", owner, block.name, block.first * (len(value) // block.rows), value)
            if self.stacking and whole and block.base is not None:
                offset = block.first * (block.base.numel() // block.rows)
                yield Piece("base", "all", block.name, offset, block.base)
                if id(block.base) in self._remainders:
                    yield Piece("base_remainder", "all", block.name, offset, self._remainders[id(block.base)])

    def restore(self, reader: Reader, owner: str, rank: int) -> None:
        """Take the shared state and FLoRA's frozen weights out of a checkpoint; parameters are the client's matter.

        Args:
            reader: of the checkpoint.
            owner: see `pieces`.
            rank: LoRA rank that the client had.

        Raises:
            UserError: if the checkpoint lacks some of it.
        """
        self.rank, parts = rank, []
        for block in self._blocks:
            numel = block.numel(rank)
            parts.append(reader.read("shared", owner, block.name, block.first * (numel // block.rows), numel))
            if self.stacking and block.base is not None:
                place = (block.first * (block.base.numel() // block.rows), block.base.numel())
                block.base.copy_(reader.read("base", "all", block.name, *place).view(block.base.shape))
                if reader.has("base_remainder", "all", block.name):
                    rest = reader.read("base_remainder", "all", block.name, *place)
                    self._remainders[id(block.base)] = rest.view(-1, *block.base.shape[-2:]).to(block.base.device)
        self.shared = torch.cat(parts)

    def load(self) -> None:
        """Set the client's parameters to the shared state."""
        for block, part in self._places(self.shared, self.rank):
            self._write(block, block.split(part, self.rank))

    def full_state(self) -> dict[str, Tensor]:
        """The state of the whole model by parameter, experts stacked [E, ...], fp32 on the CPU; what FLoRA merged too.

        A collective over the expert groups of the client.
        """
        found = {}
        for block in self._blocks:
            values = {name: self._read(parameter) for name, parameter in block.parameters.items()}
            if block.base is not None:
                values = block.split(block.join(list(values.values()), self.rank), self.rank)
                if self.stacking:
                    prefix = next(iter(values)).removesuffix(".lora_A")
                    values = {**values, f"{prefix}.weight": block.base.detach().float().cpu()}
            for name, value in values.items():
                found[name] = self._gathered(value, block.group)
        return found

    def _gathered(self, value: Tensor, group: ProcessGroup | None) -> Tensor:
        if group is None:
            return value.clone()
        local = value.contiguous().to(next(self.model.parameters()).device)
        whole = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
        dist.all_gather_single(whole, local, group=group)
        return whole.cpu()

    def tail_norm(self, flat: Tensor, first: int) -> float:
        """Sum over this rank's units of ||B[:, first:]|| ||A[first:, :]|| (HetLoRA's measure of superfluous ranks).

        Experts count once for all ranks that hold them, and attention once for the client, when ranks are summed.

        Args:
            flat: values of the held units at the current rank.
            first: the tail's first rank.
        """
        total, ranks = 0.0, dist.get_world_size()
        for block, part in self._places(flat, self.rank):
            if block.base is None:
                continue
            A, B = block.split(part, self.rank).values()
            norm = B[..., first:].norm(dim=(-2, -1)) * A[..., first:, :].norm(dim=(-2, -1))
            copies = ranks // dist.get_world_size(block.group) if block.group is not None else ranks
            total += float(norm.sum()) / copies
        return total

    def _add_decoder(self, name: str, decoder: nn.Module, dmr: bool) -> None:
        layer = decoder.mlp if isinstance(decoder.mlp, UBSMoE) else None
        number = self._moe_layers
        if layer is not None:
            self._moe_layers += 1
            self._add_experts(name, layer, number)
        for projection in ATTENTION_PROJECTIONS:
            linear = getattr(decoder.self_attn, projection)
            if isinstance(linear, LoraLinear):
                prefix = f"{name}.attention.{projection}"
                m, n = linear.base.weight.shape
                self.units.append(Unit(prefix, lora=(m, n)))
                parameters = {f"{prefix}.lora_A": linear.lora_A, f"{prefix}.lora_B": linear.lora_B}
                self._blocks.append(_Block(parameters, 1, linear.base.weight))
        if layer is not None and dmr:
            self._add_dense(name + DMR_SUFFIX, f"{name}.phi", layer.gate.phi, number)

    def _add_experts(self, name: str, layer: UBSMoE, number: int) -> None:
        """LoRA of the experts and the router of the `number`-th UB-SMoE layer."""
        group = layer.deepspeed_moe.ep_group if layer.ep_size > 1 else None
        for projection, (A, B) in layer.experts.factors().items():
            shape = (B.shape[1], A.shape[2])
            self.units += [
                Unit(f"{name}.experts.{e}.{projection}", expert=e, lora=shape, layer=number)
                for e in range(layer.num_experts)
            ]
            prefix = f"{name}.experts.{projection}"
            base = layer.experts.base()[projection]
            self._blocks.append(
                _Block({f"{prefix}.lora_A": A, f"{prefix}.lora_B": B}, len(A), base, group, layer.experts.first)
            )
        if layer.gate.wg.weight.requires_grad:
            self._add_dense(f"{name}.router", f"{name}.router.weight", layer.gate.wg.weight, number)

    def _add_dense(self, unit: str, name: str, parameter: nn.Parameter, layer: int) -> None:
        self.units.append(Unit(unit, parameter.numel(), layer=layer))
        self._blocks.append(_Block({name: parameter}, 1))

    def _places(self, flat: Tensor, rank: int) -> Iterator[tuple[_Block, Tensor]]:
        """Each block with its part of a held buffer of that LoRA rank."""
        return zip(self._blocks, flat.split([block.numel(rank) for block in self._blocks]), strict=True)

    def _joined(self, read: Callable[[nn.Parameter], Tensor]) -> Tensor:
        return torch.cat([b.join([read(p) for p in b.parameters.values()], self.rank) for b in self._blocks])

    def _read(self, parameter: nn.Parameter) -> Tensor:
        """fp32 on the CPU."""
        return self.masters.read(parameter).cpu()

    def _write(self, block: _Block, values: dict[str, Tensor]) -> None:
        """Load values; ranks of a factor that they lack become zero, so that they neither act nor learn."""
        for name, value in values.items():
            parameter = block.parameters[name]
            whole = torch.zeros(parameter.shape)
            whole[tuple(slice(size) for size in value.shape)] = value
            self.masters.write(parameter, whole.to(parameter.device))

    def _fresh_adapters(self, round_number: int) -> dict[str, Tensor]:
        """New A of every LoRA block, as at the start but for another round."""
        drawn = {}
        for index, decoder in enumerate(self.model.decoders):
            generator = lora_generator(self.seed, index, round_number)
            experts = decoder.mlp.experts if isinstance(decoder.mlp, UBSMoE) else None
            for projection, A_ERn in experts.draw_adapters(generator).items() if experts is not None else ():
                drawn[f"layers.{index}.experts.{projection}.lora_A"] = A_ERn[:, : self.rank]
            for projection in ATTENTION_PROJECTIONS:
                linear = getattr(decoder.self_attn, projection)
                if isinstance(linear, LoraLinear):
                    drawn[f"layers.{index}.attention.{projection}.lora_A"] = linear.draw_adapters(generator)[
                        : self.rank
                    ]
        return drawn

    @torch.no_grad()
    def _merge_into_base(self, base: Tensor, B: Tensor, A: Tensor) -> None:
        """W += B A, in fp64 and one matrix at a time, so that every rank of every client gets the same bits.

        What bf16 weights cannot hold is kept beside them for the next round.
        """
        matrices = base.data.view(-1, *base.shape[-2:])
        if base.dtype != torch.float32 and id(base) not in self._remainders:
            self._remainders[id(base)] = torch.zeros_like(matrices)
        remainders = self._remainders.get(id(base))
        pairs = zip(B.view(len(matrices), *B.shape[-2:]), A.view(len(matrices), *A.shape[-2:]), strict=True)
        for number, (B_mR, A_Rn) in enumerate(pairs):
            exact = matrices[number].double() + (B_mR.double() @ A_Rn.double()).to(base.device)
            if remainders is not None:
                exact += remainders[number]
                remainders[number] = exact - exact.to(base.dtype)
            matrices[number] = exact


def next_rank(store: UnitStore, update: Tensor, tail_start: int) -> int:
    """The client's rank for the next round (a collective over the client).

    The tail, all ranks from `tail_start` on, is given up if its norm, sum ||B[:, tail]|| ||A[tail, :]|| over the
    modules, shrank during the round. What it has learned still counts in this round's merge [ours].

    Args:
        store: of this rank.
        update: what local steps changed; see `UnitStore.updates`.
        tail_start: see `Client.tail_start`.
    """
    if tail_start >= store.rank:
        return store.rank
    shared, current = store.shared, store.shared + update
    norms = torch.tensor([store.tail_norm(flat, tail_start) for flat in (shared, current)], dtype=torch.float64)
    norms = norms.to(next(store.model.parameters()).device)
    dist.all_reduce(norms)
    before, after = norms.tolist()
    return tail_start if after < before else store.rank
