"""Functions that the ranks of multi-process tests run to train and merge; each returns arrays (see `ranks.py`).

Each imports what it needs: importing transformers and DeepSpeed takes every rank seconds.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from tests.support import tiny
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.launching.hang_watch import HangWatch
from ubsmoe_ds.mpi.join import join
from ubsmoe_ds.mpi.world import World


def enter(exp: Experiment) -> World:
    """Join the job and start torch.distributed; return this rank's place. Only then may DeepSpeed be imported."""
    world = join(exp, "train.py", [])
    os.environ["DS_ACCELERATOR"] = "cpu"
    from ubsmoe_ds.client.deepspeed_setup import start_deepspeed

    start_deepspeed(on_accelerator=False, verbose=False)
    return world


def train(model_path: str, ranks: int, expert_parallel: int, variants: dict[str, dict], count: int) -> dict[str, Any]:
    """Train one client of `ranks` ranks for `count` steps in each variant, one engine after the other.

    A variant is {"deepspeed": arguments of tiny.deepspeed, "pg": estimator of pseudo-gradients, ...}. Return for each
    its losses, norms, the final fp32 value of every trainable parameter on this rank, and this rank's part of the
    squared norms of the experts' gradients.
    """
    client_config = {"budget": 0.5, "ranks": ranks, "expert_parallel": expert_parallel}
    base = tiny.experiment(model_path, [client_config])
    world = enter(base)
    from deepspeed import comm as dist

    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.batches import steps

    results: dict[str, Any] = {}
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        client = Client(exp, exp.clients[0], world.group_rank)
        client.engine.train()
        _shift_gradients(client, world.group_rank)
        all_batches = partial(
            steps,
            tiny.examples(),
            batch_size=8,
            micro_batches=exp.deepspeed.gradient_accumulation_steps,
            rank=world.group_rank,
            ranks=ranks,
            pad=0,
            seed=(exp.seed, 0),
            packed_length=variant.get("packing"),
        )
        if client.moments is not None:
            client.calibrate(all_batches(), 2)
            total = client.moments.sums()
            dist.all_reduce(total)
            client.moments.update(total)
        batches = all_batches()
        losses, norms = [], []
        for _ in range(count):
            batch = next(batches)
            nll = client.step(batch)
            dist.all_reduce(nll)
            losses.append(float(nll) / batch.answer_tokens)
            norms.append(client.gradient_hook.norms[0])
        results |= {f"{name}/losses": np.array(losses), f"{name}/norms": np.array(norms)}
        results |= {f"{name}/value/{key}": value for key, value in _masters(client).items()}
        squares_LE2 = client.gradient_squares()
        results |= {} if squares_LE2 is None else {f"{name}/squares": squares_LE2.numpy()}
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _shift_gradients(client: Any, rank: int) -> None:
    """Under SCAFFOLD correct gradients by known values."""
    for key, parameter in client.model.named_parameters() if client.exp.train.scaffold else ():
        if parameter.requires_grad and not key.endswith("scale"):
            value = _cut(key, parameter, client.config, rank, tiny.known_shift)
            client.gradient_hook.masters.write_beside(parameter, client.drift.buffers["shift"], value)


def _masters(client: Any) -> dict[str, np.ndarray]:
    """Return the fp32 values of the trainable parameters; check that each weight is its master, rounded."""
    values = {}
    for key, parameter in client.model.named_parameters():
        if parameter.requires_grad:
            master = client.gradient_hook.masters.read(parameter)
            assert master.dtype == torch.float32
            assert parameter.dtype == (torch.bfloat16 if client.exp.deepspeed.use_bf16 else torch.float32)
            assert torch.equal(parameter.detach(), master.to(parameter.dtype)), "the weight is not its master, rounded"
            values[key] = master.numpy()
    return values


def optimizer_state(model_path: str, zero: int) -> dict[str, Any]:
    """Train three rounds of three steps, optimiser state kept or reset between them; return losses, steps and moments.

    "largest" are the moments' largest values after a reset; "moved" is how far a first step moves a weight at most in
    rounds 1 and 3 of 4, the learning rate falling linearly.
    """
    base = tiny.experiment(model_path, [{"budget": 0.5}])
    enter(base)
    from ubsmoe_ds.client.engine import Client, LocalProgress
    from ubsmoe_ds.data.batches import steps

    results: dict[str, Any] = {}
    for name in ("keep", "reset"):
        exp = tiny.variant(base, {"deepspeed": {"zero": zero}})
        exp = exp.model_copy(update={"train": exp.train.model_copy(update={"optimizer_state": name})})
        client = Client(exp, exp.clients[0], 0)
        batches = steps(tiny.examples(), batch_size=8, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0, 0))
        nll = []
        for _ in range(3):
            client.begin_round()
            local = LocalProgress()
            client.train(batches, local, 3, lambda: False)
            nll.append(client.local_stats(local, *client.counts.read()).nll)
        results[f"{name}/nll"] = np.array(nll)
        states = client.engine.basic_optimizer.state.values()
        results[f"{name}/steps"] = np.array([float(state["step"]) for state in states])
        client.reset_optimizer()
        results[f"{name}/largest"] = np.array([float(v.abs().max()) for state in states for v in state.values()])
        train = exp.train.model_copy(update={"rounds": 4, "lr_schedule": "linear"})
        client.exp = exp.model_copy(update={"train": train})
        results[f"{name}/moved"] = np.array([_moved(client, number, next(batches)) for number in (1, 3)])
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _moved(client: Any, number: int, batch: Any) -> float:
    """Return how far the first step after a reset moves a weight at most, at the learning rate of a round."""
    client.reset_optimizer()
    before = _masters(client)
    client.set_learning_rate(number)
    client.step(batch)
    return max(float(np.abs(value - before[key]).max()) for key, value in _masters(client).items())


def federate(model_path: str, clients: list[dict], variants: dict[str, dict]) -> dict[str, Any]:
    """Give clients of unequal layout known weights and usage, merge once, and return what each rank then holds.

    The value of a parameter at client c is `tiny.federated_value(name, c, shape)`, cut to the rank's experts and the
    client's LoRA rank. In a variant, "broken": [client, parameter] makes that parameter's first value NaN.
    """
    base = tiny.experiment(model_path, clients)
    world = enter(base)
    from tests.support import reference
    from ubsmoe_ds.aggregation.server import Server, Usage
    from ubsmoe_ds.aggregation.units import UnitStore
    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.federation.exchanges import plan_exchanges

    results: dict[str, Any] = {}
    routed_CLE = torch.stack([tiny.usage(c) for c in range(len(clients))]).double()
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        config = exp.clients[world.group]
        client = Client(exp, config, world.group_rank)
        flora, lora_rank = exp.merge.row.stacking, exp.lora_rank(config)
        masters = client.gradient_hook.masters
        store = UnitStore(client.model, masters, lora_rank=lora_rank, dmr=exp.dmr.enabled, stacking=flora)
        weights = np.array([c.share for c in exp.clients]) / sum(c.share for c in exp.clients)
        exchange_for, owned = plan_exchanges(exp, world, store)
        server = Server(exp, owned, weights.tolist())
        server.target = 0.4
        replies = [sum(server.lora_ranks)] * len(clients) if flora else server.lora_ranks
        exchange = exchange_for(server.lora_ranks, replies)
        server.start(exchange.collect(store.shared.numpy(), exact=True))
        _write_known_values(client, world, variant.get("broken"))
        usage = Usage(routed_CLE, torch.einsum("c,cle->le", torch.from_numpy(weights), routed_CLE).float())
        merged = server.merge(exchange.collect(store.updates(lora_rank).numpy()), usage, server.lora_ranks)
        reply = torch.from_numpy(exchange.distribute(merged))
        store.apply(reply, lora_rank, replies[world.group], round_number=1)
        results[f"{name}/refused"] = np.array([f"{c} {unit.name}" for c, unit in server.refused], dtype=str)
        results |= {f"{name}/value/{key}": value for key, value in _masters(client).items()}
        if flora:
            frozen = reference.base_weights(client.model)
            results |= {f"{name}/value/{key}": weight.float().numpy() for key, weight in frozen.items()}
        for key, full in store.full_state(lora_rank).items():
            results[f"{name}/full/{key}"] = full.numpy()
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return results


def _write_known_values(client: Any, world: World, broken: list | None) -> None:
    """Set every trainable parameter to its known value; `broken` = [client, parameter] gets a NaN."""
    for key, parameter in client.model.named_parameters():
        if parameter.requires_grad:
            value = _local_value(key, world.group, parameter, client.config, world.group_rank)
            if broken == [world.group, key]:
                value.view(-1)[0] = float("nan")
            client.gradient_hook.masters.write(parameter, value)


def _local_value(key: str, client: int, parameter: torch.Tensor, config: Any, rank: int) -> torch.Tensor:
    """Return a parameter's known value at a client, cut to the experts of a rank of its group."""
    return _cut(key, parameter, config, rank, lambda name, shape: tiny.federated_value(name, client, shape))


def _cut(key: str, parameter: torch.Tensor, config: Any, rank: int, values: Callable) -> torch.Tensor:
    """Return known values of a parameter, `values(name, shape)`, cut to the experts of a rank of its group."""
    if ".experts." not in key:
        return torch.from_numpy(values(key, tuple(parameter.shape)))
    whole = values(key, (8, *parameter.shape[1:]))
    first = rank % config.expert_parallel * len(parameter)
    return torch.from_numpy(whole[first : first + len(parameter)].copy())


def methods(config: str, overrides: list[str], names: list[str], folder: str) -> dict[str, Any]:
    """Run several methods from start to end, one after the other in one job; each writes folder/NAME."""
    from ubsmoe_ds.config.loading import load_experiment

    experiments = {
        name: load_experiment(config, [*overrides, f"method={name}", f"name={name}", f"output={folder}"])
        for name in names
    }
    world = enter(experiments[names[0]])
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.mpi.preemption import StopRequests

    results: dict[str, Any] = {}
    for name, exp in experiments.items():
        stop = StopRequests(world.comm, None)
        federation = build(exp, world, stop, HangWatch("", None, survives=False), on_accelerator=False, verbose=False)
        federation.run()
        layers = federation.client.model.layers
        for projection, weight in layers[0].experts.base().items():
            results[f"{name}/base/{projection}"] = weight.detach().numpy()
        results[f"{name}/rank"] = np.array(federation.aggregator.server.lora_ranks[world.group])
        federation.client.engine.destroy()
        world.barrier()
    torch.distributed.destroy_process_group()
    return results


def layouts(config: str, overrides: list[str], variants: dict[str, list[str]], folder: str) -> dict[str, Any]:
    """Run each variant from start to end, all on the same ranks; return the state that this rank's group then holds.

    The runs write folder/NAME.
    """
    from ubsmoe_ds.config.loading import load_experiment

    experiments = {
        name: load_experiment(config, [*overrides, *changes, f"name={name}", f"output={folder}"])
        for name, changes in variants.items()
    }
    world = enter(next(iter(experiments.values())))
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.mpi.preemption import StopRequests

    results: dict[str, Any] = {}
    for name, exp in experiments.items():
        stop = StopRequests(world.comm, None)
        federation = build(exp, world, stop, HangWatch("", None, survives=False), on_accelerator=False, verbose=False)
        federation.run()
        store, held = federation.aggregator.store, federation.aggregator.held_rank
        store.load(held)
        results |= {f"{name}/{key}": value.numpy() for key, value in store.full_state(held).items()}
        federation.client.engine.destroy()
        world.barrier()
    torch.distributed.destroy_process_group()
    return results


class StopAfter:
    """Stands in for `StopRequests`: this rank is asked to stop after `looks` polls, or never."""

    def __init__(self, looks: int | None) -> None:
        self.left = looks

    def poll(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0

    def close(self) -> None:
        """Nothing is open."""


def part_of_run(config: str, overrides: list[str], looks: int | None, resume: bool) -> dict[str, Any]:
    """Run an experiment, from its checkpoint or anew, and stop the last rank after so many polls, or never.

    Return the state that this rank's group then holds; nothing if it was stopped.
    """
    from ubsmoe_ds.base.errors import Preempted
    from ubsmoe_ds.config.loading import load_experiment

    exp = load_experiment(config, overrides)
    world, results = enter(exp), {}
    from ubsmoe_ds.federation.build import build

    stop = StopAfter(looks if world.rank == world.comm.size - 1 else None)
    watch = HangWatch("", None, survives=False)
    auto = "auto" if resume else None
    federation = build(exp, world, stop, watch, on_accelerator=False, verbose=False, resume=auto)
    try:
        federation.run()
        store, held = federation.aggregator.store, federation.aggregator.held_rank
        store.load(held)
        results = {f"run/{key}": value.numpy() for key, value in store.full_state(held).items()}
    except Preempted:
        assert looks is not None
    torch.distributed.destroy_process_group()
    return results


def stopped_and_resumed(config: str, overrides: list[str], variants: dict[str, list], folder: str) -> dict[str, Any]:
    """Run each variant without a stop, and again stopped and resumed; return parameters and frozen experts of both.

    A variant is [overrides, looks, ...]: the last rank is asked to stop after so many polls, once per number. The runs
    write folder/NAME and folder/NAME-resumed.
    """
    from ubsmoe_ds.base.errors import Preempted
    from ubsmoe_ds.config.loading import load_experiment

    world, results = None, {}
    for name, (changes, *looks) in variants.items():
        for label, stops in ((name, []), (f"{name}-resumed", looks)):
            exp = load_experiment(config, [*overrides, *changes, f"name={label}", f"output={folder}"])
            world = world or enter(exp)
            from ubsmoe_ds.federation.build import build

            for attempt, looks_now in enumerate([*stops, None]):
                stop = StopAfter(looks_now if world.rank == world.comm.size - 1 else None)
                resume = "auto" if attempt else None
                torch.manual_seed(attempt)  # what is not restored will differ
                federation = build(
                    exp,
                    world,
                    stop,
                    HangWatch("", None, survives=False),
                    on_accelerator=False,
                    verbose=False,
                    resume=resume,
                )
                try:
                    federation.run()
                    assert looks_now is None, "was not stopped"
                except Preempted as stopped:
                    assert looks_now is not None
                    results[f"stops/{name}"] = np.append(results.get(f"stops/{name}", []), str(stopped))
                if looks_now is None:
                    for key, parameter in federation.client.model.named_parameters():
                        if parameter.requires_grad:
                            results[f"{label}/{key}"] = federation.client.gradient_hook.masters.read(parameter).numpy()
                    for projection, weight in federation.client.model.layers[0].experts.base().items():
                        results[f"{label}/base/{projection}"] = weight.detach().float().numpy()
                    results[f"{label}/random"] = torch.get_rng_state().numpy()
                if federation.monitor is not None:
                    federation.monitor.close()  # a job's process would end here, and so give up the run's folder
                federation.client.engine.destroy()
                world.barrier()
    torch.distributed.destroy_process_group()
    return results


def deepspeed_checkpoint(model_path: str, folder: str) -> dict[str, Any]:
    """Ask DeepSpeed's engine for a checkpoint; return what it answers, and the files and keys that there are."""
    exp = tiny.experiment(model_path, [{"budget": 0.5}])
    enter(exp)
    from ubsmoe_ds.base.errors import UserError
    from ubsmoe_ds.client.engine import Client

    client = Client(exp, exp.clients[0], 0)
    try:
        client.engine.save_checkpoint(folder)
        answer = "saved"
    except UserError as error:
        answer = str(error)
    files = [path for _, _, names in os.walk(folder) for path in names]
    keys = list(client.engine.module_state_dict())
    torch.distributed.destroy_process_group()
    return {"answer": np.array(answer), "files": np.array(len(files)), "keys": np.array(len(keys))}
