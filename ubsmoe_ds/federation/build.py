"""Build one rank's `Federation` from an experiment. Import this only once the rendezvous variables are set."""

from typing import TYPE_CHECKING
from uuid import uuid4

from transformers.utils import logging as transformers_logging

from ubsmoe_ds.adapters.start import start_from_adapter
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import writes
from ubsmoe_ds.base.malloc import release_freed_memory
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.kept_states import KeptStates
from ubsmoe_ds.checkpoint.manager import CheckpointManager, Resumed
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.search import Checkpoint, CheckpointFinder
from ubsmoe_ds.client.deepspeed_setup import start_deepspeed
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.generation import Prompts, check_positions
from ubsmoe_ds.client.packing_check import check_packing
from ubsmoe_ds.client.turn import Turns
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.client_rows import client_rows, merge_weights
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.announcement import headline, placement, row_counts, warnings
from ubsmoe_ds.federation.exchanges import plan_exchanges
from ubsmoe_ds.federation.roster import Amount, Roster
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.federation.texts import Texts
from ubsmoe_ds.federation.training import GroupTraining
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.launching.run_folder import (
    check_contents,
    check_run_folder,
    clear_run_folder,
    open_run_folder,
    resumes_in_place,
)
from ubsmoe_ds.models.hf_config import model_shape
from ubsmoe_ds.mpi.collectives import gather_json
from ubsmoe_ds.mpi.finished import FinishedTurns
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor

CALIBRATION_STEPS = 2  # their rows give the first moments; they are trained on later all the same


def build(
    exp: Experiment,
    world: World,
    stop: StopRequests,
    hang_watch: HangWatch,
    *,
    on_accelerator: bool,
    verbose: bool,
    resume: str | None = None,
) -> Federation:
    """Read data and model, start this group's DeepSpeed world, and plan the exchange (a collective).

    Args:
        exp: the experiment.
        world: this rank's place in the job.
        stop: requests to stop.
        hang_watch: is told of this rank's progress.
        on_accelerator: whether the job runs on accelerators.
        verbose: let DeepSpeed print.
        resume: the checkpoint to resume from, see `CheckpointFinder.find`; None: start a new run.

    Raises:
        UserError: for bad rows, a client without rows, a broken model folder, a run folder in use, or a checkpoint
            that cannot be used.
    """
    if not verbose:
        transformers_logging.disable_progress_bar()
    rows = client_rows(exp, world)
    checkpoint, in_own_folder = _find_checkpoint(exp, world, rows.digest, resume)
    checkpoints = CheckpointManager(exp, world, rows.digest)
    texts = Texts(exp, world, rows)
    start_deepspeed(on_accelerator, verbose)
    client = _client(exp, world, verbose)
    started_from = start_from_adapter(exp, client) if exp.lora.start and checkpoint is None else {}
    release_freed_memory()
    prompts = _prompts(exp, client, texts)
    aggregator = _aggregator(exp, world, client, texts)
    resumed = Resumed(Progress(started_from=started_from), LocalProgress(), {}, Turns(), lambda number: None)
    if checkpoint is not None:
        resumed = checkpoints.restore(checkpoint, client, aggregator.store, aggregator.server, aggregator.controls)
        aggregator.note_restored()
    training = _training(aggregator, texts, resumed, stop, hang_watch)
    saved = None if checkpoint is None else checkpoint.reader
    keeps = exp.takes_turns and exp.train.optimizer_state == "keep"
    share = 1 / max(1, keeps + exp.train.scaffold)
    training.kept = KeptStates(exp, world, saved, share=share) if keeps else None
    training.kept_controls = KeptStates(exp, world, saved, "controls", share) if exp.train.scaffold else None
    if exp.sampling is not None and exp.sampling.over_sample > 1:
        training.finished = FinishedTurns(world, resumed.progress.round, len(resumed.done))
    if client.moments is not None and checkpoint is None:
        aggregator.calibrated = training.calibrate(CALIBRATION_STEPS)
    progress = resumed.progress
    progress.run_id = _run_id(world, progress.run_id if in_own_folder else "")
    federation = Federation(
        training=training,
        prompts=prompts,
        monitor=None,
        checkpoints=checkpoints,
        shows_schedule=verbose and exp.takes_turns,
    )
    _announce(federation, checkpoint, in_own_folder)
    return federation


def _client(exp: Experiment, world: World, verbose: bool) -> Client:
    """Return this group's engine, as the first client that it may train."""
    first = exp.trained_by(exp.clients_for(world.group)[0], world.group)
    if exp.takes_turns:
        first = first.model_copy(update={"lr": None})  # the engine begins with everybody's rate
    client = Client(exp, first, world.group_rank, verbose)
    if exp.data.packing:
        check_packing(client.model)
    return client


def _aggregator(exp: Experiment, world: World, client: Client, texts: Texts) -> Aggregator:
    """Plan the exchange, and return what merges on this rank (a collective)."""
    store = _unit_store(exp, client)
    exchange_for, owned = plan_exchanges(exp, world, store, _print if world.rank == 0 else None)
    # w_c is of what is trained on
    weights = merge_weights(exp.train.weights, [lengths.kept for lengths in texts.lengths], texts.answer_tokens)
    return Aggregator(exp, world, client, store, Server(exp, owned, weights), exchange_for, Stopwatch())


def _training(
    aggregator: Aggregator, texts: Texts, resumed: Resumed, stop: StopRequests, hang_watch: HangWatch
) -> GroupTraining:
    """Return what trains this group's clients, in the round and turn that the run goes on from."""
    exp, world, client = aggregator.exp, aggregator.world, aggregator.client
    shape = model_shape(client.hf_config, lora_rank=exp.lora.rank, lora_attention=exp.lora.attention)
    kept, own = ([lengths.kept for lengths in part] for part in (texts.lengths, texts.own_lengths))
    training, evaluation = (list(map(Amount, *part)) for part in ((kept, texts.tokens), (own, texts.own_tokens)))
    roster = Roster(exp, shape, training, evaluation, resumed.progress.measured)
    roster.note_done(resumed.progress.round, resumed.done)
    current = exp.clients_for(world.group)[0]
    return GroupTraining(
        aggregator=aggregator,
        texts=texts,
        rows=texts.report(),
        roster=roster,
        progress=resumed.progress,
        stop=stop,
        hang_watch=hang_watch,
        current=current,
        own=current,
        local=resumed.local,
        turns=resumed.turns,
        begin=resumed.begin,
    )


def _run_id(world: World, resumed: str) -> str:
    """Return the id of the run that is resumed, or if that is empty, a new one (a collective)."""
    return resumed or gather_json(world.comm, uuid4().hex)[0]


def _find_checkpoint(
    exp: Experiment, world: World, data_digest: str, resume: str | None
) -> tuple[Checkpoint | None, bool]:
    """Find the checkpoint to resume from, and raise if the run's folder is in use (a collective).

    Returns:
        (checkpoint, or None; whether the run may go on in its own folder).
    """
    checkpoint = None if resume is None else CheckpointFinder(exp, world, data_digest).find(resume)
    in_own_folder = resumes_in_place(exp, resume)
    if world.rank == 0 and not (in_own_folder and checkpoint is not None):
        check_run_folder(exp, in_own_folder)
    return checkpoint, in_own_folder


def _prompts(exp: Experiment, client: Client, texts: Texts) -> Prompts | None:
    """Return the evaluation prompts that the run answers as it goes; None if it is not asked to."""
    count = exp.evaluation.generate
    if not count:
        return None
    if texts.evaluators.common is None:
        raise UserError(f"evaluation.generate: {count} needs rows that all clients share; set data.eval_source, or 0")
    prompts = Prompts(texts.evaluators.common.packed[:count], texts.encoder.tokenizer)
    setting = f"evaluation.generate: {prompts.max_new_tokens} tokens of an answer"
    remedy = "lower data.max_length, or set evaluation.generate=0"
    check_positions(client.model, prompts.tokens, prompts.max_new_tokens, setting, remedy)
    return prompts


def _unit_store(exp: Experiment, client: Client) -> UnitStore:
    """Make the flat buffer of the client's trainable state."""
    return UnitStore(
        client.model,
        client.gradient_hook.masters,
        lora_rank=client.spec.lora_rank,
        dmr=exp.dmr.enabled,
        stacking=exp.merge.row.stacking,
        seed=exp.seed,
    )


def _announce(federation: Federation, checkpoint: Checkpoint | None, in_own_folder: bool) -> None:
    """Open the run's folder on the first rank, and print what is about to run (a collective)."""
    exp, world, rows = federation.exp, federation.world, federation.training.rows
    world.barrier()  # nothing is written before every rank has what it needs
    if world.rank != 0:
        return
    federation.monitor = _open_monitor(exp, checkpoint, federation.progress.run_id, in_own_folder)
    shares = row_counts(rows.kept, federation.aggregator.server.weights, exp.train.weights)
    lines = (headline(exp, federation.client), placement(exp, world), shares, *warnings(exp, federation.client))
    for line in (*lines, *federation.training.texts.notes(), *rows.lines(exp.data)):
        federation.monitor.say(line)


def _open_monitor(exp: Experiment, checkpoint: Checkpoint | None, run_id: str, in_own_folder: bool) -> "Monitor":
    """Take the run's folder, and open the monitor of a new or a resumed run."""
    from ubsmoe_ds.federation.monitor import Monitor  # imports TensorBoard, which only the first rank needs

    owner = open_run_folder(exp.run_dir, run_id)
    if checkpoint is None:
        check_contents(exp, in_own_folder)  # once more: another job may have come and gone
        clear_run_folder(exp.run_dir)
        return Monitor(exp, run_id, owner)
    with writes(exp.run_dir / storage.FOLDER):
        storage.set_aside_newer(exp.run_dir, checkpoint.folder)
    monitor = Monitor(exp, run_id, owner, resume_at=checkpoint.manifest.progress.round)
    monitor.say(f"resumed from {checkpoint.folder}")
    return monitor


def _print(line: str) -> None:
    say(line)
