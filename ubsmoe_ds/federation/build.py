"""Build one rank's `Federation` from an experiment. Import this only once the rendezvous variables are set."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import numpy as np
from transformers.utils import logging as transformers_logging

from ubsmoe_ds.adapters.start import start_from_adapter
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.files import writes
from ubsmoe_ds.base.malloc import release_freed_memory
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.search import Checkpoint, CheckpointFinder
from ubsmoe_ds.client.deepspeed_setup import start_deepspeed
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.client.generation import Prompts, check_positions
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.chat import PLAINLY
from ubsmoe_ds.data.client_rows import ClientRows, client_rows, merge_weights
from ubsmoe_ds.data.encoding import Encoder, read_encoder
from ubsmoe_ds.data.lengths import Lengths
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.data.sources import Unused
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.announcement import headline, placement, row_counts, warnings
from ubsmoe_ds.federation.exchanges import plan_exchanges
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.launching.run_folder import (
    check_contents,
    check_run_folder,
    clear_run_folder,
    open_run_folder,
    resumes_in_place,
)
from ubsmoe_ds.models.hf_config import check_window
from ubsmoe_ds.mpi.collectives import gather_json
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
    """Read data and model, start this client's DeepSpeed world, and plan the exchange (a collective).

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
    texts = _encode(exp, world, rows)
    start_deepspeed(on_accelerator, verbose)
    client = Client(exp, exp.clients[world.client], world.group_rank, verbose)
    started_from = start_from_adapter(exp, client) if exp.lora.start and checkpoint is None else {}
    release_freed_memory()
    prompts = _prompts(exp, client, texts)
    store = _unit_store(exp, client)
    batches_from = _batches(world, texts)
    if client.moments is not None and checkpoint is None:
        client.calibrate(batches_from(0), CALIBRATION_STEPS)
    exchange_for, owned = plan_exchanges(exp, world, store, _print if world.rank == 0 else None)
    kept = [lengths.kept for lengths in texts.lengths]  # w_c is of what is trained on
    server = Server(exp, owned, merge_weights(exp.train.weights, kept, texts.tokens))
    progress, local = Progress(started_from=started_from), LocalProgress()
    if checkpoint is not None:
        progress, local = checkpoints.restore(checkpoint, client, store, server)
    stopwatch = Stopwatch()
    aggregator = Aggregator(exp, world, client, store, server, exchange_for, stopwatch)
    if checkpoint is not None:
        aggregator.note_restored()
    progress.run_id = _run_id(world, progress.run_id if in_own_folder else "")
    federation = Federation(
        exp=exp,
        world=world,
        client=client,
        aggregator=aggregator,
        evaluator=texts.evaluator,
        prompts=prompts,
        rows=_row_report(exp, texts, rows.unused),
        batches_from=batches_from,
        monitor=None,
        checkpoints=checkpoints,
        stop=stop,
        hang_watch=hang_watch,
        stopwatch=stopwatch,
        progress=progress,
        local=local,
    )
    notes = [PLAINLY] if texts.encoder.writes_plainly(rows.training, rows.evaluation) else []
    _announce(federation, checkpoint, in_own_folder, notes)
    return federation


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


class _Texts(NamedTuple):
    """A client's rows as tokens.

    examples: what it trains on.
    lengths: number of training rows of each client by what length did to them.
    tokens: answer tokens of each client's training rows.
    evaluator: holds the evaluation rows.
    encoder: turns rows into tokens and batches.
    """

    examples: Sequence[Example]
    lengths: list[Lengths]
    tokens: list[int]
    evaluator: Evaluator
    encoder: Encoder


def _encode(exp: Experiment, world: World, rows: ClientRows) -> _Texts:
    """Turn a client's rows into tokens, and tell all ranks how many of them fit (a collective)."""
    encoder = read_encoder(exp)
    examples, lengths = encoder.encode(rows.training, exp.clients[world.client].name)
    data, chat = exp.data, encoder.chat(rows.evaluation)
    size = exp.evaluation.batch_size
    evaluator = Evaluator(rows.evaluation, encoder.tokenizer, data.max_length, size, chat, data.overlong)
    check_window(encoder.model, evaluator.longest)
    table = np.zeros((len(exp.clients), len(lengths) + 1))
    if world.group_rank == 0:
        table[world.client] = [*lengths, sum(len(example.places) for example in examples)]
    counts = world.sum(table).astype(int).tolist()
    of_clients, tokens = [Lengths(*part[:-1]) for part in counts], [part[-1] for part in counts]
    return _Texts(examples, of_clients, tokens, evaluator, encoder)


def _row_report(exp: Experiment, texts: _Texts, unused: list[Unused]) -> RowReport:
    """Name the numbers of rows by client."""
    training = dict(zip([client.name for client in exp.clients], texts.lengths, strict=True))
    return RowReport(training, texts.evaluator.lengths, texts.evaluator.dropped, unused)


def _prompts(exp: Experiment, client: Client, texts: _Texts) -> Prompts | None:
    """Return the evaluation prompts that the run answers as it goes; None if it is not asked to."""
    count = exp.evaluation.generate
    if not count:
        return None
    prompts = Prompts(texts.evaluator.packed[:count], texts.encoder.tokenizer)
    setting = f"evaluation.generate: {prompts.max_new_tokens} tokens of an answer"
    remedy = "lower data.max_length, or set evaluation.generate=0"
    check_positions(client.model, prompts.tokens, prompts.max_new_tokens, setting, remedy)
    return prompts


def _unit_store(exp: Experiment, client: Client) -> UnitStore:
    """Make the flat buffer of the client's trainable state."""
    return UnitStore(
        client.model,
        client.gradient_hook.masters,
        lora_rank=exp.lora_rank(client.config),
        dmr=exp.dmr.enabled,
        stacking=exp.merge.row.stacking,
        seed=exp.seed,
    )


def _batches(world: World, texts: _Texts) -> Callable[[int], Iterator[StepBatch]]:
    """Return a function from the number of a step to this rank's batches from that step on."""

    def batches_from(first: int) -> Iterator[StepBatch]:
        return texts.encoder.steps(texts.examples, world.client, world.group_rank, first)

    return batches_from


def _announce(federation: Federation, checkpoint: Checkpoint | None, in_own_folder: bool, notes: Sequence[str]) -> None:
    """Open the run's folder on the first rank, and print what is about to run (a collective)."""
    exp, world = federation.exp, federation.world
    world.barrier()  # nothing is written before every rank has what it needs
    if world.rank != 0:
        return
    federation.monitor = _open_monitor(exp, checkpoint, federation.progress.run_id, in_own_folder)
    shares = row_counts(federation.rows.kept, federation.aggregator.server.weights, exp.train.weights)
    lines = (headline(exp, federation.client), placement(exp, world), shares, *warnings(exp))
    for line in (*lines, *notes, *federation.rows.lines(exp.data)):
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
