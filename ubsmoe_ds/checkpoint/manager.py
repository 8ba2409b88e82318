"""Write the checkpoints of a run and find the one to resume from; all ranks of the job work together."""

import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError
from safetensors import SafetensorError

from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint import shared_state, state, storage
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
    """The run's part of a checkpoint's manifest; storage.py adds files and checksums."""

    progress: SavedProgress
    clients: dict[str, SavedClient]
    config: dict[str, Any]
    data: str
    version: str = "unknown"


class Checkpoint(NamedTuple):
    """A verified checkpoint."""

    folder: Path
    manifest: Manifest
    reader: Reader


class CheckpointManager:
    """Write and find the checkpoints of a run; every rank of the job calls its methods.

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        data_digest: digest of the rows; a resumed run must have the same.
    """

    def __init__(self, exp: Experiment, world: World, data_digest: str) -> None:
        self.exp, self.world, self.data_digest = exp, world, data_digest
        self.config = exp.model_dump(mode="json")  # names all clients, also those that are lost later
        # under factor rules each client holds only its own LoRA ranks of the shared state
        self._one_shared_state = exp.merge.row.elementwise
        self._saved_round: int | None = None  # the latest complete round in a checkpoint

    def among(self, exp: Experiment, world: World) -> "CheckpointManager":
        """Return a manager for the remaining clients."""
        manager = CheckpointManager(exp, world, self.data_digest)
        manager.config, manager._saved_round = self.config, self._saved_round
        return manager

    def is_due(self, progress: Progress) -> bool:
        """Return whether the latest complete round should be saved and has not been."""
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
            UserError: if a rank could not write, for example on a full disk; earlier checkpoints are untouched.
        """
        serial, failure = self._begin()
        file = None
        if not failure:
            file, failure = self._write_file(serial, self._pieces(client, store, server, local))
        files = gather_json(self.world.comm, file)
        clients = self._clients(server, progress, local)
        label = _label(progress, clients)
        if self.world.rank == 0 and all(files):
            content: dict[str, Any] = {"progress": progress.saved(), "sound": progress.is_sound, "clients": clients}
            content |= {"config": self.config, "data": self.data_digest}
            failure = self._commit(serial, label, files, content)
        if self.world.any(bool(failure)):
            self._give_up(serial, failure)
        return storage.named(self.exp.run_dir, serial, label)

    def _begin(self) -> tuple[int, str]:
        """Make the temporary folder; return (serial number, rank 0's failure or "") (a collective)."""
        run_dir, failure = self.exp.run_dir, ""
        newest = max(map(storage.serial_of, storage.folders(run_dir)), default=0) if self.world.rank == 0 else 0
        serial = gather_json(self.world.comm, newest + 1)[0]
        if self.world.rank == 0:
            failure = _failure_of(partial(storage.begin, run_dir, serial))
        self.world.barrier()
        return serial, failure

    def _write_file(self, serial: int, pieces: list[storage.Piece]) -> tuple[list[Any] | None, str]:
        """Write this rank's file; return ([bytes, SHA-256], "") or (None, the failure)."""
        try:
            size, digest = storage.write_pieces(storage.temporary(self.exp.run_dir, serial), self.world.rank, pieces)
        except (OSError, SafetensorError) as error:
            return None, str(error)
        return [size, digest.hex()], ""

    def _commit(self, serial: int, label: str, files: list[Any], content: dict[str, Any]) -> str:
        """Complete the checkpoint on rank 0; return the failure or ""."""
        by_name = {storage.rank_file(rank): (size, bytes.fromhex(digest)) for rank, (size, digest) in enumerate(files)}
        run_dir = self.exp.run_dir
        failure = _failure_of(partial(storage.commit, run_dir, serial, label, by_name, content))
        if failure:
            return failure
        return _failure_of(partial(storage.remove_old, run_dir, self.exp.checkpoint.keep, self.newest_sound()))

    def newest_sound(self) -> Path | None:
        """Return the newest checkpoint of a state that was evaluated with a finite loss, if any."""
        for folder in storage.folders(self.exp.run_dir):
            try:
                if storage.read_manifest(folder).get("sound"):
                    return folder
            except (storage.Damaged, storage.OtherFormat):
                continue
        return None

    def _give_up(self, serial: int, failure: str) -> NoReturn:
        """Remove what was written, which would fill the disk, and raise."""
        run_dir = self.exp.run_dir
        if self.world.rank == 0:
            shutil.rmtree(storage.temporary(run_dir, serial), ignore_errors=True)
        reason = failure or "another rank could not write"
        raise UserError(
            f"checkpoint: {run_dir / storage.FOLDER} cannot be written ({reason}); free some space, and on several "
            "hosts use a shared folder; earlier checkpoints are intact"
        )

    def _pieces(self, client: Client, store: UnitStore, server: Server, local: LocalProgress) -> list[storage.Piece]:
        """Collect the pieces that this rank writes."""
        rank, first_client = self.world.group_rank, self.world.client == 0
        keeps = self.exp.train.optimizer_state == "keep" or local.steps > 0
        pieces = [*state.client_pieces(client, rank, keeps), *state.rank_pieces(client, rank, local)]
        if first_client or not self._one_shared_state:
            lora_rank = server.lora_ranks[self.world.client]
            pieces += shared_state.shared_pieces(store, lora_rank, self._owner(client), rank, with_base=first_client)
        if first_client and rank < client.config.expert_parallel:
            pieces += shared_state.moment_pieces(client)
        return [*pieces, *shared_state.server_pieces(server, store.units)]

    def _owner(self, client: Client) -> str:
        """Return the name under which a checkpoint holds this client's shared state."""
        return shared_state.ALL if self._one_shared_state else client.config.name

    def _clients(self, server: Server, progress: Progress, local: LocalProgress) -> dict[str, dict[str, Any]]:
        """Gather each client's manifest entry from its first rank, by client name (a collective)."""
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

    def find(self, asked: str) -> Checkpoint | None:
        """Return the checkpoint to resume from, or None if there is none yet. Warn about damaged ones and skip them.

        Args:
            asked: "auto" for the newest undamaged checkpoint, or a checkpoint's folder.

        Raises:
            UserError: if all checkpoints, or the requested one, are damaged or belong to another experiment.
        """
        if asked != AUTO:
            checkpoint = self._verified(Path(asked))
            if checkpoint is None:
                raise UserError(f"--resume: {asked} is not a complete checkpoint; use {AUTO} or another folder")
            return self._checked(checkpoint)
        folders = self._known()
        for folder in folders:
            checkpoint = self._verified(folder)
            if checkpoint is not None:
                return self._checked(checkpoint)
        if folders:
            raise UserError(
                f"--resume: all checkpoints in {self.exp.run_dir / storage.FOLDER} are damaged; restore one, or "
                "start a new run with another name=..."
            )
        return None

    def _known(self) -> list[Path]:
        """Return the checkpoints that rank 0 sees, newest first (a collective).

        Other ranks do not list the folder: on a network file system another host's listing may lag.
        """
        names = []
        if self.world.rank == 0:
            names = [folder.name for folder in storage.folders(self.exp.run_dir)]
        return [self.exp.run_dir / storage.FOLDER / name for name in gather_json(self.world.comm, names)[0]]

    def _verified(self, folder: Path) -> Checkpoint | None:
        """Return the checkpoint, or None if it is damaged; each rank verifies its share of the files (a collective).

        Raises:
            UserError: if another version of the program wrote it.
        """
        manifest: dict[str, Any] = {"files": {}}
        content, damage, other = None, "", ""
        try:
            manifest = storage.read_manifest(folder)
            content = Manifest.model_validate({key: manifest[key] for key in Manifest.model_fields if key in manifest})
            for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
                if number % self.world.comm.size == self.world.rank:
                    storage.verify_file(folder, name, expected)
        except storage.OtherFormat as error:
            other = str(error)
        except Damaged as error:
            damage = str(error)
        except ValidationError as error:
            damage = f"{storage.MANIFEST} was not written by this program ({error.errors()[0]['loc']})"
        others = list(filter(None, gather_json(self.world.comm, other)))
        if others:
            raise UserError(
                f"--resume: {folder} {others[0]}; resume with that version, or start a new run with another name=..."
            )
        damages = gather_json(self.world.comm, damage)
        if any(damages):
            if self.world.rank == 0:
                first = next(filter(None, damages))
                print(f"warning: checkpoint {folder} is damaged: {first}; skipping it", file=sys.stderr, flush=True)
            return None
        assert content is not None
        return Checkpoint(folder, content, Reader(folder, manifest["files"]))

    def _checked(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint if this run can be resumed from it.

        Raises:
            UserError: if it belongs to another experiment, or lacks a client that has its own LoRA ranks.
        """
        folder, manifest = checkpoint.folder, checkpoint.manifest
        check_same_experiment(manifest.config, self.config, folder, manifest.version)
        lost = [client.name for client in self.exp.clients if client.name not in manifest.clients]
        if lost and not self._one_shared_state:
            raise UserError(
                f"--resume: client {lost[0]!r} was lost before {folder} was written, and under merge.rule "
                f"{self.exp.merge.rule} no other client holds its LoRA ranks; use an older checkpoint, --resume FOLDER"
            )
        if manifest.data != self.data_digest:
            raise UserError(
                f"--resume: the rows of data.source have changed since {folder} was written; restore them, or start "
                "a new run with another name=..."
            )
        return checkpoint

    def restore(
        self, checkpoint: Checkpoint, client: Client, store: UnitStore, server: Server
    ) -> tuple[Progress, LocalProgress]:
        """Restore this rank's state from the checkpoint; return the run's progress and the client's.

        Raises:
            UserError: if the checkpoint lacks something.
        """
        reader, saved_clients = checkpoint.reader, checkpoint.manifest.clients
        saved = saved_clients.get(client.config.name)
        server.lora_ranks = [
            saved_clients[config.name].lora_rank if config.name in saved_clients else self.exp.lora_rank(config)
            for config in self.exp.clients
        ]
        lora_rank = server.lora_ranks[self.world.client]
        progress = restored(checkpoint.manifest.progress, saved.steps_taken if saved else 0)
        self.note_saved(progress)
        shared_state.restore_shared(store, reader, self._owner(client), lora_rank)
        shared_state.restore_moments(client, reader)
        shared_state.restore_server(server, store.units, reader)
        client.reset_counts()
        if saved is None:  # a lost client has come back; it starts from the shared state
            store.load(lora_rank)
            return progress, LocalProgress()
        state.restore_client(client, reader)
        local = LocalProgress(saved.steps, saved.bad_steps, seconds=saved.seconds)
        state.restore_rank(client, self.world.group_rank, local, reader, saved.layout)
        return progress, local


def _label(progress: Progress, clients: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the second part of a checkpoint's name: whether it was taken after a round or within one."""
    complete = not progress.merged and not any(saved["steps"] for saved in clients.values())
    return f"round-{progress.round - 1}" if complete else f"within-round-{progress.round}"


def _failure_of(action: Callable[[], object]) -> str:
    """Run an action; return its OSError as text, or "" if there was none."""
    try:
        action()
    except OSError as error:
        return str(error)
    return ""
