"""Build one rank's `Federation` from an experiment. Import this only once the rendezvous variables are set."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import numpy as np
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
from ubsmoe_ds.checkpoint.manager import CheckpointManager
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.search import Checkpoint, CheckpointFinder
from ubsmoe_ds.client.deepspeed_setup import start_deepspeed
from ubsmoe_ds.client.engine import Client, LocalProgress
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.client.generation import Prompts, check_positions
from ubsmoe_ds.client.packing_check import check_packing
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.chat import PLAINLY
from ubsmoe_ds.data.client_rows import ClientRows, client_rows, merge_weights
from ubsmoe_ds.data.encoding import Encoder, read_encoder
from ubsmoe_ds.data.lengths import NO_ROWS, Lengths
from ubsmoe_ds.data.row_report import RowReport
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.federation.aggregator import Aggregator
from ubsmoe_ds.federation.announcement import headline, placement, row_counts, warnings
from ubsmoe_ds.federation.evaluation import Evaluators
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
    if exp.data.packing:
        check_packing(client.model)
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
        evaluators=texts.evaluators,
        prompts=prompts,
        rows=_row_report(exp, texts, rows),
        batches_from=batches_from,
        monitor=None,
        checkpoints=checkpoints,
        stop=stop,
        hang_watch=hang_watch,
        stopwatch=stopwatch,
        progress=progress,
        local=local,
    )
    parts = (rows.training, rows.evaluation, rows.own_evaluation)
    plainly = [PLAINLY] if texts.encoder.writes_plainly(*parts) else []
    _announce(federation, checkpoint, in_own_folder, [*rows.notes, *plainly])
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
    lengths, own_lengths: numbers of training rows, and of own evaluation rows, of each client.
    tokens: answer tokens of each client's training rows; 0 where weights do not go by them.
    evaluators: hold the evaluation rows.
    encoder: turns rows into tokens and batches.
    """

    examples: Sequence[Example]
    lengths: list[Lengths]
    tokens: list[int]
    own_lengths: list[Lengths]
    evaluators: Evaluators
    encoder: Encoder


def _encode(exp: Experiment, world: World, rows: ClientRows) -> _Texts:
    """Turn a client's rows into tokens, and tell all ranks how many of them fit (a collective)."""
    encoder = read_encoder(exp)
    examples, lengths = encoder.encode(rows.training, exp.clients[world.client].name)

    def evaluator(part: Sequence[Row]) -> Evaluator | None:
        if not part:
            return None
        data, size = exp.data, exp.evaluation.batch_size
        found = Evaluator(part, encoder.tokenizer, data.max_length, size, encoder.chat(part), data.overlong)
        check_window(encoder.model, found.longest)
        return found

    evaluators = Evaluators(evaluator(rows.evaluation), evaluator(rows.own_evaluation))
    own = evaluators.own.lengths if evaluators.own else NO_ROWS
    by_tokens = exp.train.weights == "tokens"  # else rows in a file are not tokenised for it
    table = np.zeros((len(exp.clients), 2 * len(lengths) + 1))
    if world.group_rank == 0:
        tokens = sum(len(example.places) for example in examples) if by_tokens else 0
        table[world.client] = *lengths, *own, tokens
    counts_C = world.sum(table).astype(int).tolist()
    training, evaluation = ([Lengths(*counts[part]) for counts in counts_C] for part in (slice(3), slice(3, 6)))
    return _Texts(examples, training, [counts[-1] for counts in counts_C], evaluation, evaluators, encoder)


def _row_report(exp: Experiment, texts: _Texts, rows: ClientRows) -> RowReport:
    """Name the numbers of rows by client."""
    names, common = [client.name for client in exp.clients], texts.evaluators.common
    own = {name: lengths for name, lengths in zip(names, texts.own_lengths, strict=True) if lengths.rows}
    return RowReport(
        dict(zip(names, texts.lengths, strict=True)),
        common.lengths if common else NO_ROWS,
        common.dropped if common else [],
        rows.unused,
        rows.left_out,
        own,
    )


def _prompts(exp: Experiment, client: Client, texts: _Texts) -> Prompts | None:
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
    lines = (headline(exp, federation.client), placement(exp, world), shares, *warnings(exp, federation.client))
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
