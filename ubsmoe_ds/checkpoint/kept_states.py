"""Keep what a client has for itself between its rounds, such as its optimiser's moments, on whatever group trains it.

A rank keeps its part of the clients that its group trained last: in host memory up to a bound, beyond that in files of
the run's folder. Any group can read a client's files, in any layout. So before a round a client that moves to another
group goes from memory to files. A state has a version, the round that left it; files of a version never change.
"""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint.storage import Piece, Reader, kept_file, rank_file, write_pieces
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi.world import World

NO_GROUP = -1


class Held(NamedTuple):
    """One rank's part of a client's state in memory: the pieces, and whether this rank writes each (see `keep`)."""

    version: int
    pieces: list[tuple[Piece, bool]]

    @property
    def bytes(self) -> int:
        """Return its size."""
        return sum(piece.value.nbytes for piece, _ in self.pieces)


class Written(NamedTuple):
    """A file with this rank's part of a client's state, its size in bytes and SHA-256."""

    version: int
    path: Path
    size: int
    digest: bytes


class Place(NamedTuple):
    """Tell where a client's state is: the group that holds or wrote it, its version, how many ranks wrote it."""

    group: int
    version: int
    ranks: int


class KeptStates:
    """Keep what belongs to clients; every rank of the job has its part and calls the methods in the same order.

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        saved: reads the checkpoint that the run goes on from; None: it starts anew. Files of earlier jobs are removed.
        name: tells states of several sorts apart, in files and in a checkpoint, where kinds of pieces begin with it.
        share: of the memory of all states together.
    """

    def __init__(
        self, exp: Experiment, world: World, saved: Reader | None = None, name: str = "kept", share: float = 1.0
    ) -> None:
        self.exp, self.world, self.name = exp, world, name
        self.limit = share * exp.train.kept_states_gb * 1e9 / world.host_comm.size
        self.held: dict[int, Held] = {}
        self.written: dict[int, Written] = {}
        self.places: dict[int, Place] = {}  # the same on all ranks
        self.remove()
        world.barrier()
        if saved is not None:
            self._restore(saved)
            world.barrier()

    def reader(self, client: int) -> Reader | None:
        """Return what reads a client's state, as far as this rank needs it; None if it has none yet.

        Raises:
            UserError: if its files are not where this rank looks for them.
        """
        held, place = self.held.get(client), self.places.get(client)
        if held is not None:
            return Reader.of(piece for piece, _ in held.pieces).within(self._prefix(held.version))
        if place is None:
            return None
        folder, names = self._folder(client, place.version), self._files(client, place)
        if not names:
            name = self.exp.clients[client].name
            raise UserError(
                f"train.kept_states_gb: {folder}, what {name!r} keeps between its rounds, is gone or not seen by this "
                "host; on several hosts `output` must be a folder that all see"
            )
        return Reader(folder, names).within(self._prefix(place.version))

    def keep(self, client: int, version: int, pieces: Iterable[tuple[Piece, bool]]) -> None:
        """Keep a client's state after its turn.

        Args:
            client: its number.
            version: the round.
            pieces: all that this rank needs of it, and whether this rank is the one that writes each of them.
        """
        prefix = self._prefix(version)
        held = Held(
            version,
            [
                (piece._replace(kind=prefix + piece.kind, value=piece.value.detach().cpu().clone()), own)
                for piece, own in pieces
            ],
        )
        self.held.pop(client, None)
        if held.bytes + sum(other.bytes for other in self.held.values()) <= self.limit:
            self.held[client] = held
        else:
            self._write(client, held)

    def hand_over(self, schedule: Sequence[Sequence[int]]) -> None:
        """Bring the clients of a round to the groups that train them (a collective if one of them moves).

        Args:
            schedule: for each group the clients that it trains.
        """
        moving = [
            client
            for group, clients in enumerate(schedule)
            for client in clients
            if client in self.places and self.places[client].group not in (group, NO_GROUP)
        ]
        for client in moving:
            held = self.held.pop(client, None)
            if held is not None:
                self._write(client, held)
            self.places[client] = self.places[client]._replace(group=NO_GROUP)
        if moving:
            self.world.barrier()

    def settle(self, version: int, trained: Iterable[tuple[int, int]], dropped: Collection[int]) -> None:
        """Note the states that a merged round has left; older ones are removed.

        Args:
            version: the round.
            trained: the clients of the round, and the group that trained each.
            dropped: those of them that begin anew in their next round.
        """
        for client, group in trained:
            before = self.places.pop(client, None)
            if client in dropped:
                self.held.pop(client, None)
            elif before is not None and before.version == version:  # of a turn that a checkpoint held
                self.places[client] = before
            else:
                self.places[client] = Place(group, version, self.exp.trainers[group].ranks)
            if client in self.written and (client in dropped or self.written[client].version != version):
                del self.written[client]
            if (group, 0) == (self.world.group, self.world.group_rank):
                if before is not None and before.version != version:
                    shutil.rmtree(self._folder(client, before.version), ignore_errors=True)
                if client in dropped:
                    shutil.rmtree(self._folder(client, version), ignore_errors=True)

    def survive(self, exp: Experiment, world: World, lost: Collection[int]) -> None:
        """Go on with the groups that are left; what the others had in memory is gone, and its clients begin anew.

        Args:
            exp, world: those of the groups that are left.
            lost: numbers of the lost groups.
        """
        left = [group for group in range(len(self.exp.trainers)) if group not in lost]
        for client, place in list(self.places.items()):
            if place.group in lost and not self._files(client, place):
                del self.places[client]
                continue
            self.places[client] = place._replace(group=left.index(place.group) if place.group in left else NO_GROUP)
        self.exp, self.world = exp, world

    def pieces(self) -> Iterator[Piece]:
        """Yield what this rank has in memory and writes to a checkpoint."""
        for held in self.held.values():
            yield from (piece for piece, own in held.pieces if own)

    def files(self) -> Iterator[tuple[str, Written]]:
        """Yield the files that belong into a checkpoint, each with its name there."""
        for client, file in self.written.items():
            yield kept_file(self.name, client, file.version, self.world.rank), file

    def remove(self) -> None:
        """Remove all files; rank 0 does it."""
        if self.world.rank == 0:
            shutil.rmtree(self.exp.run_dir / f"{self.name}_states", ignore_errors=True)

    def _restore(self, saved: Reader) -> None:
        """Write what a checkpoint holds to files; the ranks share the work."""
        numbers = {config.name: number for number, config in enumerate(self.exp.clients)}
        found: dict[tuple[int, int], list[tuple[Piece, Callable[[], Tensor]]]] = {}
        for piece, read in saved.pieces(f"{self.name}."):
            version = int(piece.kind.removeprefix(f"{self.name}.").partition(".")[0])
            found.setdefault((numbers[piece.owner], version), []).append((piece, read))
        for client, version in sorted(found):  # the newest last: a turn of the round in which the job was stopped
            self.places[client] = Place(NO_GROUP, version, 1)
        for client, place in self.places.items():
            if client % self.world.comm.size == self.world.rank:
                pieces = [(piece._replace(value=read()), True) for piece, read in found[client, place.version]]
                self._write(client, Held(place.version, pieces), rank=0)

    def _write(self, client: int, held: Held, rank: int | None = None) -> None:
        """Write this rank's part of a client's state, as that of a rank of its group.

        Raises:
            UserError: if it cannot be written, for example on a full disk.
        """
        own = [piece for piece, own in held.pieces if own]
        if not own and self.world.group_rank > 0:  # the first rank's file says that there is a state, be it empty
            return
        folder = self._folder(client, held.version)
        path = folder / rank_file(self.world.group_rank if rank is None else rank)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            size, digest = write_pieces(path, own)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"train.kept_states_gb: {folder} cannot be written ({error}); free some space, or keep more in memory"
            ) from error
        self.written[client] = Written(held.version, path, size, digest)

    def _files(self, client: int, place: Place) -> list[str]:
        """Return the names of the files that hold a state."""
        folder = self._folder(client, place.version)
        return [name for name in map(rank_file, range(place.ranks)) if (folder / name).exists()]

    def _folder(self, client: int, version: int) -> Path:
        """Return the folder of a state's files."""
        return self.exp.run_dir / f"{self.name}_states" / f"{client:06d}-{version:06d}"

    def _prefix(self, version: int) -> str:
        """Return what the kinds of pieces of this version begin with."""
        return f"{self.name}.{version}."
