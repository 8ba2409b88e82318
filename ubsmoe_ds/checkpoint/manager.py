"""Write the checkpoints of a run and restore from one (search.py finds it); all ranks of the job work together."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint import shared_state, state, storage
from ubsmoe_ds.checkpoint.progress import Progress, restored
from ubsmoe_ds.checkpoint.search import Checkpoint, newest_sound
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World


class CheckpointManager:
    """Write the checkpoints of a run, and restore from one; every rank of the job calls its methods.

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
        due = bool(every) and complete > 0 and (complete % every == 0 or progress.is_over(self.exp.train))
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
            content = {"progress": progress.saved(), "clients": clients, "config": self.config}
            failure = self._commit(serial, label, files, content | {"data": self.data_digest})
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
        return _failure_of(partial(storage.remove_old, run_dir, self.exp.checkpoint.keep, newest_sound(run_dir)))

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
        within = checkpoint.manifest.progress.merged or any(client.steps for client in saved_clients.values())
        progress = restored(checkpoint.manifest.progress, saved.steps_taken if saved else 0, within)
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
