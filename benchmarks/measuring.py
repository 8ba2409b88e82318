"""Time functions in turn within one process, print one line per figure, and build the models and steps to time."""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers


def add_output_option(parser: argparse.ArgumentParser) -> None:
    """Add the option --json."""
    parser.add_argument("--json", action="store_true", help="one object a line, for machines")


def device() -> torch.device:
    """Return the accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Return processor or accelerator, and the versions that figures depend on."""
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    else:
        chip = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return (
        f"{chip}, torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"
    )


def resident(which: str) -> float:
    """Return megabytes of this process: VmRSS now, VmHWM the most so far (getrusage would count its parent's)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) * 1024 / 1e6


def save_checkpoint(
    folder: Path, *, hidden: int, width: int, experts: int, layers: int, heads: int, vocabulary: int, dtype: torch.dtype
) -> str:
    """Save an OLMoE of these sizes with random weights, 8 experts per token; return the folder."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
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
    transformers.OlmoeForCausalLM(config).to(dtype).save_pretrained(folder)
    return str(folder)


def step_batch(tokens: int, vocabulary: int) -> Any:
    """Return a `StepBatch` of eight rows of random tokens; the last eighth of each row is the answer."""
    from ubsmoe_ds.data.batches import Example, StepBatch, collate

    generator = torch.Generator().manual_seed(1)
    length = tokens // 8
    rows = torch.randint(2, vocabulary, (8, length + 1), generator=generator).tolist()
    micro = collate([Example(row[: length - length // 8], row[length - length // 8 :]) for row in rows], 0)
    return StepBatch([micro], len(micro.target_A), 8 * length)


def start_alone(exp: Any) -> None:
    """Start this process as the only rank of the only client of an `Experiment`."""
    from ubsmoe_ds import run
    from ubsmoe_ds.mpi.join import join

    join(exp, "benchmark", [])
    devices = run.choose_accelerator(exp.accelerator)
    from ubsmoe_ds.client.deepspeed_setup import start_deepspeed

    start_deepspeed(bool(devices), verbose=False)


def seconds_of(function: Callable[[], object]) -> float:
    """Return the wall seconds of one call; on an accelerator, those between events around its kernels."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def cpu_seconds_of(function: Callable[[], object]) -> float:
    """Return the CPU seconds of one call: on a busy machine they are disturbed less than wall seconds."""
    start = time.process_time()
    function()
    return time.process_time() - start


def in_turn(
    functions: Mapping[str, Callable[[], object]],
    repeats: int,
    seconds_of: Callable[[Callable[[], object]], float] = seconds_of,
) -> dict[str, list[float]]:
    """Time each function once per repeat, so that disturbances of the machine affect all alike.

    Every second repeat goes through them backwards. The first call of each is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name in list(functions)[:: -1 if repeat % 2 else 1]:
            seconds[name].append(seconds_of(functions[name]))
    return {name: values[1:] for name, values in seconds.items()}


def ratio(values: list[float], floor: list[float]) -> float:
    """Return the median over repeats of value / floor."""
    return statistics.median(a / b for a, b in zip(values, floor, strict=True))


def say(record: Mapping[str, Any], as_json: bool) -> None:
    """Print one figure: `bench`, `impl` and other keys of the record, `ms` and `ratio`."""
    if as_json:
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)
        return
    shown = dict(record)
    ms, times = shown.pop("ms", None), shown.pop("ratio", None)
    text = "  ".join(f"{v!s:<22}" if k == "impl" else f"{k} {v}" for k, v in shown.items() if k != "bench")
    ms_text = "" if ms is None else f"{ms:9.2f} ms"
    print(text, ms_text, "" if times is None else f"{times:6.2f} x", flush=True)
