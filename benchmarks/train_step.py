"""Time a client's whole training step by K, ours against Hugging Face + PEFT, and the cost of each of our parts.

    python benchmarks/train_step.py                          # OLMoE-1B-7B scaled to 4 layers of width 512
    python benchmarks/train_step.py --layers 16 --hidden 2048 --tokens 8192 --dtype bf16 --k 2 8 \
        --impls ubsmoe hf_peft                               # its full shape on a GPU: four models of 13 GB
    python benchmarks/train_step.py --memory --k 2 8         # peak memory, each in a process of its own

The scaled model keeps OLMoE-1B-7B's proportions of attention, experts and vocabulary: F = D / 2, 64 experts,
V = 1.535 D per layer. A step is forward, backward and AdamW on 8 rows of random tokens, the last eighth of each the
answer, through DeepSpeed without ZeRO. `ratio` is relative to our step at the largest K, timed in turn in one process.

    ubsmoe              DMR (Dynamic Modulated Routing) and linearised PG (pseudo-gradients) as in the preset ub_smoe,
                        LoRA rank 8, router trained
    ubsmoe-no_dmr       without modulation        ubsmoe-no_pg    without pseudo-gradients
    ubsmoe-checkpointing  with train.activation_checkpointing
    ubsmoe-nf4          with model.quantize: nf4      ubsmoe-int8      with int8
    ubsmoe-no_lora      adapters frozen, but still computed: only the router and phi are trained, without PG
    hf_peft             transformers (grouped_mm experts), PEFT's LoRA on the same weights, torch's AdamW; PEFT adds
                        B A to the weights of all experts in every step
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import (
    add_output_option,
    device,
    in_turn,
    machine,
    ratio,
    resident,
    save_checkpoint,
    say,
    start_alone,
    step_batch,
)

from ubsmoe_ds.base.malloc import keep_freed_memory
from ubsmoe_ds.config.experiment import Experiment

OURS = ("ubsmoe", *(f"ubsmoe-{part}" for part in ("no_dmr", "no_pg", "no_lora", "checkpointing", "nf4", "int8")))
IMPLEMENTATIONS = (*OURS, "hf_peft")
VOCABULARY_PER_WIDTH = 50304 / (16 * 2048)


def scaled_checkpoint(options: argparse.Namespace, folder: Path) -> str:
    """Save a model of the options' shape with random weights."""
    return save_checkpoint(
        folder,
        hidden=options.hidden,
        width=options.hidden // 2,
        experts=options.experts,
        layers=options.layers,
        heads=max(1, options.hidden // 128),
        vocabulary=int(VOCABULARY_PER_WIDTH * options.layers * options.hidden),
        dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
    )


def experiment(path: str, k: int, options: argparse.Namespace, variant: str = "ubsmoe") -> Experiment:
    """Return an experiment of one client with this K; K_max is the largest K of the options."""
    raw: dict[str, Any] = {
        "name": "benchmark",
        "model": {"path": path},
        "num_experts": options.experts,
        "k_max": max(options.k),
        "clients": [{"name": "one", "budget": k / max(options.k)}],
        "deepspeed": {
            "train_batch_size": 8,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.0}},
            "bf16": {"enabled": options.dtype == "bf16"},
        },
    }
    if variant == "ubsmoe-no_dmr":
        raw["dmr"] = {"enabled": False}
    if variant in ("ubsmoe-no_pg", "ubsmoe-no_lora"):
        raw["pseudo_gradient"] = {"estimator": "none"}
    if variant in ("ubsmoe-nf4", "ubsmoe-int8"):
        raw["model"]["quantize"] = variant.removeprefix("ubsmoe-")
    if variant == "ubsmoe-checkpointing":
        raw["train"] = {"activation_checkpointing": True}
    return Experiment.model_validate(raw)


def ours(path: str, k: int, options: argparse.Namespace, variant: str) -> Callable[[], object]:
    """Return a step of our client."""
    from ubsmoe_ds.client.engine import Client

    exp = experiment(path, k, options, variant)
    client = Client(exp, exp.clients[0], 0)
    if variant == "ubsmoe-no_lora":
        for layer in client.model.layers:
            layer.experts.requires_grad_(False)
    batch = step_batch(options.tokens, client.hf_config.vocab_size)
    if client.moments is not None:
        client.calibrate(iter([batch]), 1)
        client.moments.update(client.moments.sums())
    client.reset_counts()
    client.engine.train()
    return lambda: client.step(batch)


def hf_peft(path: str, k: int, options: argparse.Namespace) -> Callable[[], object]:
    """Return a step of transformers with PEFT and the same K, on the same rows."""
    from peft import LoraConfig, get_peft_model
    from transformers import OlmoeForCausalLM

    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    hf = OlmoeForCausalLM.from_pretrained(
        path, dtype=dtype, num_experts_per_tok=k, experts_implementation="grouped_mm", local_files_only=True
    )
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(hf, LoraConfig(r=8, lora_alpha=16, target_modules=[], target_parameters=names))
    model = model.to(device()).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    tokens = step_batch(options.tokens, hf.config.vocab_size).micro[0].to(device())
    logits_of = model.get_base_model()

    def step() -> torch.Tensor:
        hidden = logits_of.model(input_ids=tokens.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.reshape(-1, hidden.shape[-1])[tokens.position_A]
        loss = torch.nn.functional.cross_entropy(logits_of.lm_head(hidden).float(), tokens.target_A)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def build(name: str, path: str, k: int, options: argparse.Namespace) -> Callable[[], object]:
    """Return a step of one implementation."""
    return hf_peft(path, k, options) if name == "hf_peft" else ours(path, k, options, name)


def measure(path: str, options: argparse.Namespace) -> None:
    """Time all K and implementations in turn and print a line for each."""
    torch.set_num_threads(options.threads)
    steps = {(name, k): build(name, path, k, options) for k in options.k for name in options.impls}
    keys = {f"{name} {k}": (name, k) for name, k in steps}
    seconds = in_turn({key: steps[pair] for key, pair in keys.items()}, options.repeats)
    reference = seconds[f"{options.impls[0]} {max(options.k)}"]
    for key, (name, k) in keys.items():
        record = {"bench": "train_step", "impl": name, "dtype": options.dtype, "tokens": options.tokens, "k": k}
        record |= {"threads": options.threads, "ms": 1e3 * statistics.median(seconds[key])}
        say(record | {"ratio": ratio(seconds[key], reference)}, options.json)


def peak_megabytes(name: str, path: str, options: argparse.Namespace) -> None:
    """Print the peak memory of two steps: of the accelerator if there is one, else of the process."""
    step = build(name, path, options.only_k, options)
    gc.collect()
    before = resident("VmRSS")
    for _ in range(2):
        step()
    peak = resident("VmHWM")
    if torch.cuda.is_available():
        before, peak = 0.0, torch.cuda.max_memory_allocated() / 1e6
    record = {"bench": "train_step", "impl": name, "dtype": options.dtype, "tokens": options.tokens}
    say(record | {"k": options.only_k, "peak_mb": round(peak), "before_mb": round(before)}, options.json)


def main() -> None:
    """Measure time, or memory with --memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--impls", nargs="+", default=list(IMPLEMENTATIONS), choices=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    # --memory passes these two to the processes that it starts
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--only-k", type=int, help=argparse.SUPPRESS)
    add_output_option(parser)
    options = parser.parse_args()
    keep_freed_memory()
    if options.memory and options.checkpoint is None:
        with tempfile.TemporaryDirectory() as folder:
            path = scaled_checkpoint(options, Path(folder))
            for k in options.k:
                for name in options.impls:
                    again = [*sys.argv[1:], "--checkpoint", path, "--impls", name, "--only-k", str(k)]
                    subprocess.run([sys.executable, __file__, *again], check=True)
        return
    start_alone(experiment("builtin:tiny_olmoe", max(options.k), options))
    if options.checkpoint is not None:
        peak_megabytes(options.impls[0], options.checkpoint, options)
        return
    if not options.json:
        print(machine())
    with tempfile.TemporaryDirectory() as folder:
        measure(scaled_checkpoint(options, Path(folder)), options)


if __name__ == "__main__":
    main()
