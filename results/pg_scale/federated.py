"""Compare scales of the pseudo-gradient (PG) in the real program: `ub_smoe` without PG, at scale 1 and below, by seed.

    mpiexec -n 2 python -m mpi4py results/pg_scale/federated.py run --out results/pg_scale --k 2 4
    python results/pg_scale/federated.py table --out results/pg_scale --k 2 4

Two clients of one rank, of 16 experts in a layer. Each seed has rows of its own. The last fifth of its training
rows (their order is by a hash of the question) is left out of training and evaluated; no evaluation row is used. All
runs share two processes. Runs that `runs.jsonl` holds are not repeated.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.data.sources import load_rows

CONFIG = "ds_configs/compare_tiny.yaml"
RECORD = "runs.jsonl"
VARIANTS = {
    "no PG": ["pseudo_gradient.estimator=none"],
    "scale 1, 4 tokens": ["pseudo_gradient.scale=1", "pseudo_gradient.tokens_per_expert=4"],
    "scale 0.08, 4 tokens": ["pseudo_gradient.scale=0.08", "pseudo_gradient.tokens_per_expert=4"],
    "scale 0.08, 64 tokens": ["pseudo_gradient.scale=0.08", "pseudo_gradient.tokens_per_expert=64"],
}
SETTINGS = [
    "data.partition=by_task",
    "data.rows=1500",
    "data.eval_rows=240",
    "train.rounds=5",
    "train.local_steps=8",
    "evaluation.every=5",
    "checkpoint.every=0",
    "deepspeed.train_batch_size=8",
]


def experiment(folder: Path, ks: Sequence[int], seed: int, variant: str) -> Experiment:
    """Return one run of clients with these K; its rows are those of `write_rows`."""
    clients = ", ".join(f"{{name: k{k}, budget: {k / 8}}}" for k in ks)
    rows = [f"data.source=jsonl:{folder}/{seed}-train.jsonl", f"data.eval_source=jsonl:{folder}/{seed}-held.jsonl"]
    name = f"name={seed}-{list(VARIANTS).index(variant)}"
    place = [f"clients=[{clients}]", f"seed={seed}", name, f"output={folder}"]
    return load_experiment(CONFIG, [*SETTINGS, *rows, *VARIANTS[variant], *place])


def write_rows(folder: Path, seed: int) -> None:
    """Write a seed's training rows in two files: four fifths to train on, one fifth to evaluate."""
    rows = load_rows(load_experiment(CONFIG, SETTINGS).data, seed).training
    held = len(rows) // 5
    for name, part in (("train", rows[:-held]), ("held", rows[-held:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{seed}-{name}.jsonl").write_text(text, encoding="utf-8")


def run(out: Path, ks: Sequence[int], seeds: Sequence[int], variants: Sequence[str]) -> None:
    """Carry out all runs that are missing, on this rank (a collective)."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    folder = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    made = {(record["seed"], record["variant"]) for record in records(out, ks)}
    missing = [(seed, variant) for seed in seeds for variant in variants if (seed, variant) not in made]
    if comm.rank == 0:
        for seed in {seed for seed, _ in missing}:
            write_rows(folder, seed)
    comm.Barrier()
    world = None
    for seed, variant in missing:
        start = time.perf_counter()
        exp = experiment(folder, ks, seed, variant)
        if world is None:
            from ubsmoe_ds.mpi.join import join

            world = join(exp, "train.py", [])
            os.environ["DS_ACCELERATOR"] = "cpu"
        one_run(exp, world)
        if world.rank == 0:
            record = {"k": list(ks), "seed": seed, "variant": variant} | measured(exp.run_dir, [f"k{k}" for k in ks])
            record["seconds"] = round(time.perf_counter() - start, 1)
            with (out / RECORD).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        world.barrier()


def one_run(exp: Experiment, world: Any) -> None:
    """Run the federation on this rank (a collective)."""
    from ubsmoe_ds.federation.build import build
    from ubsmoe_ds.launching.hang_watch import HangWatch
    from ubsmoe_ds.mpi.preemption import StopRequests

    stop = StopRequests(world.comm, None)
    unwatched = HangWatch("", None, survives=False)
    federation = build(exp, world, stop, unwatched, on_accelerator=False, verbose=False, resume=None)
    federation.run()
    federation.client.engine.destroy()


def measured(folder: Path, clients: Sequence[str]) -> dict[str, Any]:
    """Return by client the loss after the last round, the mean ratio of norms over rounds, and starved experts."""
    metrics = [json.loads(line)["metrics"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mean = {name: sum(m[name] for m in metrics[1:]) / len(metrics[1:]) for name in metrics[1] if "/k" in name}
    return {
        "loss": {c: metrics[-1][f"eval_loss/{c}"] for c in clients},
        "pseudo_over_real_norm": {c: round(mean[f"pseudo_over_real_norm/{c}"], 4) for c in clients},
        "starved_experts": {c: round(mean[f"starved_experts/{c}"], 1) for c in clients},
    }


def records(out: Path, ks: Sequence[int]) -> list[dict[str, Any]]:
    """Return the runs of clients with these K that were made so far."""
    path = out / RECORD
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["k"] == list(ks)]


def table(out: Path, ks: Sequence[int]) -> None:
    """Print differences of losses, mean and standard error over the seeds that both have, and mean losses."""
    import pandas as pd

    frame = pd.DataFrame([{"seed": r["seed"], "variant": r["variant"]} | r["loss"] for r in records(out, ks)])
    clients = [f"k{k}" for k in ks]
    losses = frame.pivot(index="seed", columns="variant", values=clients)
    for base in ("no PG", "scale 1, 4 tokens"):
        for variant in VARIANTS:
            cells = []
            for client in clients:
                if (client, variant) in losses and (client, base) in losses and variant != base:
                    difference = (losses[client, variant] - losses[client, base]).dropna()
                    cells.append(f"{client} {difference.mean():+.4f} ± {difference.sem():.4f} (n = {len(difference)})")
            if cells:
                print(f"{variant} minus {base}: {', '.join(cells)}")
    print(losses.mean().unstack(0).round(4))


def main() -> None:
    """Read the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--out", type=Path, default=Path("results/pg_scale"))
    parser.add_argument("--k", type=int, nargs=2, default=[2, 4], help="active experts of the two clients")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(200, 220))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    if options.command == "run":
        run(options.out, options.k, options.seeds, options.variants)
    else:
        table(options.out, options.k)


if __name__ == "__main__":
    main()
