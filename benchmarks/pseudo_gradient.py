"""Measure the cost of pseudo-gradients (PG): optimiser steps with each estimator over steps without, in turn.

    python benchmarks/pseudo_gradient.py                       # an OLMoE-like block, and the built-in model
    python benchmarks/pseudo_gradient.py --repeats 20 --tokens 4096
    python benchmarks/pseudo_gradient.py --cpu-time            # on a machine that does other work too

One process, one thread. `ratio` is the median over repeats of a training step at K = 1 with PG over one without, `low`
and `high` are its quartiles, `ms` the median of the step. 1 - 1 / ratio is PG's share of the step.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import (
    add_output_option,
    cpu_seconds_of,
    in_turn,
    machine,
    save_checkpoint,
    say,
    seconds_of,
    start_alone,
    step_batch,
)

from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.config.experiment import Experiment

SIZES = {  # OLMoE-1B-7B's proportions; None: the built-in model
    "olmoe_like": {"hidden": 512, "width": 256, "experts": 64, "layers": 2, "heads": 8, "vocabulary": 2048},
    "builtin": None,
}
VARIANTS = (  # estimator, tokens_per_expert
    ("none", None),
    ("expert_mean", None),
    ("token_weighted", 4),
    ("linearised", 4),
    ("linearised", 8),
    ("linearised", 16),
    ("linearised", 64),
)
MOMENT_SHARE = 1 / 16  # as in the preset ub_smoe


def experiment(path: str, experts: int) -> Experiment:
    """Return an experiment of one client with K = 1 and LoRA rank 8."""
    optimizer = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0}}
    return Experiment.model_validate(
        {
            "name": "benchmark",
            "model": {"path": path},
            "num_experts": experts,
            "k_max": 8,
            "router": {"gate_rescale": "none"},
            "pseudo_gradient": {"estimator": "linearised"},
            "clients": [{"name": "one", "budget": 0.125}],
            "deepspeed": {"train_batch_size": 8, "gradient_clipping": 1.0, "optimizer": optimizer},
        }
    )


def measure(name: str, options: argparse.Namespace, folder: Path) -> None:
    """Print a line for each variant at one size."""
    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.moe.collector import PseudoGradientCollector

    sizes = SIZES[name]
    path = "builtin:tiny_olmoe" if sizes is None else save_checkpoint(folder / name, dtype=torch.float32, **sizes)
    exp = experiment(path, 16 if sizes is None else sizes["experts"])
    client = Client(exp, exp.clients[0], 0)
    batch = step_batch(options.tokens, client.hf_config.vocab_size)
    client.calibrate(iter([batch]), 1)
    client.moments.update(client.moments.sums())
    rho = exp.rho(exp.clients[0])

    def step(estimator: str, count: int | None) -> Callable[[], object]:
        collector = None
        if estimator != "none":
            collector = PseudoGradientCollector(client.model.layers, estimator, rho, count)

        def run() -> None:
            prepare(client, collector, with_moments=estimator == "linearised")
            client.step(batch)

        return run

    clock = cpu_seconds_of if options.cpu_time else seconds_of
    seconds = in_turn({str(variant): step(*variant) for variant in VARIANTS}, options.repeats, clock)
    plain = np.array(seconds[str(VARIANTS[0])])
    for variant in VARIANTS:
        low, middle, high = np.percentile(np.array(seconds[str(variant)]) / plain, [25, 50, 75])
        record = {"bench": "pseudo_gradient", "impl": variant[0], "model": name, "dtype": "fp32"}
        record |= {"tokens": options.tokens, "k": 1, "threads": 1, "tokens_per_expert": variant[1]}
        record |= {"clock": "cpu" if options.cpu_time else "wall"}
        record |= {"low": round(low, 3), "high": round(high, 3)}
        say(record | {"ms": 1e3 * float(np.median(seconds[str(variant)])), "ratio": float(middle)}, options.json)


def prepare(client: Any, collector: Any, with_moments: bool) -> None:
    """Set the collector of the client's next steps, or none, and whether they sum up moments."""
    if client.collector is not None:
        client.collector.detach()
    client.collector = client.gradient_hook.collector = collector
    client.gradient_hook._additions = []
    client.engine.train()
    client.reset_counts()
    for layer in client.model.layers:
        layer.experts.moment_sums_EX = None
    if collector is not None:
        collector.attach()
    if with_moments:
        client.moments.sample(round(1 / MOMENT_SHARE))


def main() -> None:
    """Measure all sizes in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, for a machine that does other work")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    start_alone(experiment("builtin:tiny_olmoe", 16))
    if not options.json:
        print(f"{machine()}; one thread")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            measure(name, options, Path(folder))


if __name__ == "__main__":
    main()
