"""Before any job: does an experiment fit, what does it cost, and who will be waited for?

    python launch/plan.py --config my.yaml --hosts 8 --devices 8 --device-memory 80G
    python launch/plan.py --config my.yaml --hostfile hostfile --device-memory 24G clients.0.budget=0.5
    python launch/plan.py                                         # the demo's figures, nothing to compare them with

Reads the config, the rows, and of the model config.json and the tokenizer; weights need not be there. Memory is the
largest phase of a run on the fullest rank of each client. On hosts without accelerators device memory means the memory
of a rank; accelerator=cpu or accelerator=cuda says what to plan for, if that is not what is found here.

Exit codes: 0 it fits, 2 it does not, or a mistake in options, config or files.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ubsmoe_ds.base.command_line import Parser, carry_out, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.launching.placement import describe, place, read_hostfile
from ubsmoe_ds.planning.fitting import Fit, check, fit, memory_bytes
from ubsmoe_ds.planning.memory_model import peak
from ubsmoe_ds.planning.plan import ClientPlan, Job, plan, straggler

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "tiny.yaml"


def main() -> int:
    """Plan; returns the exit code."""
    return carry_out(lambda: show(parse(sys.argv[1:])))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the experiment")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment (YAML); default ds_configs/tiny.yaml")
    parser.add_argument("--hosts", type=whole(1, 10_000), help="how many hosts there are")
    parser.add_argument("--devices", type=whole(1, 1024), help="accelerators of a host, or its ranks without any")
    parser.add_argument("--hostfile", type=Path, help="in place of both: lines `host slots=N`")
    parser.add_argument("--device-memory", metavar="80G", help="of one device; G is 10^9 bytes, GiB 2^30")
    return parser.parse_intermixed_args(arguments)


def show(options: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: for mistakes, and if a client does not fit.
    """
    exp = load_experiment(options.config, options.overrides)
    memory = None if options.device_memory is None else memory_bytes(options.device_memory)
    slots = read_slots(options, [name for client in exp.clients for name in client.hosts or []])
    line = None if slots is None else describe(exp.clients, place(exp.clients, slots))
    job = read_job(exp)
    if job.on_cpu and exp.accelerator == "auto":
        print(
            "note: planned for CPUs, as no accelerator is found here; accelerator=cuda plans for GPUs", file=sys.stderr
        )
    plans = plan(job)
    fits = [] if memory is None else [fit(job, n, memory, slots) for n in range(len(exp.clients))]
    console = Console()
    for table in (cost_table(job, plans), memory_table(job, plans, fits)):
        console.print(table)
    slowest, over_fastest, over_median = straggler(plans)
    print(
        f"straggler: {exp.clients[slowest].name}, {over_fastest:.2f} times the fastest client's time and "
        f"{over_median:.2f} times the median, if all devices are equally fast"
    )
    if line is not None:
        print(f"placement: {line}")
    if memory is not None:
        check(job, fits, memory)


def read_slots(options: argparse.Namespace, named: Sequence[str]) -> dict[str, int] | None:
    """Ranks that each host has room for; None where nothing is said about hosts.

    Args:
        options: the command line.
        named: hosts that the config names; the others are called host1, host2, ...

    Raises:
        UserError: for options that contradict each other.
    """
    if options.hostfile is not None:
        if options.hosts is not None or options.devices is not None:
            raise UserError("--hostfile: says what --hosts and --devices say; give one or the other")
        return read_hostfile(options.hostfile)
    if (options.hosts is None) != (options.devices is None):
        raise UserError("--hosts: goes with --devices, the number of accelerators of each host; give both or neither")
    if options.hosts is None:
        return None
    names = [*dict.fromkeys(named), *(f"host{n}" for n in range(1, options.hosts + 1))]
    return dict.fromkeys(names[: options.hosts], options.devices)


def read_job(exp: Experiment) -> Job:
    """The experiment with its model's sizes and the lengths of its rows."""
    import torch  # seconds, after the mistakes that take none

    on_cpu = exp.accelerator == "cpu" or (exp.accelerator == "auto" and not torch.cuda.is_available())
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"  # of this process; else it is guessed
    from ubsmoe_ds.models.hf_config import model_shape, read_config
    from ubsmoe_ds.planning.workload import workloads

    shape = model_shape(read_config(exp.model_dir), lora_rank=exp.lora.rank, lora_attention=exp.lora.attention)
    return Job(exp, shape, workloads(exp), on_cpu)


def cost_table(job: Job, plans: Sequence[ClientPlan]) -> Table:
    """FLOPs of a client's ranks together, bytes that a rank sends in a step and the client in a round."""
    exp, device = job.exp, "cpu" if job.on_cpu else "cuda"
    title = f"{exp.name}: {exp.method}, {len(exp.clients)} clients on {exp.world_size} ranks ({device})"
    unit, scale = ("T", 1e12) if max(one.step_flops for one in plans) >= 1e12 else ("G", 1e9)
    table = Table(title=title, title_justify="left")
    for heading in ("client", "K", "ranks", f"{unit}FLOP/step", "/round", "MB/step", "/round", "time"):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for client, one in zip(exp.clients, plans, strict=True):
        table.add_row(
            client.name,
            str(exp.active_experts(client)),
            _layout(client.ranks, client.expert_parallel),
            f"{one.step_flops / scale:.2f}",
            f"{one.round_flops / scale:.1f}",
            f"{one.step_bytes / 1e6:.1f}",
            f"{one.sent_bytes / 1e6:.1f}",
            f"{one.time:.2f}",
        )
    return table


def memory_table(job: Job, plans: Sequence[ClientPlan], fits: Sequence[Fit]) -> Table:
    """Memory of a client's fullest rank; if there is something to compare it with, what would fit."""
    table = Table(title="memory of a rank", title_justify="left")
    headings = ["client", "GB", "fullest in"]
    headings += ["training", "evaluation"] if not fits else ["fits", "K up to", "capacity up to", "ranks from"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for number, (client, one) in enumerate(zip(job.exp.clients, plans, strict=True)):
        phase, most = peak(one.phases)
        rest = _fit_cells(fits[number]) if fits else [_gigabytes(one.phases[key]) for key in ("train", "evaluate")]
        table.add_row(client.name, _gigabytes(most), phase, *rest)
    return table


def _fit_cells(found: Fit) -> list[str]:
    capacity = "all kept" if math.isinf(found.capacity) else f"{found.capacity:g}" if found.capacity else "none"
    layout = "none" if found.layout is None else _layout(*found.layout)
    return ["yes" if found.as_it_is else "no", str(found.k or "none"), capacity, layout]


def _layout(ranks: int, expert_parallel: int) -> str:
    return f"{ranks} (EP {expert_parallel})" if expert_parallel > 1 else str(ranks)


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
