"""Find the checkpoint to resume from, verify it, and compare it with the run; all ranks of the job work together."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.compatibility import check_same_experiment
from ubsmoe_ds.checkpoint.progress import SavedClient, SavedProgress
from ubsmoe_ds.checkpoint.storage import Damaged, OtherFormat, Reader
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.sections import Section
from ubsmoe_ds.data.shares import has_sites
from ubsmoe_ds.data.site_key import STATE
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


def newest_sound(run_dir: Path) -> Path | None:
    """Return the run's newest checkpoint of a state that was evaluated with a finite loss, if any."""
    for folder in storage.folders(run_dir):
        try:
            if _content(storage.read_manifest(folder)).progress.is_sound:
                return folder
        except (Damaged, OtherFormat):
            continue
    return None


def best_rounds(run_dir: Path) -> set[int]:
    """Return the best round so far of each of the run's checkpoints, which their progress counts patience from."""
    found = set()
    for folder in storage.folders(run_dir):
        try:
            found.add(_content(storage.read_manifest(folder)).progress.best_round)
        except (Damaged, OtherFormat):
            continue
    return found


class CheckpointFinder:
    """Find the checkpoint to resume from; every rank of the job calls its methods.

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        data_digest: digest of the rows; a resumed run must have the same.
    """

    def __init__(self, exp: Experiment, world: World, data_digest: str) -> None:
        self.exp, self.world, self.data_digest = exp, world, data_digest

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
            content = _content(manifest)
            for number, (name, expected) in enumerate(sorted(manifest["files"].items())):
                if number % self.world.comm.size == self.world.rank:
                    storage.verify_file(folder, name, expected)
        except OtherFormat as error:
            other = str(error)
        except Damaged as error:
            damage = str(error)
        others = list(filter(None, gather_json(self.world.comm, other)))
        if others:
            raise UserError(
                f"--resume: {folder} {others[0]}; resume with that version, or start a new run with another name=..."
            )
        damages = gather_json(self.world.comm, damage)
        if any(damages):
            if self.world.rank == 0:
                first = next(filter(None, damages))
                say(f"warning: checkpoint {folder} is damaged: {first}; skipping it", error=True)
            return None
        assert content is not None
        return Checkpoint(folder, content, Reader(folder, manifest["files"]))

    def _checked(self, checkpoint: Checkpoint) -> Checkpoint:
        """Return the checkpoint if this run can be resumed from it.

        Raises:
            UserError: if it belongs to another experiment, or lacks a client that has its own LoRA ranks.
        """
        folder, manifest = checkpoint.folder, checkpoint.manifest
        check_same_experiment(manifest.config, self.exp.model_dump(mode="json"), folder, manifest.version)
        took_turns = any(manifest.config.get(key) is not None for key in ("groups", "sampling"))
        if took_turns != self.exp.takes_turns:
            raise UserError(
                f"--resume: groups is {'null' if took_turns else 'set'}, but {'set' if took_turns else 'null'} in "
                f"{folder}, whose state it shares out; set it back, or start a new run with another name=..."
            )
        lost = [client.name for client in self.exp.clients if client.name not in manifest.clients]
        if lost and not self.exp.merge.row.elementwise:
            raise UserError(
                f"--resume: client {lost[0]!r} was lost before {folder} was written, and under merge.rule "
                f"{self.exp.merge.rule} no other client holds its LoRA ranks; use an older checkpoint, --resume FOLDER"
            )
        if manifest.data != self.data_digest:
            what = "the rows of data.source have"
            if has_sites(self.exp.clients):
                what = f"rows of a client's source, or the key of its site ({STATE}, docs/data.md), have"
            raise UserError(
                f"--resume: {what} changed since {folder} was written; restore them, or start a new run with another "
                "name=..."
            )
        return checkpoint


def _content(manifest: Mapping[str, Any]) -> Manifest:
    """Return the run's part of a manifest; raise `Damaged` if this program did not write it."""
    try:
        content = Manifest.model_validate({key: manifest[key] for key in Manifest.model_fields if key in manifest})
    except ValidationError as error:
        raise Damaged(f"{storage.MANIFEST} was not written by this program ({error.errors()[0]['loc']})") from error
    for name, client in content.clients.items():  # each rank has written a file
        ranks, expert_parallel = client.layout
        if not 1 <= expert_parallel <= ranks <= len(manifest["files"]) or ranks % expert_parallel:
            raise Damaged(f"{storage.MANIFEST} has the layout {client.layout} of client {name!r}, which cannot be")
    return content
