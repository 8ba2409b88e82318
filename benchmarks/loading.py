"""Measure memory and time to load one rank's part of a model folder: ours, and transformers' whole model.

    python benchmarks/loading.py                       # an OLMoE of 1.3 GB with random weights
    python benchmarks/loading.py --gigabytes 4 --expert-parallel 1 8 --dtype bf16
    python benchmarks/loading.py --gigabytes 4 --dtype bf16 --expert-parallel 1 --quantize nf4 int8

The weights have OLMoE-1B-7B's structure (names, index, shards, per-expert tensors) at a smaller width. Each case runs
in a process of its own, `ubsmoe-nf4` and `ubsmoe-int8` with `model.quantize`. `kept_mb`: what the rank holds afterwards
(parameters, quantised weights, the buffer that they are dequantised in); `peak_mb`: the peak memory of the
process minus what it had before, mapped file pages included; `ratio`: peak over kept.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import add_output_option, machine, resident, say
from safetensors.torch import save_file
from transformers import OlmoeConfig

from ubsmoe_ds.models.conversion import UBSMoESpec, load
from ubsmoe_ds.moe.frozen import QuantizedExperts
from ubsmoe_ds.moe.gate import GateConfig
from ubsmoe_ds.moe.quantized import library

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYERS, EXPERTS, VOCABULARY = 16, 64, 50304  # of OLMoE-1B-7B
SHARDS = 4


def config(gigabytes: float, dtype: str) -> OlmoeConfig:
    """Return the config of an OLMoE as wide as the size allows; F = D / 2, as in OLMoE-1B-7B."""
    elements = gigabytes * 1e9 / DTYPES[dtype].itemsize
    width = 128
    while LAYERS * (4 * width**2 + EXPERTS * 3 * width * width // 2) + 2 * VOCABULARY * width < elements:
        width += 128
    return OlmoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 128,
        num_experts=EXPERTS,
        dtype=dtype.replace("fp", "float").replace("bf", "bfloat"),
    )


def save_checkpoint(folder: Path, model: OlmoeConfig, dtype: torch.dtype) -> float:
    """Write random weights under the hub's names, shard by shard; return the gigabytes written."""
    width, hidden = model.hidden_size, model.intermediate_size
    shapes = {"model.embed_tokens.weight": (VOCABULARY, width), "lm_head.weight": (VOCABULARY, width)}
    shapes["model.norm.weight"] = (width,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}self_attn.{name}_norm.weight": (width,) for name in "qk"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes[f"{prefix}mlp.gate.weight"] = (EXPERTS, width)
        for expert in range(EXPERTS):
            inside = f"{prefix}mlp.experts.{expert}."
            shapes |= {f"{inside}{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
            shapes[f"{inside}down_proj.weight"] = (width, hidden)
    names, files = sorted(shapes), {}
    per_shard = -(-len(names) // SHARDS)
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        in_shard = names[shard * per_shard : (shard + 1) * per_shard]
        save_file({name: torch.randn(shapes[name]).mul_(0.02).to(dtype) for name in in_shard}, folder / file)
        files |= dict.fromkeys(in_shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def measure(folder: Path, implementation: str, expert_parallel: int, options: argparse.Namespace) -> None:
    """Load once and print the figures."""
    dtype = DTYPES[options.dtype]
    scheme = implementation.partition("-")[2] or None
    if scheme:
        library()  # its own size is no part of the model's
    before, start = resident("VmRSS"), time.perf_counter()
    if implementation != "transformers":
        spec = UBSMoESpec(GateConfig(k=8, candidates=16), expert_parallel=expert_parallel, quantize=scheme)
        model: torch.nn.Module = load(folder, spec, dtype)
    else:
        from transformers import OlmoeForCausalLM

        model = OlmoeForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    seconds, peak = time.perf_counter() - start, resident("VmHWM") - before
    kept = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    kept += sum({m.workspace: m.workspace.nbytes for m in model.modules() if isinstance(m, QuantizedExperts)}.values())
    kept /= 1e6
    record = {"bench": "loading", "impl": implementation, "dtype": options.dtype, "ranks": expert_parallel}
    say(
        record | {"kept_mb": round(kept), "peak_mb": round(peak), "ms": 1e3 * seconds, "ratio": peak / kept},
        options.json,
    )


def main() -> None:
    """Write the weights, then start a process for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    parser.add_argument("--expert-parallel", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--quantize", nargs="*", default=[], choices=["nf4", "int8"], help="also with these")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)  # folder, implementation, ranks
    add_output_option(parser)
    options = parser.parse_args()
    if options.case:
        folder, implementation, ranks = options.case
        measure(Path(folder), implementation, int(ranks), options)
        return
    with tempfile.TemporaryDirectory() as name:
        size = save_checkpoint(Path(name), config(options.gigabytes, options.dtype), DTYPES[options.dtype])
        if not options.json:
            print(f"{machine()}; weights of {size:.2f} GB in {SHARDS} shards", flush=True)
        ours = ["ubsmoe", *(f"ubsmoe-{scheme}" for scheme in options.quantize)]
        cases = [(implementation, ranks) for implementation in ours for ranks in options.expert_parallel]
        for implementation, ranks in [*cases, ("transformers", 1)]:
            again = [*sys.argv[1:], "--case", name, implementation, str(ranks)]
            subprocess.run([sys.executable, __file__, *again], check=True)


if __name__ == "__main__":
    main()
