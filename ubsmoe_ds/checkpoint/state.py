"""What a federation puts into a checkpoint, and how a job takes it out again, whatever its layout.

Global: the shared state, the moments of `linearised` and the server optimiser's. Of each client: its weights, its
optimiser's state, and how many steps it has taken. Of each rank: random generators, and what it has counted since the
round began. Parameters are addressed as flat tensors of the whole model, experts stacked, so that a job with other rank
counts, expert parallelism or ZeRO stages finds its part. Counts are sums over a client's ranks: in another layout the
first ranks take them over; random generators go on from those of the same place.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from ubsmoe_ds.aggregation.layout import Unit
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint.storage import Piece, Reader
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.gradients import Fragment
from ubsmoe_ds.moe.pseudo_gradient import Moments
from ubsmoe_ds.mpi.world import World

ALL = "all"  # the owner of what clients have in common
EXPERT_SUMS = ".moments"  # what is counted of a rank's own experts, not of its tokens
NORMS = slice(3, None)  # of `LocalProgress.sums`
Layout = Sequence[int]  # a client's ranks and expert parallelism


def client_pieces(client: Client, group_rank: int, with_optimizer: bool) -> Iterator[Piece]:
    """This rank's part of its client's weights and optimiser state."""
    owner = client.config.name
    for name, parameter, fragment in _written_here(client, group_rank):
        master, start, offset, numel = fragment
        place = _offset(client, parameter) + offset
        yield Piece("weight", owner, name, place, master.view(-1)[start : start + numel])
        if not with_optimizer:
            continue
        for key, value in client.engine.basic_optimizer.state.get(master, {}).items():
            if isinstance(value, Tensor) and value.numel() == master.numel() and value.ndim == master.ndim:
                yield Piece(f"optimizer.{key}", owner, name, place, value.view(-1)[start : start + numel])
            elif torch.as_tensor(value).numel() != 1:
                raise UserError(
                    f"checkpoint: the optimizer's {key!r} of shape {list(value.shape)} cannot be saved for any layout; "
                    "choose an optimizer that keeps a value of each weight, such as AdamW"
                )
            elif place == 0:  # a number that is the same for all elements, such as the step
                yield Piece(f"scalar.{key}", owner, name, 0, torch.as_tensor(value))
    if group_rank == 0:
        for key, values in _schedule(client).items():
            yield Piece(f"schedule.{key}", owner, "state", 0, torch.tensor(values, dtype=torch.float64))


def restore_client(client: Client, reader: Reader) -> None:
    """Weights and optimiser state of this rank."""
    owner, masters = client.config.name, client.gradient_hook.masters
    for name, parameter in _trained(client):
        first = _offset(client, parameter)
        value = reader.read("weight", owner, name, first, parameter.numel())
        masters.write(parameter, value.view(parameter.shape).to(parameter.device))
        fragment = masters.fragment(parameter)
        if fragment is not None:
            _restore_optimizer(client, reader, name, fragment, first)
    if client.engine.lr_scheduler is not None:
        kinds = [kind for kind in reader.kinds("schedule.") if reader.has(kind, owner, "state")]
        _restore_schedule(client, {kind.removeprefix("schedule."): reader.read(kind, owner, "state") for kind in kinds})


def _restore_optimizer(client: Client, reader: Reader, name: str, fragment: Fragment, first: int) -> None:
    """A parameter's part of the state; states that the optimiser has not made yet are made."""
    master, start, offset, numel = fragment
    owner, state = client.config.name, client.engine.basic_optimizer.state[master]
    for kind in reader.kinds("optimizer."):
        if reader.has(kind, owner, name):
            whole = state.setdefault(kind.removeprefix("optimizer."), torch.zeros_like(master))
            whole.view(-1)[start : start + numel] = reader.read(kind, owner, name, first + offset, numel).to(whole)
    for kind in reader.kinds("scalar."):
        if reader.has(kind, owner, name):
            value = reader.read(kind, owner, name)[0]
            held = state.setdefault(kind.removeprefix("scalar."), value.clone())
            if isinstance(held, Tensor):
                held.copy_(value)


def _schedule(client: Client) -> dict[str, list[float]]:
    """Of DeepSpeed's learning-rate scheduler: its own numbers, and the rates in force; empty without one."""
    scheduler = client.engine.lr_scheduler
    if scheduler is None:
        return {}
    own = {key: [value] for key, value in scheduler.state_dict().items() if isinstance(value, int | float)}
    groups = client.engine.basic_optimizer.param_groups
    betas = [beta for group in groups for beta in group.get("betas", ())]
    return own | {"rates": [group["lr"] for group in groups]} | ({"betas": betas} if betas else {})


def _restore_schedule(client: Client, found: Mapping[str, Tensor]) -> None:
    """The way back; another layout may have other groups, which share a rate all the same."""
    own = client.engine.lr_scheduler.state_dict()
    client.engine.lr_scheduler.load_state_dict(
        {key: type(value)(found[key][0].item()) if key in found else value for key, value in own.items()}
    )
    rates, betas = found["rates"].tolist(), found.get("betas", torch.empty(0)).view(-1, 2).tolist()
    for number, group in enumerate(client.engine.basic_optimizer.param_groups):
        group["lr"] = rates[min(number, len(rates) - 1)]
        if betas:
            group["betas"] = tuple(betas[min(number, len(betas) - 1)])


def _trained(client: Client) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in client.model.named_parameters() if p.requires_grad)


def _offset(client: Client, parameter: nn.Parameter) -> int:
    """Where a parameter of this rank begins in that of the whole model."""
    return parameter.numel() * client.spec.expert_rank if is_moe_param(parameter) else 0


def _written_here(client: Client, group_rank: int) -> Iterator[tuple[str, nn.Parameter, Fragment]]:
    """Fragments that this rank writes: under ZeRO its own; whole masters once, by the first ranks that hold them."""
    for name, parameter in _trained(client):
        fragment = client.gradient_hook.masters.fragment(parameter)
        first_holders = client.config.expert_parallel if is_moe_param(parameter) else 1
        if fragment is not None and (hasattr(parameter, "_hp_mapping") or group_rank < first_holders):
            yield name, parameter, fragment


def shared_pieces(store: UnitStore, lora_rank: int, owner: str, group_rank: int, with_base: bool) -> Iterator[Piece]:
    """Yield the shared state, and under FLoRA the frozen weights that it has changed.

    Args:
        store: this rank's.
        lora_rank: the client's current one.
        owner: whose they are in the checkpoint.
        group_rank: this rank's place; of ranks that hold the same the first writes it.
        with_base: whether this client, whose frozen weights are those of all, writes them.
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
        store: this rank's.
        reader: of the checkpoint.
        owner: see `shared_pieces`.
        lora_rank: LoRA rank that the client had.

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
    """The moments that all clients go by, of this rank's experts; the first ranks of one client write them."""
    for index, layer in enumerate(client.model.layers):
        if layer.experts.moments is not None:
            for key, value_EF in layer.experts.moments._asdict().items():
                offset = layer.experts.first * value_EF.shape[1]
                yield Piece(f"moments.{key}", ALL, f"layers.{index}", offset, value_EF)


def restore_moments(client: Client, reader: Reader) -> None:
    """The way back."""
    for index, layer in enumerate(client.model.layers):
        if layer.experts.moments is not None:
            found = []
            for key, old_EF in layer.experts.moments._asdict().items():
                start = layer.experts.first * old_EF.shape[1]
                value = reader.read(f"moments.{key}", ALL, f"layers.{index}", start, old_EF.numel())
                found.append(value.view(old_EF.shape).to(old_EF.device))
            layer.experts.moments = Moments(*found)


def server_pieces(server: Server, units: Sequence[Unit]) -> Iterator[Piece]:
    """The server optimiser's state of the units that this rank owns.

    Args:
        server: this rank's.
        units: of the whole model.
    """
    for start, optimizer in zip(_starts(server, units), server.optimizers, strict=True):
        for key, value_N in optimizer.state().items():
            yield Piece(f"server.{key}", ALL, "units", start, value_N)


def restore_server(server: Server, units: Sequence[Unit], reader: Reader) -> None:
    """The way back; a segment without state had none."""
    for start, segment, optimizer in zip(_starts(server, units), server.segments, server.optimizers, strict=True):
        numel = segment.numel(server.lora_ranks[0])
        kinds = [kind for kind in reader.kinds("server.") if any(reader.overlaps(kind, ALL, "units", start, 1))]
        optimizer.load({kind.removeprefix("server."): reader.read(kind, ALL, "units", start, numel) for kind in kinds})


def replicate(world: World, server: Server, units: Sequence[Unit]) -> dict[str, Tensor]:
    """The server optimiser's state of all units on every rank, so that no death can take it away (a collective)."""
    if server.config.server_optimizer == "none":
        return {}
    found = {}
    for key in ("first", "second"):
        whole = torch.zeros(sum(unit.size(server.lora_ranks[0]) for unit in units), dtype=torch.float64)
        for start, optimizer in zip(_starts(server, units), server.optimizers, strict=True):
            own = optimizer.state().get(key)
            if own is not None:
                whole[start : start + len(own)] = own
        found[key] = torch.from_numpy(world.sum(whole.numpy())).float()
    return found


def load_replica(server: Server, units: Sequence[Unit], replica: Mapping[str, Tensor]) -> None:
    """Give new owners what `replicate` gathered; phi has no such state."""
    for start, segment, optimizer in zip(_starts(server, units), server.segments, server.optimizers, strict=True):
        if replica and segment.kind == "elementwise":
            numel = segment.numel(server.lora_ranks[0])
            optimizer.load({key: whole[start : start + numel].clone() for key, whole in replica.items()})


def _starts(server: Server, units: Sequence[Unit]) -> list[int]:
    """Where each segment begins in all units one after the other; rules with an optimiser need equal LoRA ranks."""
    place, starts = 0, {}
    for unit in units:
        starts[unit.name] = place
        place += unit.size(server.lora_ranks[0])
    return [starts[segment.units[0].name] for segment in server.segments]


def rank_pieces(client: Client, group_rank: int, local: LocalProgress) -> Iterator[Piece]:
    """This rank's generators, and what it has counted in the round under way."""
    owner = client.config.name
    yield Piece(f"random.cpu.{group_rank}", owner, "state", 0, torch.get_rng_state())
    if client.device.type != "cpu":
        yield Piece(f"random.device.{group_rank}", owner, "state", 0, get_accelerator().get_rng_state())
    for name, first, value in _counts(client, local):
        yield Piece(f"count.{group_rank}", owner, name, first, value)


def restore_rank(client: Client, group_rank: int, local: LocalProgress, reader: Reader, layout: Layout) -> None:
    """The way back.

    Args:
        client: this rank's.
        group_rank: its place.
        local: whose sums are set.
        reader: of the checkpoint.
        layout: that the client had when it was written.
    """
    owner, ranks = client.config.name, layout[0]
    twin = group_rank % ranks
    torch.set_rng_state(reader.read(f"random.cpu.{twin}", owner, "state"))
    if client.device.type != "cpu" and reader.has(f"random.device.{twin}", owner, "state"):
        get_accelerator().set_rng_state(reader.read(f"random.device.{twin}", owner, "state"))
    sources = [group_rank]
    if list(layout) != [client.config.ranks, client.config.expert_parallel]:
        sources = list(range(ranks)) if group_rank < client.config.expert_parallel else []
    for name, first, held in _counts(client, local):
        of_experts = name.endswith(EXPERT_SUMS)
        taken = sources if of_experts or group_rank == 0 or sources == [group_rank] else []
        total = torch.zeros_like(held).view(-1)
        for source in taken:
            total += _stretch(reader, f"count.{source}", owner, name, first, len(total)).to(total)
        if name == "sums" and taken:
            total[NORMS] /= len(taken)  # each rank has those of the whole client
        held.copy_(total.view(held.shape))


def _stretch(reader: Reader, kind: str, owner: str, name: str, start: int, numel: int) -> Tensor:
    """What a rank had counted of these elements; zero for those that it did not have."""
    found = torch.zeros(numel, dtype=torch.float64)
    for offset, value in reader.overlaps(kind, owner, name, start, numel):
        found[offset - start : offset - start + len(value)] = value.double()
    return found


def _counts(client: Client, local: LocalProgress) -> Iterator[tuple[str, int, Tensor]]:
    """(name, place in the whole, live tensor) of everything a rank adds up during local steps."""
    yield "sums", 0, local.sums
    for index, layer in enumerate(client.model.layers):
        gate, experts = layer.gate, layer.experts
        for key in ("routed_E", "kept_E", "tokens"):
            yield f"layers.{index}.{key}", 0, getattr(gate, key)
        if experts.moment_sums_EX is not None:
            yield (
                f"layers.{index}{EXPERT_SUMS}",
                experts.first * experts.moment_sums_EX.shape[1],
                experts.moment_sums_EX,
            )
