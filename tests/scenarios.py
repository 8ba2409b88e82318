"""What the ranks of multi-process tests run; each function returns arrays (see `ranks.py`)."""

import os
from typing import Any

import numpy as np
import torch

from tests import tiny
from ubsmoe_ds.config import Experiment
from ubsmoe_ds.world import World, join


def enter(exp: Experiment) -> World:
    """This rank's place in the job, its torch world started; only then may DeepSpeed be imported."""
    world = join(exp, "train.py", [])
    os.environ["DS_ACCELERATOR"] = "cpu"
    from ubsmoe_ds.client import start_deepspeed

    start_deepspeed(on_accelerator=False, verbose=False)
    return world


def train(model_path: str, ranks: int, expert_parallel: int, variants: dict[str, dict], count: int) -> dict[str, Any]:
    """One client of `ranks` ranks trains `count` steps in each variant, one engine after the other.

    A variant is {"deepspeed": arguments of tiny.deepspeed, "pg": estimator, ...}. Returns for each its losses, norms,
    and the final fp32 value of every trainable parameter, experts with their place.
    """
    client_config = {"budget": 0.5, "ranks": ranks, "expert_parallel": expert_parallel}
    base = tiny.experiment(model_path, [client_config])
    world = enter(base)
    from deepspeed import comm as dist

    from ubsmoe_ds.client import Client
    from ubsmoe_ds.data.batches import steps

    found: dict[str, Any] = {}
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        client = Client(exp, exp.clients[0], world.client_rank)
        client.engine.train()
        batches = steps(
            tiny.examples(),
            batch_size=8,
            micro_batches=exp.deepspeed.gradient_accumulation_steps,
            rank=world.client_rank,
            ranks=ranks,
            pad=0,
            seed=(exp.seed, 0),
        )
        losses, norms = [], []
        for _ in range(count):
            batch = next(batches)
            nll = client.step(batch)
            dist.all_reduce(nll)
            losses.append(float(nll) / batch.answer_tokens)
            norms.append(float(client.finisher.real_norm))
        found |= {f"{name}/losses": np.array(losses), f"{name}/norms": np.array(norms)}
        masters = client.finisher.masters
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                found[f"{name}/value/{key}"] = masters.read(parameter).numpy()
                low = parameter.detach().float()
                assert torch.allclose(low, masters.read(parameter), atol=1e-6 + 0.01 * exp.deepspeed.use_bf16)
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def exchange(layouts: list[list[int]], units: list[list], num_experts: int, weights: list[float]) -> dict[str, Any]:
    """One exchange of random values, client c's value of a unit the same on all ranks that hold it."""
    from mpi4py import MPI

    from ubsmoe_ds.federation.exchange import ClientLayout, Exchange, Unit
    from ubsmoe_ds.federation.merge import fedavg

    comm = MPI.COMM_WORLD
    firsts = np.cumsum([0, *[ranks for ranks, _ in layouts]])
    placed = [ClientLayout(int(first), *layout) for first, layout in zip(firsts, layouts, strict=False)]
    listed = [Unit(*unit) for unit in units]
    client = int(np.searchsorted(firsts, comm.rank, side="right")) - 1
    rng = np.random.default_rng(0)
    values = [rng.normal(size=(len(layouts), unit.numel)).astype(np.float32)[client] for unit in listed]
    held = [v for v, unit in zip(values, listed, strict=True) if comm.rank in placed[client].holders(unit, num_experts)]
    plan = Exchange(comm, placed, listed, num_experts)
    owned = []

    def merge(positions: range, update_CN: np.ndarray) -> np.ndarray:
        owned.append(update_CN.shape[1])
        assert update_CN.shape[1] == sum(listed[i].numel for i in positions)
        return fedavg(torch.from_numpy(update_CN), torch.tensor(weights)).numpy()

    merged, _ = plan.merge(np.concatenate(held), merge)
    return {"merged": merged, "owned": np.array(owned[0])}


def federate(model_path: str, clients: list[dict], variants: dict[str, dict]) -> dict[str, Any]:
    """Clients of unequal layout get known weights and utilisation, and merge once; returns what each rank holds then.

    The value of a parameter at client c is `tiny.federated_value(name, c, shape)`, cut to the rank's experts.
    """
    base = tiny.experiment(model_path, clients)
    world = enter(base)
    from ubsmoe_ds.client import Client
    from ubsmoe_ds.federation.build import client_layouts
    from ubsmoe_ds.federation.exchange import Exchange
    from ubsmoe_ds.federation.merge import fedavg
    from ubsmoe_ds.federation.server import Server
    from ubsmoe_ds.federation.units import UnitStore

    found: dict[str, Any] = {}
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        config = exp.clients[world.client]
        client = Client(exp, config, world.client_rank)
        store = UnitStore(client.model, client.finisher.masters)
        weights = [float(c.share) for c in exp.clients]
        server = Server(store.units, fedavg, [w / sum(weights) for w in weights], 0.4, exp.dmr)
        plan = Exchange(world.comm, client_layouts(exp), store.units, exp.num_experts)
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                client.finisher.masters.write(
                    parameter, _local_value(key, world.client, parameter, config, world.client_rank)
                )
        utilisation = torch.from_numpy(tiny.federated_value("utilisation", world.client, (2, 8))).abs()
        merged, _ = plan.merge(store.updates(utilisation).numpy(), server.merge_owned)
        found[f"{name}/utilisation"] = store.apply(torch.from_numpy(merged)).numpy()
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                found[f"{name}/value/{key}"] = client.finisher.masters.read(parameter).numpy()
                assert torch.allclose(parameter.detach().float(), client.finisher.masters.read(parameter), atol=0.02)
        for key, value in store.full_state().items():
            found[f"{name}/full/{key}"] = value.numpy()
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def _local_value(key: str, client: int, parameter: torch.Tensor, config: Any, rank: int) -> torch.Tensor:
    if ".experts." not in key:
        return torch.from_numpy(tiny.federated_value(key, client, tuple(parameter.shape)))
    whole = tiny.federated_value(key, client, (8, *parameter.shape[1:]))
    first = rank % config.expert_parallel * len(parameter)
    return torch.from_numpy(whole[first : first + len(parameter)])


def optimizer_state(model_path: str, zero: int) -> dict[str, Any]:
    """Losses of two rounds of three steps: kept, and with the state forgotten in between; moments after forgetting."""
    base = tiny.experiment(model_path, [{"budget": 0.5}])
    enter(base)
    from ubsmoe_ds.client import Client
    from ubsmoe_ds.data.batches import steps

    found: dict[str, Any] = {}
    for name, kind in (("keep", "keep"), ("reset", "reset")):
        exp = tiny.variant(base, {"deepspeed": {"zero": zero}})
        exp = exp.model_copy(update={"train": exp.train.model_copy(update={"optimizer_state": kind})})
        client = Client(exp, exp.clients[0], 0)
        batches = steps(tiny.examples(), batch_size=8, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0, 0))
        stats = [client.train(batches, 3) for _ in range(3)]
        found[f"{name}/nll"] = np.array([s.nll for s in stats])
        states = client.engine.basic_optimizer.state.values()
        found[f"{name}/steps"] = np.array([float(state["step"]) for state in states])
        client.reset_optimizer()
        found[f"{name}/largest"] = np.array([float(v.abs().max()) for state in states for v in state.values()])
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found
