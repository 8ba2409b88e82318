"""What pseudo-gradients cost: optimiser steps with each estimator over steps without, in turn in one process.

    python benchmarks/pseudo_gradient.py                       # an OLMoE-like block, and the built-in model
    python benchmarks/pseudo_gradient.py --repeats 20 --tokens 4096

`ratio` is the median over repeats of CYCLE training steps at K = 1 with PG over as many without, `low` and `high` its
quartiles, `ms` the median of one step. (1 - 1 / ratio is PG's share of the step.) One thread.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import add_output_option, in_turn, machine, say

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.memory import keep_freed_memory

SIZES = {  # hidden, expert width, experts, layers, heads, vocabulary
    "olmoe_like": (512, 256, 64, 2, 8, 2048),
    "builtin": None,
}
VARIANTS = (  # estimator, token_share, interval
    ("none", 1.0, 1),
    ("expert_mean", 1.0, 1),
    ("token_weighted", 1.0, 1),
    ("linearised", 1.0, 1),
    ("linearised", 0.25, 1),
    ("linearised", 0.0625, 1),
    ("linearised", 0.0625, 4),
)
CYCLE = 4  # steps; every layer has had its turn


def checkpoint(name: str, folder: Path) -> tuple[str, int]:
    """(folder of a model of the named size with random weights, its number of experts)."""
    sizes = SIZES[name]
    if sizes is None:
        return "builtin:tiny_olmoe", 16
    from transformers import OlmoeConfig, OlmoeForCausalLM

    hidden, width, experts, layers, heads, vocabulary = sizes
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_experts=experts,
        num_experts_per_tok=8,
        pad_token_id=0,
        eos_token_id=1,
    )
    OlmoeForCausalLM(config).save_pretrained(folder / name)
    return str(folder / name), experts


def experiment(path: str, experts: int) -> Experiment:
    """One client with K = 1 and LoRA rank 8."""
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


def step_batch(tokens: int, vocabulary: int) -> Any:
    """Eight rows of random tokens, the last eighth of each the answer."""
    from ubsmoe_ds.data.batches import Example, StepBatch, collate

    generator = torch.Generator().manual_seed(1)
    length = tokens // 8
    rows = torch.randint(2, vocabulary, (8, length + 1), generator=generator).tolist()
    examples = [Example(row[: length - length // 8], row[length - length // 8 :]) for row in rows]
    micro = collate(examples, 0)
    return StepBatch([micro], len(micro.target_A), 8 * length)


def measure(name: str, options: argparse.Namespace, folder: Path) -> None:
    """One size: a line for each variant."""
    from ubsmoe_ds.client import Client
    from ubsmoe_ds.moe.collector import PseudoGradientCollector

    exp = experiment(*checkpoint(name, folder))
    first, second = (Client(exp, exp.clients[0], 0) for _ in range(2))
    batch = step_batch(options.tokens, first.hf_config.vocab_size)
    first.calibrate(iter([batch]), 1)
    first.moments.update(first.moments.sums())
    rho = exp.rho(exp.clients[0])

    def cycle(estimator: str, share: float, interval: int) -> Callable[[], object]:
        client = second if estimator == "expert_mean" else first  # its hooks on parameters would stay
        collector = None
        if estimator != "none":
            collector = PseudoGradientCollector(client.model.layers, estimator, rho, share, interval)

        def steps() -> None:
            prepare(client, collector, share if estimator == "linearised" else None)
            for _ in range(CYCLE):
                client.step(batch)

        return steps

    seconds = in_turn({str(variant): cycle(*variant) for variant in VARIANTS}, options.repeats)
    plain = np.array(seconds[str(VARIANTS[0])])
    for variant in VARIANTS:
        low, middle, high = np.percentile(np.array(seconds[str(variant)]) / plain, [25, 50, 75])
        record = {"bench": "pseudo_gradient", "impl": variant[0], "model": name, "dtype": "fp32"}
        record |= {"tokens": options.tokens, "k": 1, "threads": 1, "token_share": variant[1], "interval": variant[2]}
        record |= {"low": round(low, 3), "high": round(high, 3)}
        record |= {"ms": 1e3 * float(np.median(seconds[str(variant)])) / CYCLE, "ratio": float(middle)}
        say(record, options.json)


def prepare(client: Any, collector: Any, moment_share: float | None) -> None:
    """Make the client's next steps ones with this collector or none, with moments of this share of tokens or none."""
    client.collector = client.finisher.collector = collector
    client.finisher._additions = []
    client.engine.train()
    client.reset_counts()
    for layer in client.model.layers:
        layer.deepspeed_moe.observer = None
        layer.experts.moment_sums_EX = None
    if moment_share:
        client.moments.start(every=round(1 / moment_share))


def main() -> None:
    """All sizes in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    from ubsmoe_ds import run, world

    world.join(experiment("builtin:tiny_olmoe", 16), "benchmark", [])
    devices = run.choose_accelerator(experiment("builtin:tiny_olmoe", 16))
    from ubsmoe_ds.client import start_deepspeed

    start_deepspeed(devices > 0, verbose=False)
    if not options.json:
        print(f"{machine()}; one thread")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            measure(name, options, Path(folder))


if __name__ == "__main__":
    main()
