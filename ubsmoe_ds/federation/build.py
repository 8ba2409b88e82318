"""One rank's `Federation`, put together from an experiment. Imported only when the rendezvous variables are set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from ubsmoe_ds.aggregation.exchange import Exchange
from ubsmoe_ds.aggregation.layout import Unit, client_layouts, owners
from ubsmoe_ds.aggregation.server import Server
from ubsmoe_ds.aggregation.shared_memory import SHARED_FOLDER, SharedMemory
from ubsmoe_ds.aggregation.units import UnitStore
from ubsmoe_ds.base.files import writes
from ubsmoe_ds.base.malloc import release_freed_memory
from ubsmoe_ds.base.stopwatch import Stopwatch
from ubsmoe_ds.checkpoint import storage
from ubsmoe_ds.checkpoint.manager import CheckpointManager, FoundCheckpoint
from ubsmoe_ds.checkpoint.progress import Progress
from ubsmoe_ds.checkpoint.state import replicate
from ubsmoe_ds.client.engine import Client, LocalProgress, start_deepspeed
from ubsmoe_ds.client.evaluation import Evaluator
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, StepBatch
from ubsmoe_ds.data.client_rows import ClientRows, client_rows
from ubsmoe_ds.data.encoding import Encoder, read_encoder
from ubsmoe_ds.federation.aggregator import Aggregator, ExchangeFactory
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.launching.placement import describe
from ubsmoe_ds.launching.run_folder import check_run_folder, goes_on
from ubsmoe_ds.models.cost import trainable_parameters
from ubsmoe_ds.models.hf_config import check_window, model_shape
from ubsmoe_ds.mpi.preemption import StopRequests
from ubsmoe_ds.mpi.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.federation.monitor import Monitor

GROUPED_PRODUCTS = (9, 0)  # CUDA's compute capability from which torch has them
CALIBRATION_STEPS = 2  # whose rows give the first moments; they are trained on all the same


def build(
    exp: Experiment,
    world: World,
    stop: StopRequests,
    *,
    on_accelerator: bool,
    verbose: bool,
    resume: str | None = None,
) -> Federation:
    """Read data and model, start this client's DeepSpeed world, plan the exchange.

    Args:
        exp: the experiment.
        world, stop: this rank's.
        on_accelerator: whether the job runs on accelerators.
        verbose: let DeepSpeed print.
        resume: the checkpoint to go on from, see `CheckpointManager.find`; None: start anew.

    Raises:
        UserError: for bad rows, a client without rows, a broken model folder, a run folder in use, or a checkpoint
            that cannot be used.
    """
    if not verbose:
        transformers_logging.disable_progress_bar()
    rows = client_rows(exp, world)
    checkpoints = CheckpointManager(exp, world, rows.digest)
    found = None if resume is None else checkpoints.find(resume)
    own = goes_on(exp, resume)
    if world.rank == 0 and not (own and found is not None):
        check_run_folder(exp, own)
    texts = _texts(exp, rows)
    start_deepspeed(on_accelerator, verbose)
    client = Client(exp, exp.clients[world.client], world.group_rank, verbose)
    release_freed_memory()
    store = UnitStore(
        client.model,
        client.gradient_hook.masters,
        lora_rank=exp.lora_rank(client.config),
        dmr=exp.dmr.enabled,
        stacking=exp.merge.row.stacking,
        seed=exp.seed,
    )
    batches_from = _batches(world, texts)
    if client.moments is not None and found is None:
        client.calibrate(batches_from(0), CALIBRATION_STEPS)
    exchange_for, owned = plan_exchanges(exp, world, store, _say if world.rank == 0 else None)
    server = Server(exp, owned, rows.weights)
    progress, local = Progress(), LocalProgress()
    if found is not None:
        progress, local = checkpoints.restore(found, client, store, server)
    stopwatch = Stopwatch()
    aggregator = Aggregator(exp, world, client, store, server, exchange_for, stopwatch)
    if found is not None:
        aggregator.moments_shared = True
        aggregator.replica = replicate(world, server, store.units) if world.survives else {}
    federation = Federation(
        exp=exp,
        world=world,
        client=client,
        aggregator=aggregator,
        evaluator=texts.evaluator,
        batches_from=batches_from,
        monitor=None,
        checkpoints=checkpoints,
        stop=stop,
        stopwatch=stopwatch,
        progress=progress,
        local=local,
    )
    _announce(federation, rows, texts, found)
    return federation


class _Texts(NamedTuple):
    """What a client trains on and is asked; `cut` prompts for training have lost their beginning."""

    examples: Sequence[Example]
    cut: int
    evaluator: Evaluator
    encoder: Encoder


def _texts(exp: Experiment, rows: ClientRows) -> _Texts:
    encoder = read_encoder(exp)
    examples, cut = encoder.encode(rows.training)
    evaluator = Evaluator(rows.evaluation, encoder.tokenizer, exp.data.max_length, exp.evaluation.batch_size)
    check_window(encoder.model, evaluator.longest)
    return _Texts(examples, cut, evaluator, encoder)


def _announce(federation: Federation, rows: ClientRows, texts: _Texts, found: FoundCheckpoint | None) -> None:
    """Open the run's folder, on the rank that writes, and say what is about to run."""
    exp, world = federation.exp, federation.world
    cut_prompts = world.sum(np.array([texts.cut if world.group_rank == 0 else 0.0]))[0]
    world.barrier()  # nothing is written before every rank has what it needs
    if world.rank != 0:
        return
    cuts = {
        "training": (int(cut_prompts), sum(rows.counts)),
        "evaluation": (texts.evaluator.cut, len(rows.evaluation)),
    }
    federation.monitor = _open_monitor(exp, found)
    met = [f"; {c.name} meets at {at}" for c, at in zip(exp.clients, world.meetings, strict=True) if at]
    placed = "".join([f"placement: {describe(exp.clients, world.group_hosts)}", *met])
    for line in (_headline(exp, federation.client), placed, *_warnings(exp, cuts)):
        federation.monitor.say(line)


def _batches(world: World, texts: _Texts) -> Callable[[int], Iterator[StepBatch]]:
    """Number of a step -> that step of this rank's client and all that follow."""

    def batches_from(first: int) -> Iterator[StepBatch]:
        return texts.encoder.steps(texts.examples, world.client, world.group_rank, first)

    return batches_from


def _say(line: str) -> None:
    print(line, flush=True)


def plan_exchanges(
    exp: Experiment, world: World, store: UnitStore, warn: Callable[[str], None] | None = None
) -> tuple[ExchangeFactory, list[Unit]]:
    """How to plan an exchange for given LoRA ranks, and the units that this rank owns whatever they are."""
    owner = owners(store.units, exp.lora.rank, world.comm.size)
    # what ranks share of a host's memory does not survive one of them
    memory = None if world.survives else SharedMemory.of_job(world.comm)
    warned = False

    def plan(ranks: Sequence[int], reply_ranks: Sequence[int]) -> Exchange:
        layouts = [
            replace(layout, lora_rank=rank, reply_rank=reply)
            for layout, rank, reply in zip(client_layouts(exp), ranks, reply_ranks, strict=True)
        ]
        payload, same = exp.merge.payload, exp.merge.row.elementwise
        exchange = Exchange(world.comm, layouts, store.units, exp.num_experts, owner, payload, memory, same_reply=same)
        nonlocal warned
        if warn is not None and not warned and memory is not None and exchange.memory is None:
            warned = True
            warn(
                f"warning: {SHARED_FOLDER} has no room for what ranks exchange; they send messages, which is slower; "
                "enlarge it (docker run --shm-size=...)"
            )
        return exchange

    return plan, [unit for unit, rank in zip(store.units, owner, strict=True) if rank == world.rank]


def _open_monitor(exp: Experiment, found: FoundCheckpoint | None) -> "Monitor":
    """Only the rank that writes pays for importing TensorBoard."""
    from ubsmoe_ds.federation.monitor import Monitor

    if found is None:
        return Monitor(exp)
    with writes(exp.run_dir / storage.FOLDER):
        storage.set_aside_newer(exp.run_dir, found.folder)
    monitor = Monitor(exp, go_on_from=found.manifest.progress.round)
    monitor.say(f"goes on from {found.folder}")
    return monitor


def _headline(exp: Experiment, client: Client) -> str:
    """What is about to run, in one line."""
    ks = " ".join(str(exp.active_experts(c)) for c in exp.clients)
    ranks = " ".join(map(str, dict.fromkeys(exp.lora_ranks)))
    shape = model_shape(client.hf_config, lora_rank=exp.lora.rank, lora_attention=exp.lora.attention)
    adapter = trainable_parameters(shape, exp.router.trainable)
    return (
        f"{exp.name}: {exp.method}, {len(exp.clients)} clients on {exp.world_size} ranks ({client.device.type}), "
        f"K {ks} of {exp.num_experts} experts, LoRA rank {ranks}, "
        f"adapter {adapter / 1e6:.2f} M parameters, rounds {exp.train.rounds}"
    )


def _warnings(exp: Experiment, cuts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """What an experiment loses: pseudo-gradients by its merge rule, and the beginnings of prompts (how many of all)."""
    pseudo_gradients = exp.pseudo_gradient.estimator != "none"
    if exp.merge.row.by_utilisation and pseudo_gradients:
        yield (
            f"warning: merge.rule {exp.merge.rule} gives no weight to a client that did not use an expert, so the "
            "pseudo-gradients that it gave that expert are lost; set merge.rule fedavg to keep them"
        )
    if torch.cuda.is_available() and exp.accelerator != "cpu":
        capability = torch.cuda.get_device_capability()
        if capability < GROUPED_PRODUCTS or not exp.deepspeed.use_bf16:
            yield (
                "warning: torch computes experts one by one here; they are one product in bf16 on devices of compute "
                f"capability 9.0 or more (this one: {'.'.join(map(str, capability))}, bf16 {exp.deepspeed.use_bf16})"
            )
    if any(cut for cut, _ in cuts.values()):
        found = " and ".join(f"{cut} of {total} {kind}" for kind, (cut, total) in cuts.items())
        yield f"note: {found} prompts lose their beginning to data.max_length={exp.data.max_length}"
