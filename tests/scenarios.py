"""What the ranks of multi-process tests run; each function returns arrays (see `ranks.py`)."""

import os
from typing import Any

import numpy as np
import torch

from tests import tiny


def train(model_path: str, ranks: int, expert_parallel: int, variants: dict[str, dict], count: int) -> dict[str, Any]:
    """One client of `ranks` ranks trains `count` steps in each variant, one engine after the other.

    A variant is {"deepspeed": arguments of tiny.deepspeed, "pg": estimator, ...}. Returns for each its losses, norms,
    and the final fp32 value of every trainable parameter, experts with their place.
    """
    client_config = {"budget": 0.5, "ranks": ranks, "expert_parallel": expert_parallel}
    base = tiny.experiment(model_path, [client_config])
    from ubsmoe_ds.world import join

    world = join(base, "train.py", [])
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed import comm as dist

    from ubsmoe_ds.client import Client, start_deepspeed
    from ubsmoe_ds.data.batches import steps

    start_deepspeed(on_accelerator=False, verbose=False)
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
