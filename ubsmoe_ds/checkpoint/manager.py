"""Saving where a job stands, and going on from there: what all ranks do together around checkpoint.py and state.py."""

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from ubsmoe_ds.config.experiment import ELEMENTWISE_RULES, Experiment
from ubsmoe_ds.config.sections import Section
from ubsmoe_ds.mpi.world import World

AUTO = "auto"
MOST_LOOKED_AT = 100  # checkpoints, the newest first
NAME_BYTES = 255  # the longest name that file systems take


class Manifest(Section):
    """What a federation adds to a checkpoint's manifest."""

    progress: SavedProgress
    clients: dict[str, SavedClient]
    config: dict[str, Any]
    data: str


class Found(NamedTuple):
    """A verified storage."""

    folder: Path
    manifest: Manifest
    reader: Reader


class CheckpointManager:
    """Writes and finds the checkpoints of a run; every rank of the job calls its methods.

    Args:
        exp: the experiment.
        world: this rank's place.
        data_digest: of the rows, which must be the same when the job goes on.
    """

    def __init__(self, exp: Experiment, world: World, data_digest: str) -> None:
        self.exp, self.world, self.data_digest = exp, world, data_digest
        self.config = exp.model_dump(mode="json")  # with all clients, whoever is lost later
        # under rules on factors each client holds its own ranks of the whole
        self._common = exp.merge.rule in ELEMENTWISE_RULES

    def among(self, exp: Experiment, world: World) -> "CheckpointManager":
        """The same for the clients that are left."""
        checkpoints = CheckpointManager(exp, world, self.data_digest)
        checkpoints.config = self.config
        return checkpoints

    def save(self, client: Client, store: UnitStore, server: Server, progress: Progress, local: LocalProgress) -> Path:
        """Write a checkpoint; returns its folder.

        Raises:
            UserError: if some rank could not write, as on a full disk; earlier checkpoints are untouched.
        """
        run_dir, rank, failure = self.exp.run_dir, self.world.rank, ""
        newest = max(map(storage.serial_of, storage.folders(run_dir)), default=0) if rank == 0 else 0
        serial = int(self.world.sum(np.array([newest + 1.0 if rank == 0 else 0.0]))[0])
        if rank == 0:
            failure = _failure_of(partial(storage.begin, run_dir, serial))
        self.world.barrier()
        files = np.zeros((self.world.comm.size, 33))
        if not failure:
            try:
                pieces = self._pieces(client, store, server, local)
                size, digest = storage.write_pieces(storage.temporary(run_dir, serial), rank, pieces)
                files[rank] = [size, *digest]
            except (OSError, SafetensorError) as error:
                failure = str(error)
        files = self.world.sum(files)
        clients = self._clients_table(progress, local)
        complete = not progress.merged and not clients[:, 1].any()
        label = f"round-{progress.round - 1}" if complete else f"within-round-{progress.round}"
        if rank == 0 and (files[:, 0] > 0).all():
            content = self._content(server, progress, clients)
            written = {
                storage.rank_file(r): (int(row[0]), bytes(row[1:].astype(int).tolist())) for r, row in enumerate(files)
            }
            keep = self.exp.checkpoint.keep
            failure = _failure_of(partial(storage.commit, run_dir, serial, label, written, content, keep))
        if self.world.any(bool(failure)):
            if rank == 0:
                shutil.rmtree(storage.temporary(run_dir, serial), ignore_errors=True)  # it takes the room
            reason = failure or "another rank could not write"
            raise UserError(
                f"checkpoint: {run_dir / storage.FOLDER} cannot be written ({reason}); make room there, and on "
                "several hosts share it; what was saved before is whole"
            )
        return storage.named(run_dir, serial, label)

    def _pieces(self, client: Client, store: UnitStore, server: Server, local: LocalProgress) -> list[storage.Piece]:
        """What this rank writes."""
        rank, first_client = self.world.group_rank, self.world.client == 0
        keeps = self.exp.train.optimizer_state == "keep" or local.steps > 0
        found = [*state.client_pieces(client, rank, keeps), *state.rank_pieces(client, rank, local)]
        if first_client or not self._common:
            found += store.pieces(state.ALL if self._common else client.config.name, rank, whole=first_client)
        if first_client and rank < client.config.expert_parallel:
            found += state.moment_pieces(client)
        return [*found, *state.server_pieces(server, store.units)]

    def _clients_table(self, progress: Progress, local: LocalProgress) -> np.ndarray:
        """[clients, 4]: steps taken in the run; in this round, bad ones, seconds they took (a collective)."""
        table = np.zeros((len(self.exp.clients), 4))
        if self.world.group_rank == 0:
            table[self.world.client] = [progress.steps_taken, local.steps, local.bad_steps, local.seconds]
        return self.world.sum(table)

    def _content(self, server: Server, progress: Progress, clients: np.ndarray) -> dict[str, Any]:
        """The manifest's own part."""
        of_client = {}
        for config, rank, (taken, steps, bad, seconds) in zip(
            self.exp.clients, server.ranks, clients.tolist(), strict=True
        ):
            of_client[config.name] = {
                "layout": [config.ranks, config.expert_parallel],
                "lora_rank": rank,
                "steps_taken": int(taken),
                "steps": int(steps),
                "bad_steps": int(bad),
                "seconds": seconds,
            }
        return {
            "progress": progress.saved(),
            "clients": of_client,
            "config": self.config,
            "data": self.data_digest,
        }

    def find(self, asked: str) -> Found | None:
        """The checkpoint to go on from; None: there is none yet. Damaged ones are named and passed over.

        Args:
            asked: "auto", the newest that is whole; or a checkpoint's folder.

        Raises:
            UserError: if all there are, or the folder that was asked for, are damaged, or of another experiment.
        """
        if asked != AUTO:
            found = self._verified(Path(asked))
            if found is None:
                raise UserError(f"--resume: {asked} is no whole checkpoint; use {AUTO}, or another folder")
            return self._checked(found)
        known = self._known()
        for folder in known:
            found = self._verified(folder)
            if found is not None:
                return self._checked(found)
        if known:
            raise UserError(
                f"--resume: all checkpoints in {self.exp.run_dir / storage.FOLDER} are damaged; restore one, or "
                "start anew with another name=..."
            )
        return None

    def _known(self) -> list[Path]:
        """The checkpoints that rank 0 sees, the newest first (a collective).

        Names are shared, not looked for by each rank: on a network file system another host's listing may lag.
        """
        names = np.zeros(MOST_LOOKED_AT, dtype=f"S{NAME_BYTES}")
        if self.world.rank == 0:
            newest = [folder.name.encode() for folder in storage.folders(self.exp.run_dir)[: len(names)]]
            names[: len(newest)] = newest
        shared = self.world.sum(names.view(np.uint8)).astype(np.uint8).view(names.dtype)
        return [self.exp.run_dir / storage.FOLDER / name.decode() for name in shared if name]

    def _verified(self, folder: Path) -> Found | None:
        """The checkpoint, if all is there and unchanged; each rank looks at its share of the files."""
        manifest: dict[str, Any] = {"files": {}}
        own, damage = None, ""
        try:
            manifest = storage.read_manifest(folder)
            own = Manifest.model_validate({key: manifest.get(key) for key in Manifest.model_fields})
            for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
                if number % self.world.comm.size == self.world.rank:
                    storage.verify_file(folder, name, expected)
        except Damaged as error:
            damage = str(error)
        except ValidationError as error:
            damage = f"{storage.MANIFEST} is not one of this program ({error.errors()[0]['loc']})"
        damaged = self.world.sum(
            np.array([float(rank == self.world.rank and bool(damage)) for rank in range(self.world.comm.size)])
        )
        if damaged.any():
            if int(np.argmax(damaged)) == self.world.rank:  # one rank speaks
                print(
                    f"warning: checkpoint {folder} is damaged: {damage}; it is passed over", file=sys.stderr, flush=True
                )
            return None
        assert own is not None
        return Found(folder, own, Reader(folder, manifest["files"]))

    def _checked(self, found: Found) -> Found:
        """
        Raises:
            UserError: if it belongs to another experiment.
        """
        check_same_experiment(found.manifest.config, self.config, found.folder)
        lost = [client.name for client in self.exp.clients if client.name not in found.manifest.clients]
        if lost and not self._common:
            raise UserError(
                f"--resume: client {lost[0]!r} was lost before {found.folder}, and under merge.rule "
                f"{self.exp.merge.rule} nobody else holds its ranks; go on from an older checkpoint, --resume FOLDER"
            )
        if found.manifest.data != self.data_digest:
            raise UserError(
                f"--resume: data.source holds other rows than when {found.folder} was written; restore them, or start "
                "anew with another name=..."
            )
        return found

    def restore(self, found: Found, client: Client, store: UnitStore, server: Server) -> tuple[Progress, LocalProgress]:
        """Bring this rank to where the checkpoint stands.

        Raises:
            UserError: if it lacks something.
        """
        reader, known = found.reader, found.manifest.clients
        own = known.get(client.config.name)
        server.ranks = [known[c.name].lora_rank if c.name in known else self.exp.lora_rank(c) for c in self.exp.clients]
        progress = restored(found.manifest.progress, own.steps_taken if own else 0)
        client.rank = own.lora_rank if own else client.rank
        store.restore(reader, state.ALL if self._common else client.config.name, client.rank)
        state.restore_moments(client, reader)
        state.restore_server(server, store.units, reader)
        client.reset_counts()
        if own is None:  # a client that was lost is back, with what all share
            store.load()
            return progress, LocalProgress()
        state.restore_client(client, reader)
        local = LocalProgress(own.steps, own.bad_steps, seconds=own.seconds)
        state.restore_rank(client, self.world.group_rank, local, reader, own.layout)
        return progress, local


def _failure_of(action: Any) -> str:
    try:
        action()
    except OSError as error:
        return str(error)
    return ""
