"""Write the checkpoints of a run, and find the one to resume from: what all ranks of the job do together."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import SafetensorError

from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint import state, storage
from ubsmoe_ds.checkpoint.compatibility import check_same_experiment
from ubsmoe_ds.checkpoint.progress import Progress, SavedClient, SavedProgress, restored
from ubsmoe_ds.checkpoint.storage import Damaged, Reader
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import Section
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World

AUTO = "auto"


class Manifest(Section):
    """What a run adds to a checkpoint's manifest."""

    progress: SavedProgress
    clients: dict[str, SavedClient]
    config: dict[str, Any]
    data: str


class FoundCheckpoint(NamedTuple):
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest
    reader: Reader


class CheckpointManager:
    """Writes and finds the checkpoints of a run; every rank of the job calls its methods.

    Args:
        exp: the experiment.
        world: this rank's place.
        data_digest: digest of the rows, which must be the same when the run is resumed.
    """

    def __init__(self, exp: Experiment, world: World, data_digest: str) -> None:
        self.exp, self.world, self.data_digest = exp, world, data_digest
        self.config = exp.model_dump(mode="json")  # with all clients, whoever is lost later
        # under factor rules each client holds its own LoRA ranks of the shared state
        self._one_shared_state = exp.merge.row.elementwise
        self._saved_round: int | None = None  # the latest complete round that is in a checkpoint

    def among(self, exp: Experiment, world: World) -> "CheckpointManager":
        """Return a manager for the clients that are left."""
        manager = CheckpointManager(exp, world, self.data_digest)
        manager.config, manager._saved_round = self.config, self._saved_round
        return manager

    def is_due(self, progress: Progress) -> bool:
        """Whether the latest complete round should be saved and is not yet."""
        every, complete = self.exp.checkpoint.every, progress.round - 1
        due = bool(every) and complete > 0 and (complete % every == 0 or complete == self.exp.train.rounds)
        return due and complete != self._saved_round

    def note_saved(self, progress: Progress) -> None:
        """Note, once all ranks have agreed, that a checkpoint of this progress is on disk."""
        self._saved_round = progress.round - 1

    def save(
        self,
        client: Client,
        store: UnitStore,
        server: Server,
        progress: Progress,
        local: LocalProgress,
    ) -> Path:
        """Write a checkpoint; return its folder (a collective).

        Raises:
            UserError: if a rank could not write, as on a full disk; earlier checkpoints are untouched.
        """
        run_dir, rank, failure = self.exp.run_dir, self.world.rank, ""
        newest = max(map(storage.serial_of, storage.folders(run_dir)), default=0) if rank == 0 else 0
        serial = gather_json(self.world.comm, newest + 1)[0]
        if rank == 0:
            failure = _failure_of(partial(storage.begin, run_dir, serial))
        self.world.barrier()
        written = None
        if not failure:
            try:
                pieces = self._pieces(client, store, server, local)
                size, digest = storage.write_pieces(storage.temporary(run_dir, serial), rank, pieces)
                written = [size, digest.hex()]
            except (OSError, SafetensorError) as error:
                failure = str(error)
        files = gather_json(self.world.comm, written)
        clients = self._clients(server, progress, local)
        complete = not progress.merged and not any(saved["steps"] for saved in clients.values())
        label = f"round-{progress.round - 1}" if complete else f"within-round-{progress.round}"
        if rank == 0 and all(files):
            content = {
                "progress": progress.saved(),
                "clients": clients,
                "config": self.config,
                "data": self.data_digest,
            }
            named = {storage.rank_file(r): (size, bytes.fromhex(digest)) for r, (size, digest) in enumerate(files)}
            keep = self.exp.checkpoint.keep
            failure = _failure_of(partial(storage.commit, run_dir, serial, label, named, content, keep))
        if self.world.any(bool(failure)):
            if rank == 0:
                shutil.rmtree(storage.temporary(run_dir, serial), ignore_errors=True)  # it takes the room
            reason = failure or "another rank could not write"
            raise UserError(
                f"checkpoint: {run_dir / storage.FOLDER} cannot be written ({reason}); make room there, and on "
                "several hosts share it; earlier checkpoints are whole"
            )
        return storage.named(run_dir, serial, label)

    def _pieces(self, client: Client, store: UnitStore, server: Server, local: LocalProgress) -> list[storage.Piece]:
        """Collect what this rank writes."""
        rank, first_client = self.world.group_rank, self.world.client == 0
        keeps = self.exp.train.optimizer_state == "keep" or local.steps > 0
        pieces = [*state.client_pieces(client, rank, keeps), *state.rank_pieces(client, rank, local)]
        if first_client or not self._one_shared_state:
            lora_rank = server.lora_ranks[self.world.client]
            pieces += state.shared_pieces(store, lora_rank, self._owner(client), rank, with_base=first_client)
        if first_client and rank < client.config.expert_parallel:
            pieces += state.moment_pieces(client)
        return [*pieces, *state.server_pieces(server, store.units)]

    def _owner(self, client: Client) -> str:
        """Name whose shared state a client's is in a checkpoint."""
        return state.ALL if self._one_shared_state else client.config.name

    def _clients(self, server: Server, progress: Progress, local: LocalProgress) -> dict[str, dict[str, Any]]:
        """Gather each client's entry of the manifest from its first rank, by name (a collective)."""
        counts = None
        if self.world.group_rank == 0:
            counts = [self.world.client, progress.steps_taken, local.steps, local.bad_steps, local.seconds]
        entries = {}
        for client, taken, steps, bad, seconds in filter(None, gather_json(self.world.comm, counts)):
            config = self.exp.clients[client]
            entries[config.name] = {
                "layout": [config.ranks, config.expert_parallel],
                "lora_rank": server.lora_ranks[client],
                "steps_taken": taken,
                "steps": steps,
                "bad_steps": bad,
                "seconds": seconds,
            }
        return entries

    def find(self, asked: str) -> FoundCheckpoint | None:
        """Return the checkpoint to resume from; None: there is none yet. Damaged ones are named and passed over.

        Args:
            asked: "auto", the newest that is whole; or a checkpoint's folder.

        Raises:
            UserError: if all checkpoints, or the folder that was asked for, are damaged or of another experiment.
        """
        if asked != AUTO:
            found = self._verified(Path(asked))
            if found is None:
                raise UserError(f"--resume: {asked} is not a complete checkpoint; use {AUTO}, or another folder")
            return self._checked(found)
        folders = self._known()
        for folder in folders:
            found = self._verified(folder)
            if found is not None:
                return self._checked(found)
        if folders:
            raise UserError(
                f"--resume: all checkpoints in {self.exp.run_dir / storage.FOLDER} are damaged; restore one, or "
                "start anew with another name=..."
            )
        return None

    def _known(self) -> list[Path]:
        """Return the checkpoints that rank 0 sees, the newest first (a collective).

        Other ranks do not look themselves: on a network file system another host's listing may lag.
        """
        names = []
        if self.world.rank == 0:
            names = [folder.name for folder in storage.folders(self.exp.run_dir)]
        return [self.exp.run_dir / storage.FOLDER / name for name in gather_json(self.world.comm, names)[0]]

    def _verified(self, folder: Path) -> FoundCheckpoint | None:
        """Return the checkpoint if all of it is there and unchanged; each rank looks at its part of the files."""
        manifest: dict[str, Any] = {"files": {}}
        content, damage = None, ""
        try:
            manifest = storage.read_manifest(folder)
            content = Manifest.model_validate({key: manifest.get(key) for key in Manifest.model_fields})
            for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
                if number % self.world.comm.size == self.world.rank:
                    storage.verify_file(folder, name, expected)
        except Damaged as error:
            damage = str(error)
        except ValidationError as error:
            damage = f"{storage.MANIFEST} is not one of this program ({error.errors()[0]['loc']})"
        damages = gather_json(self.world.comm, damage)
        if any(damages):
            if self.world.rank == 0:
                first = next(filter(None, damages))
                print(
                    f"warning: checkpoint {folder} is damaged: {first}; it is passed over", file=sys.stderr, flush=True
                )
            return None
        assert content is not None
        return FoundCheckpoint(folder, content, Reader(folder, manifest["files"]))

    def _checked(self, found: FoundCheckpoint) -> FoundCheckpoint:
        """
        Raises:
            UserError: if it belongs to another experiment.
        """
        check_same_experiment(found.manifest.config, self.config, found.folder)
        lost = [client.name for client in self.exp.clients if client.name not in found.manifest.clients]
        if lost and not self._one_shared_state:
            raise UserError(
                f"--resume: client {lost[0]!r} was lost before {found.folder}, and under merge.rule "
                f"{self.exp.merge.rule} nobody else holds its LoRA ranks; resume from an older checkpoint, "
                "--resume FOLDER"
            )
        if found.manifest.data != self.data_digest:
            raise UserError(
                f"--resume: data.source holds other rows than when {found.folder} was written; restore them, or start "
                "anew with another name=..."
            )
        return found

    def restore(
        self, found: FoundCheckpoint, client: Client, store: UnitStore, server: Server
    ) -> tuple[Progress, LocalProgress]:
        """Bring this rank to where the checkpoint stands.

        Raises:
            UserError: if the checkpoint lacks something.
        """
        reader, known = found.reader, found.manifest.clients
        saved = known.get(client.config.name)
        server.lora_ranks = [
            known[config.name].lora_rank if config.name in known else self.exp.lora_rank(config)
            for config in self.exp.clients
        ]
        lora_rank = server.lora_ranks[self.world.client]
        progress = restored(found.manifest.progress, saved.steps_taken if saved else 0)
        self.note_saved(progress)
        state.restore_shared(store, reader, self._owner(client), lora_rank)
        state.restore_moments(client, reader)
        state.restore_server(server, store.units, reader)
        client.reset_counts()
        if saved is None:  # a client that was lost is back, with what all share
            store.load(lora_rank)
            return progress, LocalProgress()
        state.restore_client(client, reader)
        local = LocalProgress(saved.steps, saved.bad_steps, seconds=saved.seconds)
        state.restore_rank(client, self.world.group_rank, local, reader, saved.layout)
        return progress, local


def _failure_of(action: Callable[[], object]) -> str:
    """Run an action; return its OSError as text, "" if there is none."""
    try:
        action()
    except OSError as error:
        return str(error)
    return ""
