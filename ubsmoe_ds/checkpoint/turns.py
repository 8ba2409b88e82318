"""Turn what completed turns of the current round have left into pieces of a checkpoint, and restore it on any group."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.checkpoint.held import held_pieces, read_held
from ubsmoe_ds.checkpoint.progress import SavedClient
from ubsmoe_ds.checkpoint.storage import Piece, Reader
from ubsmoe_ds.client.engine import Client, LocalStats
from ubsmoe_ds.client.turn import OwnPart, Turn, Turns

SHARED_STATS = 5  # the first of `LocalStats` are sums over ranks; the others are the client's


def turn_pieces(turn: Turn, owner: str, store: UnitStore, lora_rank: int, group_rank: int) -> Iterator[Piece]:
    """Yield this rank's part of a turn.

    Args:
        turn: the turn.
        owner: the client's name.
        store: this rank's store.
        lora_rank: of the update.
        group_rank: this rank in its group; the first ranks that hold a block write the update of it.
    """
    if turn.update is not None:
        yield from held_pieces("turn.update", owner, turn.update, store, lora_rank, group_rank)
    if turn.control is not None:
        yield from held_pieces("turn.control", owner, turn.control, store, lora_rank, group_rank)
    own = [*turn.part, turn.seconds, turn.learning_rate, turn.length]
    values = {"own": torch.tensor(own, dtype=torch.float64), "stats": torch.tensor(turn.stats, dtype=torch.float64)}
    optional = {"moments": turn.sums_LEX, "squares": turn.squares_LE2, "scales": turn.scales_L}
    values |= {"refused": torch.tensor(turn.refused, dtype=torch.int64)} if turn.refused else {}
    values |= {"routed": turn.routed_LX} | {name: value for name, value in optional.items() if value is not None}
    for name, value in values.items():
        yield Piece(f"turn.{group_rank}", owner, name, 0, value.reshape(-1))


def sum_pieces(turns: Turns, group: int, store: UnitStore, lora_rank: int, group_rank: int) -> Iterator[Piece]:
    """Yield this rank's part of the sums over a group's turns, if there are any; see `turn_pieces`."""
    owner = f"group {group}"  # no client's name has a space
    if turns.total is not None:
        yield from held_pieces("turn_sum.update", owner, turns.total, store, lora_rank, group_rank)
    if turns.total_LEX is not None:
        yield Piece(f"turn_sum.{group_rank}", owner, "moments", 0, turns.total_LEX.reshape(-1))


def add_sum(
    turns: Turns,
    client: Client,
    store: UnitStore,
    reader: Reader,
    group: int,
    layout: Sequence[int],
    place: tuple[int, int],
) -> None:
    """Add the saved sums of a group to this rank's part of those of its own group.

    Args:
        turns: get the sums.
        client, store, reader: see `restore_turn`.
        group: the number that the group had. layout: its ranks and expert parallelism.
        place: (this rank in its group, LoRA rank of the sum).
    """
    (group_rank, lora_rank), owner = place, f"group {group}"
    update = read_held("turn_sum.update", owner, reader, store, lora_rank)
    turns.total = update if turns.total is None else turns.total + update
    if client.moments is not None:
        sums_LEX = torch.zeros_like(client.moments.sums())
        for source in _sources(client, layout, group_rank):
            sums_LEX += reader.read(f"turn_sum.{source}", owner, "moments").view(sums_LEX.shape)
        turns.total_LEX = sums_LEX if turns.total_LEX is None else turns.total_LEX + sums_LEX


def _sources(client: Client, layout: Sequence[int], group_rank: int) -> list[int]:
    """Return the ranks of the saved layout whose counts this rank takes over: its own, or in another layout all."""
    if list(layout) == [client.config.ranks, client.config.expert_parallel]:
        return [group_rank]
    return list(range(layout[0])) if group_rank == 0 else []


def restore_turn(
    client: Client, store: UnitStore, reader: Reader, number: int, saved: SavedClient, place: tuple[int, int, int]
) -> Turn:
    """Return this rank's part of a turn. In another layout the first rank takes over what ranks have counted.

    Args:
        client: this rank's engine, for shapes alone.
        store: this rank's store.
        reader: reads the checkpoint.
        number: the client's number.
        saved: its entry in the manifest.
        place: (this rank in its group, LoRA rank of the update, place among the group's turns).
    """
    exp, (group_rank, lora_rank, slot) = client.exp, place
    owner = exp.clients[number].name
    sources = _sources(client, saved.layout, group_rank)

    def total(name: str, like: Tensor) -> Tensor:
        read = [reader.read(f"turn.{source}", owner, name).view(like.shape) for source in sources]
        return torch.stack(read).sum(0).to(like.dtype) if len(read) > 1 else read[0] if read else torch.zeros_like(like)

    first = sources[0] if sources else 0
    own = reader.read(f"turn.{first}", owner, "own").tolist()
    own[0] = float(total("own", torch.zeros(len(own), dtype=torch.float64))[0])
    stats = reader.read(f"turn.{first}", owner, "stats").tolist()
    stats[:SHARED_STATS] = total("stats", torch.zeros(len(stats), dtype=torch.float64)).tolist()[:SHARED_STATS]
    refused: list[int] = []
    if reader.has(f"turn.{first}", owner, "refused"):
        refused = reader.read(f"turn.{first}", owner, "refused").tolist()
    squares_LE2, scales_L = client.gradient_squares(), None
    if reader.has(f"turn.{first}", owner, "scales"):
        scales_L = reader.read(f"turn.{first}", owner, "scales")
    return Turn(
        client=number,
        update=None if saved.added_up else read_held("turn.update", owner, reader, store, lora_rank),
        part=OwnPart(own[0], int(own[1]), own[2]),
        stats=LocalStats(*stats),
        seconds=own[3],
        learning_rate=own[4],
        steps_taken=saved.steps_taken,
        routed_LX=total("routed", client.routed_counts()),
        sums_LEX=None if client.moments is None or saved.added_up else total("moments", client.moments.sums()),
        squares_LE2=None if squares_LE2 is None else total("squares", squares_LE2),
        scales_L=scales_L,
        slot=slot,
        length=own[5],
        refused=refused,
        control=read_held("turn.control", owner, reader, store, lora_rank) if exp.train.scaffold else None,
    )
