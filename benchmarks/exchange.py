"""Time one merge of all clients: ours, plain copying, MPI's own reduction, and Flower's FedAvg, in turn in one job.

    mpiexec -n 4 python -m mpi4py benchmarks/exchange.py --megabytes 1 16 128

Every rank is a client that holds the whole model: the case in which a linear rule could be one Allreduce. `ms` is the
median over repeats of the slowest rank's time, `ratio` that over the concurrent memcpy's, `mb` the size of a client's
update, `wire_mb` what each rank sends to others where messages are sent.

    memcpy          every rank copies its update once
    ubsmoe          a linear rule: weighted sums at the owners, through memory that the ranks of a host share
    ubsmoe-mpi      the same by messages, as between hosts: Reduce_scatter, Allgather
    owners          any other rule (here FedAvg again): collect, weighted mean of the [C, N] stack, distribute
    owners-mpi      the same by messages: Alltoallv there and back;  owners-bf16: with bf16 on the way
    allreduce       scale by the weight, MPI's blocking Allreduce in place
    flower          a round of FedAvg in Flower's simulation, a client an actor; only where flwr and ray are installed
    model           the prediction of `predict` for `ubsmoe`; here `ratio` is measured over predicted
    projection      its prediction for 64 clients with adapters of OLMoE-1B-7B (LoRA rank 8, 302 MB), on one host of
                    this memory bandwidth, and on 8 hosts joined at --network-gbps each
Clients of several ranks cannot use the reductions, because their replicas would count twice.
"""

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from measuring import add_output_option, machine, say
from mpi4py import MPI

from ubsmoe_ds.aggregation.exchange import Exchange
from ubsmoe_ds.aggregation.layout import GroupLayout, Unit, owners
from ubsmoe_ds.aggregation.rules import fedavg
from ubsmoe_ds.aggregation.shared_memory import SharedMemory
from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.mpi.collectives import wait_quietly

UNITS = 192  # 64 experts, 3 projections
OLMOE_MEGABYTES = 302  # 16 layers x 64 experts x 3 projections x rank 8 x (2048 + 1024) elements of fp32
Way = Callable[[np.ndarray], np.ndarray]


def ways(comm: MPI.Intracomm, memory: SharedMemory | None, numel: int) -> tuple[dict[str, Way], int]:
    """Return {name: function from this client's update to the weighted mean}, and the bytes that a rank sends."""
    units = [Unit(f"e{u}", "router", numel // UNITS, expert=u % 64) for u in range(UNITS)]
    layouts = [GroupLayout(rank, 1, 1) for rank in range(comm.size)]
    owner = owners(units, 1, comm.size)
    weight_C1 = torch.full((comm.size, 1), 1 / comm.size)
    target = np.empty(numel, np.float32)

    def plan(payload: str, shared: bool) -> Exchange:
        return Exchange(comm, layouts, units, 64, owner, payload, memory if shared else None)

    def linear(exchange: Exchange, held: np.ndarray) -> np.ndarray:
        return exchange.gather(exchange.reduce([(torch.from_numpy(held), 1 / comm.size)]))

    def through_owners(exchange: Exchange, held: np.ndarray) -> np.ndarray:
        stack_CN = torch.stack([torch.from_numpy(part) for part in exchange.collect(held)])
        return exchange.distribute([fedavg(stack_CN, weight_C1).numpy()] * comm.size)

    def memcpy(held: np.ndarray) -> np.ndarray:
        np.copyto(target, held)
        return target

    def allreduce(held: np.ndarray) -> np.ndarray:
        scaled = held * np.float32(1 / comm.size)
        comm.Allreduce(MPI.IN_PLACE, scaled)
        return scaled

    shared, messages, half = plan("fp32", True), plan("fp32", False), plan("bf16", True)
    if shared.memory is None:
        raise SystemExit("error: the ranks share no memory: several hosts, or /dev/shm has no room")
    merges = {
        "memcpy": memcpy,
        "ubsmoe": lambda held: linear(shared, held),
        "ubsmoe-mpi": lambda held: linear(messages, held),
        "owners": lambda held: through_owners(shared, held),
        "owners-mpi": lambda held: through_owners(messages, held),
        "owners-bf16": lambda held: through_owners(half, held),
        "allreduce": allreduce,
    }
    return merges, messages.bytes_sent


def predict(
    clients: int, megabytes: float, rest: float, host_gb: float, hosts: int = 1, network_gb: float = 1
) -> float:
    """Return the seconds of a linear merge of one-rank clients: bytes moved over bandwidth.

    In a host's memory every byte of a client is scaled into the shared region (read, written), read by its owner, and
    copied back (read, written). The sum of merged values, 1 / C of a client's bytes, is written, copied and read.
    Between hosts each rank sends (C - 1) / C of its bytes to owners and receives as much again; the part for other
    hosts shares the host's link.

    Args:
        clients: C.
        megabytes: of a client's update.
        rest: seconds that do not depend on the payload (barriers).
        host_gb: memory bandwidth of a host, GB/s, reads and writes together.
        hosts: number of hosts, over which the clients are spread evenly.
        network_gb: of a host's link, GB/s each way.
    """
    per_host = clients / hosts * megabytes / 1e3
    in_memory = per_host * (5 + 3 / clients) / host_gb
    on_links = 2 * per_host * (1 - 1 / hosts) / network_gb
    return rest + in_memory + on_links


def project(comm: MPI.Intracomm, figures: dict[int, dict[str, float]], options: argparse.Namespace) -> None:
    """Print the model's prediction against the measurement, and for jobs that this machine cannot hold."""
    smallest, largest = min(figures), max(figures)
    host_gb = 2 * comm.size * largest / 1e3 / figures[largest]["memcpy"]
    moving = predict(comm.size, smallest, 0, host_gb)
    rest = max(0.0, figures[smallest]["ubsmoe"] - moving)
    common = {"bench": "exchange"}
    for megabytes, seconds in figures.items():
        predicted = predict(comm.size, megabytes, rest, host_gb)
        record = common | {"impl": "model", "ranks": comm.size, "mb": megabytes, "ms": 1e3 * predicted}
        say(record | {"ratio": seconds["ubsmoe"] / predicted}, options.json)
    for hosts in (1, 8):
        predicted = predict(64, OLMOE_MEGABYTES, rest, host_gb, hosts, options.network_gbps / 8)
        record = common | {"impl": "projection", "ranks": 64, "hosts": hosts, "mb": OLMOE_MEGABYTES}
        say(record | {"ms": 1e3 * predicted}, options.json)


def flower_rounds(held: np.ndarray, clients: int, rounds: int, cohort: int | None = None) -> np.ndarray:
    """Return seconds of rounds of Flower's simulation with FedAvg; its clients only send the payload back.

    Args:
        held: the payload.
        clients: how many there are; Flower runs as many at a time as there are cores.
        rounds: how many to time.
        cohort: clients of a round; None: all.
    """
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    import flwr
    from flwr.common import ndarrays_to_parameters

    arrays = np.array_split(held, UNITS)
    cohort = cohort or clients
    marks: list[float] = []

    class Client(flwr.client.NumPyClient):
        def fit(self, parameters: list, config: dict) -> tuple:
            return parameters, 1, {}

    class Timed(flwr.server.strategy.FedAvg):
        def configure_fit(self, *given: Any, **named: Any) -> Any:
            marks.append(time.perf_counter())
            return super().configure_fit(*given, **named)

        def aggregate_fit(self, *given: Any, **named: Any) -> Any:
            merged = super().aggregate_fit(*given, **named)
            if merged[0] is None:
                raise SystemExit("error: Flower's clients failed")
            marks.append(time.perf_counter())
            return merged

    flwr.simulation.start_simulation(
        client_fn=lambda context: Client().to_client(),
        num_clients=clients,
        config=flwr.server.ServerConfig(num_rounds=rounds + 1),
        strategy=Timed(
            fraction_fit=cohort / clients,
            min_fit_clients=cohort,
            min_available_clients=clients,
            fraction_evaluate=0.0,
            initial_parameters=ndarrays_to_parameters(arrays),
        ),
        client_resources={"num_cpus": 1, "num_gpus": 0},
        ray_init_args={"include_dashboard": False, "configure_logging": False},
    )
    return np.diff(marks)[::2][1:]  # the first round starts ray's actors


def in_turn(comm: MPI.Intracomm, merge: dict[str, Way], held: np.ndarray, repeats: int) -> dict[str, np.ndarray]:
    """Return the seconds of the slowest rank by name, [repeats] each; the first call of each is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in merge}
    for _ in range(repeats + 1):
        for name, way in merge.items():
            wait_quietly(comm.Ibarrier())  # busy-waiting ranks would take cores from those that are timed
            start = time.perf_counter()
            merged = way(held)
            slowest = np.array(time.perf_counter() - start)
            wait_quietly(comm.Ibarrier())
            comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
            seconds[name].append(float(slowest))
            if name != "memcpy":
                check(comm, name, held, merged)
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def check(comm: MPI.Intracomm, name: str, held: np.ndarray, merged: np.ndarray) -> None:
    """Check the mean over clients at a few places."""
    places = np.linspace(0, len(held) - 1, 100).astype(int)
    expected = held[places] / np.float32(comm.size)
    comm.Allreduce(MPI.IN_PLACE, expected)
    if not np.allclose(merged[places], expected, atol=0.02 if "bf16" in name else 1e-6):
        raise SystemExit(f"error: {name} does not give the mean")


def report(
    comm: MPI.Intracomm, megabytes: int, seconds: dict[str, np.ndarray], sent: int, as_json: bool
) -> dict[str, float]:
    """Print one line per way; return the median seconds of each."""
    medians = {name: float(np.median(measured)) for name, measured in seconds.items()}
    for name, median in medians.items():
        record = {"bench": "exchange", "impl": name, "ranks": comm.size, "mb": megabytes}
        if name.endswith("-mpi") or name == "allreduce":
            record["wire_mb"] = round(sent / 1e6, 2)
        ratio = float(np.median(seconds[name] / seconds["memcpy"]))
        say(record | {"ms": 1e3 * median, "ratio": ratio}, as_json)
    return medians


def main() -> None:
    """Time all ways in turn, for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[1, 16, 128])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--network-gbps", type=float, default=100, help="a host's link, Gbit/s, for the projection")
    add_output_option(parser)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    if comm.rank == 0 and not options.json:
        print(f"{machine()}; {comm.size} clients of one rank")
    figures, memory = {}, SharedMemory.of_job(comm)
    for megabytes in options.megabytes:
        block = UNITS * comm.size
        numel = megabytes * 1_000_000 // 4 // block * block
        held = np.random.default_rng(comm.rank).normal(size=numel).astype(np.float32)
        merge, sent = ways(comm, memory, numel)
        seconds = in_turn(comm, merge, held, options.repeats)
        if comm.rank == 0:
            if all(map(importlib.util.find_spec, ("flwr", "ray"))):
                seconds["flower"] = flower_rounds(held, comm.size, options.repeats)
            figures[megabytes] = report(comm, megabytes, seconds, sent, options.json)
        wait_quietly(comm.Ibarrier())  # Flower has the cores to itself
    if figures:
        project(comm, figures, options)


if __name__ == "__main__":
    main()
