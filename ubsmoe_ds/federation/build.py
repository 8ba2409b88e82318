"""One rank's `Federation`, put together from an experiment. Imported only when the rendezvous variables are set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ubsmoe_ds.client import Client, start_deepspeed
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.cost import trainable_parameters
from ubsmoe_ds.data.batches import encode, steps
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import load_rows
from ubsmoe_ds.errors import UserError
from ubsmoe_ds.evaluation import Evaluator
from ubsmoe_ds.federation.exchange import ClientLayout, Exchange, Unit, owners
from ubsmoe_ds.federation.host_memory import SHARED_FOLDER, HostMemory
from ubsmoe_ds.federation.modulation import target_utilisation
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.federation.server import Server
from ubsmoe_ds.federation.units import UnitStore
from ubsmoe_ds.memory import release_freed_memory
from ubsmoe_ds.models.causal_lm import model_shape
from ubsmoe_ds.run_folder import check_run_folder
from ubsmoe_ds.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.monitor import Monitor

Plan = Callable[[Sequence[int], Sequence[int]], Exchange]
GROUPED_PRODUCTS = (9, 0)  # CUDA's compute capability from which torch has them
CALIBRATION_STEPS = 2  # whose rows give the first moments; they are trained on all the same


def build(exp: Experiment, world: World, *, on_accelerator: bool, verbose: bool) -> Federation:
    """Read data and model, start this client's DeepSpeed world, plan the exchange.

    Raises:
        UserError: for bad rows, a client without rows, a broken model folder or a run folder in use.
    """
    if world.rank == 0:
        check_run_folder(exp)
    if not verbose:
        transformers_logging.disable_progress_bar()
    train_rows, eval_rows = load_rows(exp.data, exp.seed)
    shares = partition([row["task"] for row in train_rows], exp.clients, exp.data, exp.seed)
    tokenizer = load_tokenizer(exp)
    examples, cut = encode([train_rows[i] for i in shares[world.client]], tokenizer, exp.data.max_length)
    start_deepspeed(on_accelerator, verbose)
    config = exp.clients[world.client]
    client = Client(exp, config, world.client_rank, verbose)
    release_freed_memory()
    store = UnitStore(
        client.model,
        client.finisher.masters,
        rank=client.rank,
        dmr=exp.dmr.enabled,
        stacking=exp.merge.rule == "flora",
        seed=exp.seed,
    )
    weights = [len(share) / len(train_rows) for share in shares]
    active = [exp.active_experts(c) for c in exp.clients]
    evaluator = Evaluator(eval_rows, tokenizer, exp.data.max_length, exp.evaluation.batch_size)
    monitor = _open_monitor(exp) if world.rank == 0 else None
    cut_prompts = world.sum(np.array([cut if world.client_rank == 0 else 0.0]))[0]
    if monitor is not None:
        cuts = {"training": (int(cut_prompts), len(train_rows)), "evaluation": (evaluator.cut, len(eval_rows))}
        for line in (_headline(exp, client), *_warnings(exp, cuts)):
            monitor.say(line)
    batches = partial(
        steps,
        examples,
        batch_size=exp.deepspeed.train_batch_size,
        micro_batches=exp.deepspeed.gradient_accumulation_steps,
        rank=world.client_rank,
        ranks=config.ranks,
        pad=tokenizer.pad_token_id,
        seed=(exp.seed, world.client),
    )
    if client.moments is not None:
        client.calibrate(batches(), CALIBRATION_STEPS)
    plan, owned = plan_exchanges(exp, world, store, monitor.say if monitor is not None else None)
    return Federation(
        exp=exp,
        world=world,
        client=client,
        store=store,
        plan=plan,
        server=Server(exp, owned, weights, target_utilisation(weights, active, exp.num_experts)),
        evaluator=evaluator,
        batches=batches(),
        monitor=monitor,
    )


def plan_exchanges(
    exp: Experiment, world: World, store: UnitStore, warn: Callable[[str], None] | None = None
) -> tuple[Plan, list[Unit]]:
    """How to plan an exchange for given LoRA ranks, and the units that this rank owns whatever they are."""
    owner = owners(store.units, exp.lora.rank, world.comm.size)
    memory = HostMemory.of_job(world.comm)
    warned = False

    def plan(ranks: Sequence[int], reply_ranks: Sequence[int]) -> Exchange:
        layouts = [
            replace(layout, lora_rank=rank, reply_rank=reply)
            for layout, rank, reply in zip(client_layouts(exp), ranks, reply_ranks, strict=True)
        ]
        exchange = Exchange(world.comm, layouts, store.units, exp.num_experts, owner, exp.merge.payload, memory)
        nonlocal warned
        if warn is not None and not warned and memory is not None and exchange.memory is None:
            warned = True
            warn(
                f"warning: {SHARED_FOLDER} has no room for what ranks exchange; they send messages, which is slower; "
                "enlarge it (docker run --shm-size=...)"
            )
        return exchange

    return plan, [unit for unit, rank in zip(store.units, owner, strict=True) if rank == world.rank]


def _open_monitor(exp: Experiment) -> "Monitor":
    """Only the rank that writes pays for importing TensorBoard."""
    from ubsmoe_ds.monitor import Monitor

    return Monitor(exp)


def _headline(exp: Experiment, client: Client) -> str:
    """What is about to run, in one line."""
    ks = " ".join(str(exp.active_experts(c)) for c in exp.clients)
    ranks = " ".join(map(str, dict.fromkeys(exp.lora_ranks)))
    shape = replace(model_shape(client.hf_config, client.spec), lora_rank=exp.lora.rank)
    adapter = trainable_parameters(shape, exp.router.trainable)
    return (
        f"{exp.name}: {exp.method}, {len(exp.clients)} clients on {exp.world_size} ranks ({client.device.type}), "
        f"K {ks} of {exp.num_experts} experts, LoRA rank {ranks}, "
        f"adapter {adapter / 1e6:.2f} M parameters, rounds {exp.train.rounds}"
    )


def _warnings(exp: Experiment, cuts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """What an experiment loses: pseudo-gradients by its merge rule, and the beginnings of prompts (how many of all)."""
    pseudo_gradients = exp.pseudo_gradient.estimator != "none"
    if exp.merge.rule == "activation" and pseudo_gradients and not exp.merge.pseudo_weight:
        yield (
            "warning: merge.rule activation gives no weight to a client that did not use an expert, so the "
            "pseudo-gradients it gave that expert are lost; set merge.pseudo_weight above 0, or merge.rule fedavg"
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


def client_layouts(exp: Experiment) -> list[ClientLayout]:
    """Consecutive ranks for each client, in the order of the config."""
    layouts, first = [], 0
    for client in exp.clients:
        layouts.append(ClientLayout(first, client.ranks, client.expert_parallel))
        first += client.ranks
    return layouts


def load_tokenizer(exp: Experiment) -> AutoTokenizer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(exp.model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path: {str(exp.model_dir)!r} has no usable tokenizer ({' '.join(str(error).split())[:200]})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer in {str(exp.model_dir)!r} has no end-of-text token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so its id does not matter
    return tokenizer
