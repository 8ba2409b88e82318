"""What the ranks of multi-process tests run; each function returns arrays (see `ranks.py`).

Each imports what it needs: transformers and DeepSpeed take every rank seconds.
"""

import os
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.support import tiny
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.mpi import join as join_module
from ubsmoe_ds.mpi.join import join
from ubsmoe_ds.mpi.rendezvous import meet
from ubsmoe_ds.mpi.world import World


def enter(exp: Experiment) -> World:
    """This rank's place in the job, its torch world started; only then may DeepSpeed be imported."""
    world = join(exp, "train.py", [])
    os.environ["DS_ACCELERATOR"] = "cpu"
    from ubsmoe_ds.client.engine import start_deepspeed

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

    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.batches import steps

    found: dict[str, Any] = {}
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        client = Client(exp, exp.clients[0], world.group_rank)
        client.engine.train()
        all_batches = partial(
            steps,
            tiny.examples(),
            batch_size=8,
            micro_batches=exp.deepspeed.gradient_accumulation_steps,
            rank=world.group_rank,
            ranks=ranks,
            pad=0,
            seed=(exp.seed, 0),
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
        found |= {f"{name}/losses": np.array(losses), f"{name}/norms": np.array(norms)}
        masters = client.gradient_hook.masters
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                master = masters.read(parameter)
                found[f"{name}/value/{key}"] = master.numpy()
                assert master.dtype == torch.float32
                assert torch.equal(parameter.detach(), master.to(parameter.dtype)), "the weight is its master, rounded"
                assert parameter.dtype == (torch.bfloat16 if exp.deepspeed.use_bf16 else torch.float32)
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def fair_cores(sets: list[list[int]]) -> dict[str, Any]:
    """The cores that are each rank's if it may run on its set."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    with mock.patch("os.sched_getaffinity", return_value=set(sets[comm.rank])):
        return {"cores": np.array(join_module._fair_cores(comm))}


def gathered(lengths: list[int]) -> dict[str, Any]:
    """Every rank's text as each rank has gathered it; rank r contributes `lengths[r]` characters."""
    from mpi4py import MPI

    from ubsmoe_ds.mpi.collectives import gather_json

    rank = MPI.COMM_WORLD.rank
    values = gather_json(MPI.COMM_WORLD, {"rank": rank, "text": "é" * lengths[rank], "third": rank / 3})
    return {
        "ranks": np.array([value["rank"] for value in values]),
        "lengths": np.array([len(value["text"]) for value in values]),
        "thirds": np.array([value["third"] for value in values]),
    }


def joined() -> dict[str, Any]:
    """A rank's place in a job on two hosts, its device, and where it meets others."""
    from mpi4py import MPI

    exp = tiny.experiment("unused", [{"budget": 1.0, "ranks": count} for count in (2, 1, 1)])
    with mock.patch.object(join_module, "_hosts", return_value=["n0", "n1", "n0", "n1"]):
        world = join(exp, "train.py", [])
    assert world.hosts == ("n0", "n0", "n1", "n1") and not any(world.meetings)
    found: dict[str, Any] = {
        "rank": world.rank,
        "client": world.client,
        "group_rank": world.group_rank,
        "port": int(os.environ["MASTER_PORT"]),
        "local_of_two": _local_rank(exp, world, [["a", "b"], ["a", "b"], ["c"], ["d"]]),
        "local_of_one": _local_rank(exp, world, [["a"], ["a"], ["c"], ["d"]]),
    }
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    meeting = meet(MPI.COMM_WORLD, MPI.COMM_WORLD, one_host=False)
    found |= {"address": meeting.address, "meeting_port": meeting.port, "interface": meeting.interface}
    os.environ["GLOO_SOCKET_IFNAME"] = "none0"
    try:
        meet(MPI.COMM_WORLD, MPI.COMM_WORLD, one_host=False)
    except UserError as error:
        found["error"] = str(error)
    return {key: np.array(value) for key, value in found.items()}


def _local_rank(exp: Experiment, world: World, seen: list[list[str]]) -> int:
    """LOCAL_RANK where each rank of the job sees its list of devices; -1 where they are too few."""
    try:
        join_module.check_devices(exp, world, seen[world.rank])
    except UserError:
        return -1
    return int(os.environ["LOCAL_RANK"])


def exchange(
    layouts: list[list[int]], units: list[list], num_experts: int, weights: list[float], payloads: list[str]
) -> dict[str, Any]:
    """One exchange in each payload of random values, client c's value of a unit the same on all ranks that hold it.

    A layout is [ranks, expert parallelism, LoRA rank sent, LoRA rank got back]. What client c gets back is the clients'
    weighted sum of their units' first elements, as many as it has of them, and c added to it.
    """
    return {
        f"{payload}/{key}": value
        for payload in payloads
        for key, value in _exchange_in(payload, layouts, units, num_experts, weights).items()
    }


def _exchange_in(
    payload: str, layouts: list[list[int]], units: list[list], num_experts: int, weights: list[float]
) -> dict[str, np.ndarray]:
    from mpi4py import MPI

    from ubsmoe_ds.aggregation.exchange import Exchange
    from ubsmoe_ds.aggregation.layout import ClientLayout, Unit, owners
    from ubsmoe_ds.aggregation.shared_memory import SharedMemory

    comm = MPI.COMM_WORLD
    firsts = np.cumsum([0, *[layout[0] for layout in layouts]])
    placed = [ClientLayout(int(first), *layout) for first, layout in zip(firsts, layouts, strict=False)]
    listed = [
        Unit(name, "lora" if lora else "router", numel, expert, tuple(lora) if lora else None)
        for name, numel, expert, lora in units
    ]
    client = int(np.searchsorted(firsts, comm.rank, side="right")) - 1
    owner, memory = owners(listed, 4, comm.size), SharedMemory.of_job(comm)
    assert memory is not None
    merged, reduced, once = [], [], []
    for way in (None, memory, memory):  # by messages; through memory; and once more, over what was left there
        plan = Exchange(comm, placed, listed, num_experts, owner, payload, way)
        assert plan.memory is way
        merged.append(_exchange_once(plan, client, weights))
        if plan.is_reducible:
            values = _held(plan, client)
            for share in (weights[client], np.full(len(values), weights[client], dtype=np.float32)):
                reduced.append(plan.gather(plan.reduce(values, share)))
        same = Exchange(comm, placed, listed, num_experts, owner, payload, way, same_reply=True)
        if len({(layout.lora_rank, layout.reply_rank) for layout in placed}) == 1:
            once.append(_exchange_once(same, client, weights))
    assert all(np.allclose(reduced[0], other) for other in reduced)
    assert all(np.array_equal(once[0], other) for other in once[1:])
    assert all(np.array_equal(merged[0], other) for other in merged[1:])
    with mock.patch("ubsmoe_ds.aggregation.shared_memory._free_bytes", return_value=0):  # a container's small /dev/shm
        assert Exchange(comm, placed, listed, num_experts, owner, payload, SharedMemory(comm)).memory is None
        uneven = SharedMemory(comm)
        with mock.patch("ubsmoe_ds.aggregation.shared_memory._free_bytes", return_value=2**30):
            assert uneven.reserve(1000 * (comm.size - comm.rank))
        assert not uneven.reserve(1000 * comm.size)  # what all hold now would not do for that
        assert uneven.reserve(1000)
    owned = sum(listed[u].size(4) for u in plan.owned)
    found = {"merged": merged[0], "owned": np.array(owned), "bytes": np.array(plan.bytes_sent)}
    return found | ({"reduced": reduced[0]} if reduced else {}) | ({"once": once[0]} if once else {})


def _held(plan: Any, client: int) -> np.ndarray:
    """This rank's values."""
    placed, listed = plan.layouts, plan.units
    mine = [u for u, unit in enumerate(listed) if plan.comm.rank in placed[client].holders(unit, plan.num_experts)]
    sizes = placed[client].sizes(listed, reply=False)
    return np.concatenate([tiny.federated_value(listed[u].name, client, (int(sizes[u]),)) for u in mine])


def _exchange_once(plan: Any, client: int, weights: list[float]) -> np.ndarray:
    """Collect, sum and distribute; where all get the same, without the client's number."""
    placed, listed = plan.layouts, plan.units
    received = plan.collect(_held(plan, client))
    replies: list[list[np.ndarray]] = [[] for _ in placed]
    starts = [0] * len(placed)
    for u in plan.owned:
        for c, layout in enumerate(placed):
            numel = int(layout.sizes(listed, reply=True)[u])
            total = np.full(numel, 0 if plan.same_reply else c, dtype=np.float32)
            for other, (flat, weight) in enumerate(zip(received, weights, strict=True)):
                value = flat[starts[other] :][: int(placed[other].sizes(listed, reply=False)[u])]
                total[: len(value)] += weight * value[:numel]
            replies[c].append(total)
        for c, layout in enumerate(placed):
            starts[c] += int(layout.sizes(listed, reply=False)[u])
    joined = [np.concatenate([np.zeros(0, np.float32), *of_client]) for of_client in replies]
    return plan.distribute(joined[:1] * len(joined) if plan.same_reply else joined)


def federate(model_path: str, clients: list[dict], variants: dict[str, dict]) -> dict[str, Any]:
    """Clients of unequal layout get known weights and usage, and merge once; returns what each rank holds then.

    The value of a parameter at client c is `tiny.federated_value(name, c, shape)`, cut to the rank's experts and the
    client's LoRA rank. A variant may name a ("broken") client and parameter whose first value is NaN.
    """
    base = tiny.experiment(model_path, clients)
    world = enter(base)
    from tests.support import reference
    from ubsmoe_ds.aggregation.server import Server, Usage
    from ubsmoe_ds.aggregation.units import UnitStore
    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.federation.exchanges import plan_exchanges

    found: dict[str, Any] = {}
    routed_CLE = torch.stack([tiny.usage(c) for c in range(len(clients))]).double()
    for name, variant in variants.items():
        exp = tiny.variant(base, variant)
        config = exp.clients[world.client]
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
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                value = _local_value(key, world.client, parameter, config, world.group_rank)
                if variant.get("broken") == [world.client, key]:
                    value.view(-1)[0] = float("nan")
                client.gradient_hook.masters.write(parameter, value)
        usage = Usage(routed_CLE, torch.einsum("c,cle->le", torch.from_numpy(weights), routed_CLE).float())
        merged = server.merge(exchange.collect(store.updates(lora_rank).numpy()), usage, server.lora_ranks)
        reply = torch.from_numpy(exchange.distribute(merged))
        store.apply(reply, lora_rank, replies[world.client], round_number=1)
        found[f"{name}/refused"] = np.array([f"{c} {unit.name}" for c, unit in server.refused], dtype=str)
        for key, parameter in client.model.named_parameters():
            if parameter.requires_grad:
                found[f"{name}/value/{key}"] = client.gradient_hook.masters.read(parameter).numpy()
                assert torch.allclose(
                    parameter.detach().float(), client.gradient_hook.masters.read(parameter), atol=0.02
                )
        if flora:
            frozen = reference.base_weights(client.model)
            found |= {f"{name}/value/{key}": weight.float().numpy() for key, weight in frozen.items()}
        for key, full in store.full_state(lora_rank).items():
            found[f"{name}/full/{key}"] = full.numpy()
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def methods(config: str, overrides: list[str], names: list[str], folder: str) -> dict[str, Any]:
    """Whole runs of several methods, one after the other in one job; each writes folder/NAME."""
    from ubsmoe_ds.config.loading import load_experiment

    experiments = {
        name: load_experiment(config, [*overrides, f"method={name}", f"name={name}", f"output={folder}"])
        for name in names
    }
    world = enter(experiments[names[0]])
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.mpi.preemption import StopRequests

    found: dict[str, Any] = {}
    for name, exp in experiments.items():
        stop = StopRequests(world.comm, None)
        federation = build(exp, world, stop, on_accelerator=False, verbose=False)
        federation.run()
        layers = federation.client.model.layers
        for projection, weight in layers[0].experts.base().items():
            found[f"{name}/base/{projection}"] = weight.detach().numpy()
        found[f"{name}/rank"] = np.array(federation.aggregator.lora_rank)
        federation.client.engine.destroy()
        world.barrier()
    torch.distributed.destroy_process_group()
    return found


def _local_value(key: str, client: int, parameter: torch.Tensor, config: Any, rank: int) -> torch.Tensor:
    if ".experts." not in key:
        return torch.from_numpy(tiny.federated_value(key, client, tuple(parameter.shape)))
    whole = tiny.federated_value(key, client, (8, *parameter.shape[1:]))
    first = rank % config.expert_parallel * len(parameter)
    return torch.from_numpy(whole[first : first + len(parameter)].copy())


def optimizer_state(model_path: str, zero: int) -> dict[str, Any]:
    """Losses of two rounds of three steps: kept, and with the state forgotten in between; moments after forgetting."""
    base = tiny.experiment(model_path, [{"budget": 0.5}])
    enter(base)
    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.batches import steps

    found: dict[str, Any] = {}
    for name, kind in (("keep", "keep"), ("reset", "reset")):
        exp = tiny.variant(base, {"deepspeed": {"zero": zero}})
        exp = exp.model_copy(update={"train": exp.train.model_copy(update={"optimizer_state": kind})})
        client = Client(exp, exp.clients[0], 0)
        batches = steps(tiny.examples(), batch_size=8, micro_batches=1, rank=0, ranks=1, pad=0, seed=(0, 0))
        nll = []
        for _ in range(3):
            local = client.begin_round()
            client.train(batches, local, 3, lambda: False)
            nll.append(client.local_stats(local).nll)
        found[f"{name}/nll"] = np.array(nll)
        states = client.engine.basic_optimizer.state.values()
        found[f"{name}/steps"] = np.array([float(state["step"]) for state in states])
        client.reset_optimizer()
        found[f"{name}/largest"] = np.array([float(v.abs().max()) for state in states for v in state.values()])
        client.engine.destroy()
    torch.distributed.destroy_process_group()
    return found


def fidelity(folder: str, train_steps: int, batches: int) -> dict[str, Any]:
    """Train a byte-level OLMoE from scratch on Python's own library, then measure estimators on it at K = 1.

    Returns the columns of `fidelity.summary` and, as "bias/ESTIMATOR", of `fidelity.bias` at K = 1, 2, 4.
    """
    from transformers import OlmoeConfig, OlmoeForCausalLM

    text = b"".join(path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")))
    data, generator = torch.tensor(list(text[:2_000_000])), torch.Generator().manual_seed(0)

    def windows(count: int) -> torch.Tensor:
        starts = torch.randint(0, len(data) - 128, (count,), generator=generator)
        return torch.stack([data[start : start + 128] for start in starts])

    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 64,
        "num_experts": 16,
        "num_experts_per_tok": 8,
    }
    torch.manual_seed(0)
    hf = OlmoeForCausalLM(
        OlmoeConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, pad_token_id=None, output_router_logits=True)
    )
    optimizer = torch.optim.AdamW(hf.parameters(), lr=3e-3, weight_decay=0.05)
    for _ in range(train_steps):
        ids = windows(8)
        hf(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(hf.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    hf.config.output_router_logits = False
    hf.save_pretrained(folder)
    exp = tiny.experiment(
        folder, [{"budget": 1.0}], num_experts=16, k_max=8, pseudo_gradient={"estimator": "linearised", "rho": 1.0}
    )
    enter(exp)

    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.batches import StepBatch, Tokens
    from ubsmoe_ds.studies import fidelity

    def batch(count: int) -> StepBatch:
        ids = windows(count)
        position = (torch.arange(count).unsqueeze(1) * 128 + torch.arange(127)).reshape(-1)
        tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool), position, ids[:, 1:].reshape(-1))
        return StepBatch([tokens], len(position), ids.numel())

    client = Client(exp, exp.clients[0], 0)
    client.calibrate(iter([batch(4) for _ in range(4)]), 4)
    client.moments.update(client.moments.sums())
    taken = [batch(2) for _ in range(batches)]
    found: dict[str, Any] = {}
    for k in (1, 2, 4):
        measured = fidelity.measure(client, iter(taken), k, fidelity.COMPARED, batches)
        if k == 1:
            table = fidelity.summary(measured, 1)
            found |= {column: table[column].to_numpy() for column in ("layer", "experts", "cosine", "size")}
            found |= {column: table[column].to_numpy(dtype=str) for column in ("estimator", "group")}
        for estimator, value in zip(*fidelity.bias(measured, k)[["estimator", "bias"]].T.to_numpy(), strict=True):
            found[f"bias/{estimator}"] = np.append(found.get(f"bias/{estimator}", []), value)
    torch.distributed.destroy_process_group()
    return found


class StopAfter:
    """In place of `StopRequests`: one rank is asked to stop at its n-th look, the others hear of it at the end."""

    def __init__(self, looks: int | None) -> None:
        self.left = looks

    def poll(self) -> bool:
        if self.left is not None:
            self.left -= 1
        return self.left is not None and self.left < 0

    def close(self) -> None:
        """Nothing is open."""


def stopped_and_resumed(config: str, overrides: list[str], variants: dict[str, list], folder: str) -> dict[str, Any]:
    """Each variant, [overrides, looks ...], whole, and again stopped after so many looks of the last rank each time.

    Writes folder/NAME and folder/NAME-resumed; returns the trained parameters and the frozen experts of both.
    """
    from ubsmoe_ds.base.errors import Preempted
    from ubsmoe_ds.config.loading import load_experiment

    world, found = None, {}
    for name, (changes, *looks) in variants.items():
        for label, stops in ((name, []), (f"{name}-resumed", looks)):
            exp = load_experiment(config, [*overrides, *changes, f"name={label}", f"output={folder}"])
            world = world or enter(exp)
            from ubsmoe_ds.federation.build import build

            for attempt, looks_now in enumerate([*stops, None]):
                stop = StopAfter(looks_now if world.rank == world.comm.size - 1 else None)
                resume = "auto" if attempt else None
                torch.manual_seed(attempt)  # what is not restored will differ
                federation = build(exp, world, stop, on_accelerator=False, verbose=False, resume=resume)
                try:
                    federation.run()
                    assert looks_now is None, "was not stopped"
                except Preempted as stopped:
                    assert looks_now is not None
                    found[f"stops/{name}"] = np.append(found.get(f"stops/{name}", []), str(stopped))
                if looks_now is None:
                    for key, parameter in federation.client.model.named_parameters():
                        if parameter.requires_grad:
                            found[f"{label}/{key}"] = federation.client.gradient_hook.masters.read(parameter).numpy()
                    for projection, weight in federation.client.model.layers[0].experts.base().items():
                        found[f"{label}/base/{projection}"] = weight.detach().float().numpy()
                    found[f"{label}/random"] = torch.get_rng_state().numpy()
                federation.client.engine.destroy()
                world.barrier()
    torch.distributed.destroy_process_group()
    return found
