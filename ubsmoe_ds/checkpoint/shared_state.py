"""Turn what clients share into pieces of a checkpoint, restore it, and replicate the server optimiser's state.

These are the shared state, the moments of `linearised`, SCAFFOLD's c and the server optimiser's state;
state.py has the rest.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.controls import Controls
from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.checkpoint.held import held_pieces, read_held
from ubsmoe_ds.checkpoint.storage import Piece, Reader
from ubsmoe_ds.client.engine import Client
from ubsmoe_ds.mpi.world import World

ALL = "all"  # the owner of pieces that clients have in common


def shared_pieces(store: UnitStore, lora_rank: int, owner: str, group_rank: int, with_base: bool) -> Iterator[Piece]:
    """Yield the shared state, and under FLoRA the frozen weights that it has changed.

    Args:
        store: this rank's store.
        lora_rank: the client's current LoRA rank.
        owner: the pieces' owner in the checkpoint.
        group_rank: this rank in its group; the first ranks that hold a block write it.
        with_base: whether this client writes the frozen weights, which are the same for all clients.
    """
    for block, value in store.parts(store.shared, lora_rank):
        if group_rank >= block.holders:
            continue
        yield Piece("shared", owner, block.name, block.first * (len(value) // block.rows), value)
        if store.stacking and with_base and block.base is not None:
            offset = block.first * (block.base.numel() // block.rows)
            yield Piece("base", ALL, block.name, offset, block.base)
            if block.name in store.remainders:
                yield Piece("base_remainder", ALL, block.name, offset, store.remainders[block.name])


def restore_shared(store: UnitStore, reader: Reader, owner: str, lora_rank: int) -> None:
    """Restore the shared state and FLoRA's frozen weights; the client restores its own parameters.

    Args:
        store: this rank's store.
        reader: reads the checkpoint.
        owner: see `shared_pieces`.
        lora_rank: the client's LoRA rank in the checkpoint.

    Raises:
        UserError: if the checkpoint lacks some of it.
    """
    parts = []
    for block in store.blocks:
        numel = block.numel(lora_rank)
        parts.append(reader.read("shared", owner, block.name, block.first * (numel // block.rows), numel))
        if store.stacking and block.base is not None:
            place = (block.first * (block.base.numel() // block.rows), block.base.numel())
            block.base.copy_(reader.read("base", ALL, block.name, *place).view(block.base.shape))
            if reader.has("base_remainder", ALL, block.name):
                rest = reader.read("base_remainder", ALL, block.name, *place)
                matrices = rest.view(-1, *block.base.shape[-2:])
                store.remainders[block.name] = matrices.to(block.base.device)
    store.shared = torch.cat(parts)


def moment_pieces(client: Client) -> Iterator[Piece]:
    """Yield the moments of this rank's experts; they are the same for all clients, and one client writes them."""
    for index, layer in enumerate(client.model.layers):
        if layer.experts.moments is not None:
            for key, value_EF in layer.experts.moments._asdict().items():
                offset = layer.experts.first * value_EF.shape[1]
                yield Piece(f"moments.{key}", ALL, f"layers.{index}", offset, value_EF)


def restore_moments(client: Client, reader: Reader) -> None:
    """Restore the moments of this rank's experts."""
    for index, layer in enumerate(client.model.layers):
        if layer.experts.moments is not None:
            for key, live_EF in layer.experts.moments._asdict().items():
                start = layer.experts.first * live_EF.shape[1]
                value = reader.read(f"moments.{key}", ALL, f"layers.{index}", start, live_EF.numel())
                live_EF.copy_(value.view(live_EF.shape))


def control_pieces(controls: Controls, group_rank: int) -> Iterator[Piece]:
    """Yield SCAFFOLD's c, which is the same for all; one group writes it."""
    return held_pieces("control", ALL, controls.common, controls.store, controls.lora_rank, group_rank)


def restore_controls(controls: Controls, reader: Reader) -> None:
    """Restore SCAFFOLD's c."""
    controls.common = read_held("control", ALL, reader, controls.store, controls.lora_rank)


def server_pieces(server: Server, units: Sequence[Unit]) -> Iterator[Piece]:
    """Yield the server optimiser's state of the units that this rank owns.

    Args:
        server: this rank's server.
        units: all units of the model.
    """
    for start, optimizer in zip(_starts(server, units), server.optimizers, strict=True):
        for key, value_N in optimizer.state().items():
            yield Piece(f"server.{key}", ALL, "units", start, value_N)


def restore_server(server: Server, units: Sequence[Unit], reader: Reader) -> None:
    """Restore the server optimiser's state; a segment without state in the checkpoint had none."""
    for start, segment, optimizer in zip(_starts(server, units), server.segments, server.optimizers, strict=True):
        numel = segment.numel(server.unit_rank)
        kinds = [kind for kind in reader.kinds("server.") if any(reader.overlaps(kind, ALL, "units", start, 1))]
        optimizer.load({kind.removeprefix("server."): reader.read(kind, ALL, "units", start, numel) for kind in kinds})


def replicate(world: World, server: Server, units: Sequence[Unit]) -> dict[str, Tensor]:
    """Copy the server optimiser's state of all units to every rank, so that it survives deaths (a collective)."""
    if server.config.server_optimizer == "none":
        return {}
    replica = {}
    for key in ("first", "second"):
        whole = torch.zeros(sum(unit.size(server.unit_rank) for unit in units), dtype=torch.float64)
        for start, optimizer in zip(_starts(server, units), server.optimizers, strict=True):
            value_N = optimizer.state().get(key)
            if value_N is not None:
                whole[start : start + len(value_N)] = value_N
        replica[key] = torch.from_numpy(world.sum(whole.numpy())).float()
    return replica


def load_replica(server: Server, units: Sequence[Unit], replica: Mapping[str, Tensor]) -> None:
    """Load the state that `replicate` gathered into the new owners' optimisers; phi has none."""
    for start, segment, optimizer in zip(_starts(server, units), server.segments, server.optimizers, strict=True):
        if replica and segment.kind == "elementwise":
            numel = segment.numel(server.unit_rank)
            optimizer.load({key: whole[start : start + numel].clone() for key, whole in replica.items()})


def _starts(server: Server, units: Sequence[Unit]) -> list[int]:
    """Return the start of each segment in the concatenated units; rules with an optimiser need equal LoRA ranks."""
    place, starts = 0, {}
    for unit in units:
        starts[unit.name] = place
        place += unit.size(server.unit_rank)
    return [starts[segment.units[0].name] for segment in server.segments]
