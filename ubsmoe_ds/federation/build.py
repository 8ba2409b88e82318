"""One rank's `Federation`, put together from an experiment. Imported only when the rendezvous variables are set."""

from typing import TYPE_CHECKING

import numpy as np
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
from ubsmoe_ds.federation.exchange import ClientLayout, Exchange
from ubsmoe_ds.federation.merge import fedavg
from ubsmoe_ds.federation.modulation import target_utilisation
from ubsmoe_ds.federation.rounds import Federation
from ubsmoe_ds.federation.server import Server
from ubsmoe_ds.federation.units import UnitStore
from ubsmoe_ds.models.olmoe import model_shape
from ubsmoe_ds.run_folder import check_run_folder
from ubsmoe_ds.world import World

if TYPE_CHECKING:
    from ubsmoe_ds.monitor import Monitor


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
    tokenizer = _load_tokenizer(exp)
    examples, cut = encode([train_rows[i] for i in shares[world.client]], tokenizer, exp.data.max_length)
    start_deepspeed(on_accelerator, verbose)
    config = exp.clients[world.client]
    client = Client(exp, config, world.client_rank, verbose)
    store = UnitStore(client.model, client.finisher.masters)
    weights = [len(share) / len(train_rows) for share in shares]
    active = [exp.active_experts(c) for c in exp.clients]
    evaluator = Evaluator(eval_rows, tokenizer, exp.data.max_length, exp.evaluation.batch_size)
    monitor = _open_monitor(exp) if world.rank == 0 else None
    cut_prompts = world.sum(np.array([cut if world.client_rank == 0 else 0.0]))[0]
    if monitor is not None:
        monitor.say(_headline(exp, client))
        if cut_prompts or evaluator.cut:
            monitor.say(
                f"note: {cut_prompts:.0f} of {len(train_rows)} training and {evaluator.cut} of {len(eval_rows)} "
                f"evaluation prompts lose their beginning to data.max_length={exp.data.max_length}"
            )
    return Federation(
        exp=exp,
        world=world,
        client=client,
        store=store,
        exchange=Exchange(world.comm, client_layouts(exp), store.units, exp.num_experts),
        server=Server(store.units, fedavg, weights, target_utilisation(weights, active, exp.num_experts), exp.dmr),
        evaluator=evaluator,
        batches=steps(
            examples,
            batch_size=exp.deepspeed.train_batch_size,
            micro_batches=exp.deepspeed.gradient_accumulation_steps,
            rank=world.client_rank,
            ranks=config.ranks,
            pad=tokenizer.pad_token_id,
            seed=(exp.seed, world.client),
        ),
        monitor=monitor,
    )


def _open_monitor(exp: Experiment) -> "Monitor":
    """Only the rank that writes pays for importing TensorBoard."""
    from ubsmoe_ds.monitor import Monitor

    return Monitor(exp)


def _headline(exp: Experiment, client: Client) -> str:
    """What is about to run, in one line."""
    ks = " ".join(str(exp.active_experts(c)) for c in exp.clients)
    adapter = trainable_parameters(model_shape(client.hf_config, client.spec), exp.router.trainable)
    return (
        f"{exp.name}: {len(exp.clients)} clients on {exp.world_size} ranks ({client.device.type}), K {ks} of "
        f"{exp.num_experts} experts, adapter {adapter / 1e6:.2f} M parameters, rounds {exp.train.rounds}"
    )


def client_layouts(exp: Experiment) -> list[ClientLayout]:
    """Consecutive ranks for each client, in the order of the config."""
    layouts, first = [], 0
    for client in exp.clients:
        layouts.append(ClientLayout(first, client.ranks, client.expert_parallel))
        first += client.ranks
    return layouts


def _load_tokenizer(exp: Experiment) -> AutoTokenizer:
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
