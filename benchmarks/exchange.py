"""One merge of all clients: the exchange through owners against MPI's own reductions, in turn in one job.

    mpiexec -n 4 python -m mpi4py benchmarks/exchange.py --megabytes 16 64

Every rank is a client of its own that holds everything: the case in which a linear rule could be one Allreduce.
Prints, for each size, milliseconds (median of the slowest rank) of
  owners            Alltoallv, weighted mean of the [C, N] stack, Alltoallv back: what every rule uses; fp32 and bf16
  allreduce         scale by the weight, Allreduce in place
  reduce_scatter    scale by the weight, Reduce_scatter, Allgather
and the ratio to `owners`. Clients of several ranks cannot use the reductions: their replicas would count twice.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI

from ubsmoe_ds.federation.exchange import ClientLayout, Exchange, Unit, owners
from ubsmoe_ds.federation.merge import fedavg

UNITS = 192  # 64 experts, 3 projections


def ways(comm: MPI.Intracomm, numel: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Name -> function from this client's update to the weighted mean."""
    units = [Unit(f"e{u}", numel // UNITS, expert=u % 64) for u in range(UNITS)]
    layouts = [ClientLayout(rank, 1, 1) for rank in range(comm.size)]
    owner = owners(units, 1, comm.size)
    weight_C1 = torch.full((comm.size, 1), 1 / comm.size)
    plans = {payload: Exchange(comm, layouts, units, 64, owner, payload) for payload in ("fp32", "bf16")}

    def through_owners(payload: str, held: np.ndarray) -> np.ndarray:
        plan = plans[payload]
        stack_CN = torch.stack([torch.from_numpy(part) for part in plan.collect(held)])
        return plan.distribute([fedavg(stack_CN, weight_C1).numpy()] * comm.size)

    def allreduce(held: np.ndarray) -> np.ndarray:
        scaled = held * np.float32(1 / comm.size)
        comm.Allreduce(MPI.IN_PLACE, scaled)
        return scaled

    def reduce_scatter(held: np.ndarray) -> np.ndarray:
        scaled = held * np.float32(1 / comm.size)
        part, whole = np.empty(numel // comm.size, np.float32), np.empty_like(held)
        comm.Reduce_scatter_block(scaled, part)
        comm.Allgather(part, whole)
        return whole

    return {
        "owners": lambda held: through_owners("fp32", held),
        "owners_bf16": lambda held: through_owners("bf16", held),
        "allreduce": allreduce,
        "reduce_scatter": reduce_scatter,
    }


def main() -> None:
    """All sizes, all ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    comm = MPI.COMM_WORLD
    for megabytes in options.megabytes:
        block = UNITS * comm.size
        numel = megabytes * 1_000_000 // 4 // block * block
        held = np.random.default_rng(comm.rank).normal(size=numel).astype(np.float32)
        merge = ways(comm, numel)
        seconds: dict[str, list[float]] = {name: [] for name in merge}
        results = {}
        for _ in range(options.repeats + 1):
            for name, way in merge.items():
                comm.Barrier()
                start = time.perf_counter()
                results[name] = way(held)
                slowest = np.array(time.perf_counter() - start)
                comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
                seconds[name].append(float(slowest))
        assert np.allclose(results["owners"], results["allreduce"], atol=1e-6)
        if comm.rank == 0:
            print(f"{comm.size} clients of one rank, {4 * numel / 1e6:.0f} MB each", flush=True)
            for name, measured in seconds.items():
                ratio = np.median(np.array(measured[1:]) / np.array(seconds["owners"][1:]))
                print(f"  {name:15s} {1e3 * np.median(measured[1:]):8.1f} ms   {ratio:.2f} x owners", flush=True)


if __name__ == "__main__":
    main()
