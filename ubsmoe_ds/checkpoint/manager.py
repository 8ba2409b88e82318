"""Write the checkpoints of a run and restore from one (search.py finds it); all ranks of the job work together."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import SafetensorError

from ubsmoe_ds.aggregation.controls import Controls
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.checkpoint import shared_state, state, storage
from ubsmoe_ds.checkpoint.kept_states import KeptStates
from ubsmoe_ds.checkpoint.progress import Progress, SavedClient, restored
from ubsmoe_ds.checkpoint.search import Checkpoint, newest_sound
from ubsmoe_ds.checkpoint.turns import add_sum, restore_turn, sum_pieces, turn_pieces
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.turn import Turns
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.world import World


class Resumed(NamedTuple):
    """Hold one rank's part of a checkpoint that was read.

    progress: the run's. local: of the client's local steps, where each client has its own group.
    Where clients take turns: done: by client whose turn of the current round is complete the group that now answers for
    it; turns: those of this rank's group; begin: goes on with a turn that had begun, once the client's adapter is
    loaded, and returns its progress; None if the turn had not begun.
    """

    progress: Progress
    local: LocalProgress
    done: Mapping[int, int]
    turns: Turns
    begin: Callable[[int], LocalProgress | None]


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
        self._one_shared_state = exp.merge.row.elementwise or exp.takes_turns
        self._group_names = [trainer.name for trainer in exp.trainers]  # also those of groups that are lost later
        self._saved_round: int | None = None  # the latest complete round in a checkpoint

    def among(self, exp: Experiment, world: World) -> "CheckpointManager":
        """Return a manager for the remaining clients and groups."""
        manager = CheckpointManager(exp, world, self.data_digest)
        manager.config, manager._group_names = self.config, self._group_names
        manager._saved_round = self._saved_round
        return manager

    def _number_of(self, group: int) -> int:
        """Return the number in the config of a group that is left."""
        return self._group_names.index(self.exp.trainers[group].name)

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
        turns: Turns,
        kept: Sequence[KeptStates] = (),
        controls: Controls | None = None,
    ) -> Path:
        """Write a checkpoint; return its folder (a collective).

        Args:
            client, store, server, progress, local: this rank's.
            turns: that this rank's group has completed in the current round.
            kept: what clients keep between their rounds.
            controls: SCAFFOLD's; None without.

        Raises:
            UserError: if a rank could not write, for example on a full disk; earlier checkpoints are untouched.
        """
        serial, failure = self._begin()
        file = None
        if not failure:
            pieces = self._pieces(client, store, server, local, turns)
            if controls is not None and self.world.group == 0:
                pieces += shared_state.control_pieces(controls, self.world.group_rank)
            file, failure = self._write_files(serial, pieces, kept)
        files = gather_json(self.world.comm, file)
        clients = self._clients(client, server, progress, local, turns)
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

    def _write_files(
        self, serial: int, pieces: list[storage.Piece], kept: Sequence[KeptStates]
    ) -> tuple[dict[str, Any] | None, str]:
        """Write this rank's files; return ([bytes, SHA-256] by name, "") or (None, the failure)."""
        folder, name, files = storage.temporary(self.exp.run_dir, serial), storage.rank_file(self.world.rank), {}
        try:
            size, digest = storage.write_pieces(
                folder / name, [*pieces, *(piece for states in kept for piece in states.pieces())]
            )
            files[name] = [size, digest.hex()]
            for name, written in (file for states in kept for file in states.files()):
                storage.add_file(written.path, folder / name)
                files[name] = [written.size, written.digest.hex()]
        except (OSError, SafetensorError) as error:
            return None, str(error)
        return files, ""

    def _commit(self, serial: int, label: str, files: list[Any], content: dict[str, Any]) -> str:
        """Complete the checkpoint on rank 0; return the failure or ""."""
        every = {name: file for of_rank in files for name, file in of_rank.items()}
        by_name = {name: (size, bytes.fromhex(digest)) for name, (size, digest) in every.items()}
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

    def _pieces(
        self, client: Client, store: UnitStore, server: Server, local: LocalProgress, turns: Turns
    ) -> list[storage.Piece]:
        """Collect the pieces that this rank writes."""
        rank, first_group, lora_rank = self.world.group_rank, self.world.group == 0, self._held_rank(server)
        keeps = self.exp.train.optimizer_state == "keep" or local.steps > 0
        pieces: list[storage.Piece] = []
        if local.steps > 0 or not self.exp.takes_turns:  # between turns a client's state is the shared one
            pieces += [*state.client_pieces(client, rank, keeps), *state.rank_pieces(client, rank, local)]
        if local.steps > 0:
            pieces += state.drift_pieces(client, rank)
        for turn in turns.done:
            pieces += turn_pieces(turn, self.exp.clients[turn.client].name, store, lora_rank, rank)
        pieces += sum_pieces(turns, self._number_of(self.world.group), store, lora_rank, rank)
        if first_group or not self._one_shared_state:
            pieces += shared_state.shared_pieces(store, lora_rank, self._owner(client), rank, with_base=first_group)
        if first_group and rank < client.config.expert_parallel:
            pieces += shared_state.moment_pieces(client)
        return [*pieces, *shared_state.server_pieces(server, store.units)]

    def _owner(self, client: Client) -> str:
        """Return the name under which a checkpoint holds this client's shared state."""
        return shared_state.ALL if self._one_shared_state else client.config.name

    def _held_rank(self, server: Server) -> int:
        """Return the LoRA rank of this rank's shared state."""
        return self.exp.lora.rank if self.exp.takes_turns else server.lora_ranks[self.world.group]

    def _clients(
        self, client: Client, server: Server, progress: Progress, local: LocalProgress, turns: Turns
    ) -> dict[str, dict[str, Any]]:
        """Gather each client's manifest entry from its first rank, by client name (a collective)."""
        if self.exp.takes_turns:
            return self._clients_of_groups(client, server, progress, local, turns)
        counts = None
        if self.world.group_rank == 0:
            taken = progress.steps_taken.get(self.world.group, 0)
            counts = [self.world.group, taken, local.steps, local.bad_steps, local.seconds]
        entries = {}
        for number, taken, steps, bad, seconds in filter(None, gather_json(self.world.comm, counts)):
            config = self.exp.clients[number]
            entries[config.name] = {
                "layout": [config.ranks, config.expert_parallel],
                "lora_rank": server.lora_ranks[number],
                "steps_taken": taken,
                "steps": steps,
                "bad_steps": bad,
                "seconds": seconds,
            }
        return entries

    def _clients_of_groups(
        self, client: Client, server: Server, progress: Progress, local: LocalProgress, turns: Turns
    ) -> dict[str, dict[str, Any]]:
        """Do the same where clients take turns: the groups tell what they have trained in the round."""
        turned: list[list[Any]] = []
        if self.world.group_rank == 0:
            numbers = {config.name: number for number, config in enumerate(self.exp.clients)}
            for turn in turns.done:
                steps, bad = int(turn.stats.steps + turn.stats.bad_steps), int(turn.stats.bad_steps)
                added = turn.update is None
                turned.append([turn.client, self.world.group, turn.slot, added, "done", steps, bad, turn.seconds])
            if local.steps:
                begun = [local.steps, local.bad_steps, local.seconds]
                turned.append([numbers[client.config.name], self.world.group, len(turns.done), False, "begun", *begun])
            turned = [[*turn, progress.steps_taken.get(turn[0], 0)] for turn in turned]
        told = {turn[0]: turn[1:] for part in gather_json(self.world.comm, turned) for turn in part}
        entries = {}
        for number, config in enumerate(self.exp.clients):
            may_train = [*self.exp.allowed_groups(number), 0]  # none but any for a client that deaths have cut off
            nothing = [may_train[0], 0, False, "", 0, 0, 0.0, progress.steps_taken.get(number, 0)]
            group, place, added, what, steps, bad, seconds, taken = told.get(number, nothing)
            trained, scales_L = self.exp.trained_by(number, group), progress.scales.get(number)
            entries[config.name] = {
                "layout": [trained.ranks, trained.expert_parallel],
                "lora_rank": server.lora_ranks[number],
                "steps_taken": taken,
                "steps": steps,
                "bad_steps": bad,
                "seconds": seconds,
                "turn": what,
                "group": self._number_of(group),
                "place": place,
                "added_up": added,
                "scales": None if scales_L is None else scales_L.tolist(),
            }
        return entries

    def restore(
        self,
        checkpoint: Checkpoint,
        client: Client,
        store: UnitStore,
        server: Server,
        controls: Controls | None = None,
    ) -> Resumed:
        """Restore this rank's state from the checkpoint.

        Raises:
            UserError: if the checkpoint lacks something.
        """
        reader, saved_clients = checkpoint.reader, checkpoint.manifest.clients
        saved = saved_clients.get(client.config.name)
        server.lora_ranks = [
            saved_clients[config.name].lora_rank if config.name in saved_clients else self.exp.lora_rank(config)
            for config in self.exp.clients
        ]
        lora_rank = self._held_rank(server)
        within = checkpoint.manifest.progress.merged or any(client.steps for client in saved_clients.values())
        progress = restored(checkpoint.manifest.progress, {self.world.group: saved.steps_taken if saved else 0}, within)
        self.note_saved(progress)
        shared_state.restore_shared(store, reader, self._owner(client), lora_rank)
        shared_state.restore_moments(client, reader)
        if controls is not None:
            shared_state.restore_controls(controls, reader)
        shared_state.restore_server(server, store.units, reader)
        client.reset_counts()
        if self.exp.takes_turns:
            return self._turns(checkpoint, client, store, progress)
        local = LocalProgress()
        if saved is None:  # a lost client has come back; it starts from the shared state
            store.load(lora_rank)
        else:
            local = self._begun(checkpoint, client, saved)
        return Resumed(progress, local, {}, Turns(), lambda number: None)

    def _begun(self, checkpoint: Checkpoint, client: Client, saved: SavedClient) -> LocalProgress:
        """Restore the client that the engine trains; return the progress of its local steps."""
        state.restore_client(client, checkpoint.reader)
        local = LocalProgress(saved.steps, saved.bad_steps, seconds=saved.seconds)
        state.restore_rank(client, self.world.group_rank, local, checkpoint.reader, saved.layout)
        if saved.steps > 0:
            state.restore_drift(client, checkpoint.reader)
        return local

    def _turns(self, checkpoint: Checkpoint, client: Client, store: UnitStore, progress: Progress) -> Resumed:
        """Restore the turns of the current round; with fewer groups than before each takes over those of several."""
        saved = [checkpoint.manifest.clients[config.name] for config in self.exp.clients]
        progress.steps_taken = {number: entry.steps_taken for number, entry in enumerate(saved)}
        progress.scales = {n: torch.tensor(entry.scales) for n, entry in enumerate(saved) if entry.scales is not None}
        for number, entry in enumerate(saved):
            if entry.turn == "begun":
                progress.steps_taken[number] -= entry.steps  # in case nobody goes on with it in this round
        groups = len(self.exp.trainers)
        done = {number: entry.group % groups for number, entry in enumerate(saved) if entry.turn == "done"}
        mine = [number for number, group in done.items() if group == self.world.group]
        mine.sort(key=lambda number: (saved[number].group, saved[number].place))
        rank, lora_rank, turns = self.world.group_rank, self.exp.lora.rank, Turns()
        for slot, number in enumerate(mine):
            place = (rank, lora_rank, slot)
            turns.done.append(restore_turn(client, store, checkpoint.reader, number, saved[number], place))
        sums = {saved[number].group: saved[number].layout for number in mine if saved[number].added_up}
        for group, layout in sums.items():
            add_sum(turns, client, store, checkpoint.reader, group, layout, (rank, lora_rank))

        def begin(number: int) -> LocalProgress | None:
            if saved[number].turn != "begun" or progress.round != checkpoint.manifest.progress.round:
                return None  # in later rounds it begins anew on whichever group
            local = self._begun(checkpoint, client, saved[number])
            progress.steps_taken[number] = saved[number].steps_taken
            return local

        return Resumed(progress, LocalProgress(), done, turns, begin)


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
