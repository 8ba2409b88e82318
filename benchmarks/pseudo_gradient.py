"""What pseudo-gradients cost: optimiser steps with each estimator over steps without, in turn in one process.

    python benchmarks/pseudo_gradient.py                       # an OLMoE-like block, and the built-in model
    python benchmarks/pseudo_gradient.py --repeats 20 --tokens 4096

Prints the median ratio of a K = 1 training step with PG to the same step without, its spread (quartiles over repeats),
and the median milliseconds of the step without. Times are CPU seconds of this process (one thread), so that other work
on the machine disturbs them little.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ubsmoe_ds.config import Experiment

SIZES = {  # hidden, expert width, experts, layers, heads, vocabulary
    "olmoe_like": (512, 256, 64, 2, 8, 2048),
    "builtin": None,
}
VARIANTS = (
    ("expert_mean", 1.0),
    ("token_weighted", 1.0),
    ("linearised", 1.0),
    ("linearised", 0.25),
    ("linearised", 0.125),
    ("linearised", 0.0625),
)


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


def measure(name: str, tokens: int, repeats: int, folder: Path) -> None:
    """One size: print a line for each estimator."""
    from ubsmoe_ds.client import Client
    from ubsmoe_ds.moe.collector import PseudoGradientCollector

    exp = experiment(*checkpoint(name, folder))
    client = Client(exp, exp.clients[0], 0)
    batch = step_batch(tokens, client.hf_config.vocab_size)
    client.calibrate(iter([batch]), 1)
    client.moments.update(client.moments.sums())
    rho = exp.rho(exp.clients[0])
    collectors = {
        variant: PseudoGradientCollector(client.model.layers, variant[0], rho, variant[1]) for variant in VARIANTS
    }
    seconds: dict[Any, list[float]] = {None: []} | {variant: [] for variant in VARIANTS}
    for _ in range(repeats + 1):
        for variant in seconds:
            prepare(client, collectors.get(variant), moment_share=variant and variant[0] == "linearised" and variant[1])
            start = time.process_time()
            client.step(batch)
            seconds[variant].append(time.process_time() - start)
    plain = np.array(seconds.pop(None)[1:])
    print(
        f"{name}: {tokens} tokens, K = 1 of {exp.num_experts}, LoRA rank 8; {1e3 * np.median(plain):.0f} ms without PG"
    )
    for (estimator, share), measured in seconds.items():
        ratio = np.array(measured[1:]) / plain
        low, middle, high = np.percentile(ratio, [25, 50, 75])
        print(f"  {estimator:15s} token_share {share:<7g} {middle:.3f} ({low:.3f} - {high:.3f})")


def prepare(client: Any, collector: Any, moment_share: float | None) -> None:
    """Make the client's next step one with this collector or none, and with moments of this share of tokens or none."""
    client.collector = client.finisher.collector = collector
    client.finisher._additions = []
    client.engine.train()
    client.reset_counts()
    for layer in client.model.layers:
        layer.deepspeed_moe.observer = None
        layer.experts.moment_sums_EX = None
    if moment_share:
        client.moments.start(every=round(1 / moment_share))
    if collector is not None:
        collector.attach()


def main() -> None:
    """All sizes in one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    from ubsmoe_ds import run, world

    world.join(experiment("builtin:tiny_olmoe", 16), "benchmark", [])
    devices = run.choose_accelerator(experiment("builtin:tiny_olmoe", 16))
    from ubsmoe_ds.client import start_deepspeed

    start_deepspeed(devices > 0, verbose=False)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.sizes:
            measure(name, options.tokens, options.repeats, Path(folder))


if __name__ == "__main__":
    main()
