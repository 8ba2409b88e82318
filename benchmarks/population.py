"""Time what a population costs beside its local steps: a round of many clients on few groups, and one client's turn.

    mpiexec -n 4 python -m mpi4py benchmarks/population.py --clients 100 1000
    mpiexec -n 4 python -m mpi4py benchmarks/population.py --clients 10 --rows 300000     # and so on, for `memory`

Ten clients a round on four groups of one rank, the built-in model, an adapter of 1.2 MB. Populations of all sizes take
turns in one job. `ms` is the median over repeats of the slowest rank's wall time.

    round      a round whose clients take no steps: cohort, schedule, turns, merge, record; `ratio`: over the smallest
               population's in the same repeat
    turn       what a client's turn costs beside its steps: become, load, read back; `ratio`: over 8 local steps
    schedule   share of a round in which groups idle, and the round's length over what no schedule can beat, means over
               1,000 rounds as predicted
    memory     private megabytes of a rank after the rounds, without what it has freed, of the first population alone
    flower     the same round in Flower's simulation: 10 of 100 clients, which only send the payload back; `ratio`: over
               our round. Only where flwr and ray are installed
"""

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

COHORT, STEPS, GROUPS = 10, 8, 4


def experiments(sizes: list[int], folder: str, rows: int | None) -> dict[int, Any]:
    """Return the experiment of each size, on generated rows or on so many of a file."""
    from ubsmoe_ds.config.loading import load_experiment

    config = str(Path(__file__).resolve().parent.parent / "ds_configs" / "population_tiny.yaml")
    common = [
        f"output={folder}",
        f"groups=[{{count: {GROUPS}}}]",
        f"train.local_steps={STEPS}",
        "train.rounds=1000000",
        "data.partition=iid",
        "data.eval_rows=8",
        "evaluation.every=1000000",
        "checkpoint.every=0",
    ]
    common += [] if rows is None else [f"data.source=jsonl:{rows_file(folder)}", f"data.rows={rows}"]
    return {
        size: load_experiment(
            config,
            [*common, f"name=of{size}", f"clients.count={size}", f"sampling.clients={min(size, COHORT)}"],
        )
        for size in sizes
    }


def rows_file(folder: str) -> Path:
    """Return the path of the rows of `--rows`."""
    return Path(folder) / "rows.jsonl"


def write_rows(folder: str, count: int) -> None:
    """Write short questions, no two alike."""
    row = '{{"instruction": "Which number comes after {}?", "output": "The number {}."}}\n'
    with rows_file(folder).open("w", encoding="utf-8") as file:
        file.writelines(row.format(number, number + 1) for number in range(count))


def start(exp: Any, world: Any) -> Any:
    """Return a federation that is evaluated and about to begin its first round."""
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.launching.hang_watch import HangWatch
    from ubsmoe_ds.mpi.preemption import StopRequests

    watch = HangWatch("", None, survives=False)
    federation = build(exp, world, StopRequests(world.comm, None), watch, on_accelerator=False, verbose=False)
    federation.start()
    federation.round()
    return federation


def timed_round(federation: Any, world: Any, with_steps: bool) -> tuple[float, list[tuple[float, float]]]:
    """Run a round; return its seconds, of the slowest rank, and for each of this group's turns (own cost, steps)."""
    client, training, turns = federation.client, federation.training, []
    real_train, real_end = client.train, training.end_turn

    def no_steps(batches: Any, local: Any, count: int, *_: Any) -> None:
        local.steps = count

    def end_turn() -> None:
        nonlocal since
        real_end()
        now, steps = time.perf_counter(), training.turns.done[-1].seconds
        turns.append((now - since - steps, steps))
        since = now

    client.train, training.end_turn = real_train if with_steps else no_steps, end_turn
    world.barrier()
    since = begun = time.perf_counter()
    federation.round()
    seconds = time.perf_counter() - begun
    client.train, training.end_turn = real_train, real_end
    everybody = np.zeros(world.comm.size)
    everybody[world.rank] = seconds
    return float(world.sum(everybody).max()), turns


def private_megabytes() -> float:
    """Return the memory that this process shares with no other, once it has returned what it has freed."""
    from ubsmoe_ds.base.malloc import release_freed_memory

    gc.collect()
    release_freed_memory()
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) * 1024 / 1e6


def measure(federations: dict[int, Any], world: Any, repeats: int) -> tuple[dict[int, list[float]], list, float]:
    """Return (seconds of rounds by size, (own cost, seconds of the steps) of turns, a rank's memory)."""
    from ubsmoe_ds.mpi.collectives import gather_json

    rounds: dict[int, list[float]] = {size: [] for size in federations}
    first = next(iter(federations.values()))
    turns = []
    for repeat in range(repeats + 1):
        for size in list(federations)[:: -1 if repeat % 2 else 1]:
            rounds[size].append(timed_round(federations[size], world, with_steps=False)[0])
    for repeat in range(3):
        found = timed_round(first, world, with_steps=True)[1]
        turns += found if repeat else []  # the first steps allocate the optimiser's state
    turns = [turn for of_rank in gather_json(world.comm, turns) for turn in of_rank]
    memory = max(gather_json(world.comm, private_megabytes()))
    return {size: seconds[1:] for size, seconds in rounds.items()}, turns, memory


def report(federations: dict[int, Any], measured: tuple, payload: np.ndarray, repeats: int, as_json: bool) -> None:
    """Print all figures, on the first rank."""
    from exchange import flower_rounds
    from measuring import machine, say

    (rounds, turns, memory), smallest = measured, min(federations)
    if not as_json:
        print(
            f"{machine()}; {GROUPS} groups of one rank, {COHORT} clients a round, adapter {payload.nbytes / 1e6:.2f} MB"
        )
    common = {"bench": "population"}
    for size, seconds in rounds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, rounds[smallest], strict=True))
        say(
            common | {"impl": "round", "clients": size, "ms": 1e3 * statistics.median(seconds), "ratio": ratio}, as_json
        )
    own = [cost for cost, _ in turns]
    ratio = statistics.median(own) / statistics.mean(steps for _, steps in turns)
    say(common | {"impl": "turn", "ms": 1e3 * statistics.median(own), "ratio": ratio}, as_json)
    for size, federation in federations.items():
        idle = np.array([federation.training.roster.idle(number) for number in range(1, 1001)])
        share, over = idle.mean(axis=0).tolist()
        say(common | {"impl": "schedule", "clients": size, "idle_share": share, "over_bound": over}, as_json)
    say(common | {"impl": "memory", "clients": next(iter(federations)), "mb": memory}, as_json)
    if all(map(importlib.util.find_spec, ("flwr", "ray"))):
        seconds = statistics.median(flower_rounds(payload, 100, repeats, COHORT).tolist())
        ours = statistics.median(rounds[100 if 100 in rounds else smallest])
        say(common | {"impl": "flower", "clients": 100, "ms": 1e3 * seconds, "ratio": seconds / ours}, as_json)


def main() -> None:
    """Build a federation of each size, and time their rounds in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", nargs="+", type=int, default=[100, 1000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, help="rows of a file in place of generated ones; many are mapped")
    parser.add_argument("--json", action="store_true", help="one object a line, for machines")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from ubsmoe_ds.base.malloc import keep_freed_memory

    keep_freed_memory()  # as `launch/train.py` does
    with tempfile.TemporaryDirectory() as folder:
        every = experiments(options.clients, folder, options.rows)
        from ubsmoe_ds.mpi.collectives import gather_json
        from ubsmoe_ds.mpi.join import join

        world = join(next(iter(every.values())), "benchmark", [])
        folder = gather_json(world.comm, folder)[0]  # one for all ranks
        every = experiments(options.clients, folder, options.rows)
        if options.rows is not None and world.rank == 0:
            write_rows(folder, options.rows)
        world.barrier()
        from ubsmoe_ds import run

        run.choose_accelerator("cpu")
        own_output, sys.stdout = sys.stdout, sys.stderr  # what runs print is no figure
        federations = {size: start(exp, world) for size, exp in every.items()}
        measured = measure(federations, world, options.repeats)
        sys.stdout = own_output
        if world.rank == 0:
            first = next(iter(federations.values()))
            report(federations, measured, first.aggregator.store.shared.numpy(), options.repeats, options.json)
        for federation in federations.values():
            federation.stop.close()
        world.barrier()  # Flower has the cores to itself


if __name__ == "__main__":
    main()
