"""Say before a run whether an experiment fits, what it costs, and which client the others will wait for.

    python launch/plan.py --config my.yaml --hosts 8 --devices 8 --device-memory 80G
    python launch/plan.py --config my.yaml --hostfile hostfile --device-memory 24G clients.0.budget=0.5
    python launch/plan.py                                         # the demo's figures, nothing to compare them with
    python launch/plan.py --config my.yaml --device-flops 200e12 --device-bandwidth 3e12    # and seconds; or --measure

Reads the config, the rows, and the model's config.json and tokenizer; weights need not be there, and of those that are
only the names are read. Memory is the largest phase of a run on the fullest rank of each client. On hosts without
accelerators device memory means the memory of a rank; accelerator=cpu or accelerator=cuda plans for hosts that differ
from this one. Where clients take turns (`groups`, `sampling`) it plans the schedule and each group's memory, and says
for --devices which groups give the shortest rounds:

    python launch/plan.py --config ds_configs/population_tiny.yaml --devices 4

Exit codes: 0 it fits, 2 it does not, or a mistake in options, config or files.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ubsmoe_ds.base.command_line import Parser, add_show_rows, carry_out, quoting_rows, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment
from ubsmoe_ds.launching.hostfile import read_hostfile
from ubsmoe_ds.launching.placement import describe, place
from ubsmoe_ds.planning.device_rates import add_device_options, check_options, device_of
from ubsmoe_ds.planning.fitting import Fit, check_fits, fit, parse_bytes
from ubsmoe_ds.planning.group_plan import plan_group, shapes
from ubsmoe_ds.planning.group_report import (
    as_config,
    check_groups_fit,
    gigabytes,
    group_table,
    layout,
    shape_table,
    that_fit,
)
from ubsmoe_ds.planning.inputs import PlanInput
from ubsmoe_ds.planning.memory_model import largest_phase
from ubsmoe_ds.planning.plan import ClientPlan, plan, straggler
from ubsmoe_ds.planning.seconds import Device, lines, round_line, round_seconds

if TYPE_CHECKING:
    from ubsmoe_ds.federation.roster import Roster

SHOWN_ROUNDS = 3
ADVISED_ROUNDS = 20  # whose schedules shapes of groups are compared by
DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "ds_configs" / "tiny.yaml"


def main() -> int:
    """Print the plan and return the exit code."""
    return carry_out(lambda: show(parse(sys.argv[1:])))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the experiment")
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="experiment (YAML); default ds_configs/tiny.yaml")
    parser.add_argument("--hosts", type=whole(1, 10_000), help="number of hosts; 1 if --devices alone is given")
    parser.add_argument("--devices", type=whole(1, 1024), help="accelerators of each host, or its ranks if it has none")
    parser.add_argument("--hostfile", type=Path, help="instead of both: lines `host slots=N`")
    parser.add_argument("--device-memory", metavar="80G", help="memory of one device; G is 10^9 bytes, GiB 2^30")
    add_device_options(parser)
    add_show_rows(parser)
    return parser.parse_intermixed_args(arguments)


def show(options: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        UserError: for mistakes, and if a client does not fit.
    """
    exp = load_experiment(options.config, options.overrides)
    check_options(options)
    memory = None if options.device_memory is None else parse_bytes(options.device_memory)
    slots = read_slots(options, [name for trainer in exp.trainers for name in trainer.hosts or []])
    line = None if slots is None or exp.takes_turns else describe(exp.trainers, place(exp.trainers, slots))
    with quoting_rows(options.show_rows):
        inputs = read_inputs(exp)
    if inputs.on_cpu and exp.accelerator == "auto":
        say("note: planned for CPUs, as no accelerator is found here; accelerator=cuda plans for GPUs", error=True)
    if exp.takes_turns:
        show_groups(inputs, slots, memory, device_of(options, inputs))
        return
    plans = plan(inputs)
    fits = [] if memory is None else [fit(inputs, n, memory, slots) for n in range(len(exp.clients))]
    console = Console()
    for table in (cost_table(inputs, plans), memory_table(inputs, plans, fits)):
        console.print(table)
    slowest, over_fastest, over_median = straggler(plans)
    say(
        f"straggler: {exp.clients[slowest].name}, {over_fastest:.2f} times the fastest client's time and "
        f"{over_median:.2f} times the median, if all devices are equally fast"
    )
    device = device_of(options, inputs)
    for text in () if device is None else lines(inputs, plans, device):
        say(text)
    if line is not None:
        say(f"placement: {line}")
    if memory is not None:
        check_fits(inputs, fits, memory)


def show_groups(
    inputs: PlanInput, slots: Mapping[str, int] | None, memory: float | None, device: Device | None
) -> None:
    """Print the plan of groups that train clients in turn, and with `slots` which groups suit these devices best.

    Raises:
        UserError: if a group does not fit, or has no place on the hosts.
    """
    from ubsmoe_ds.federation.roster import Amount, Roster

    exp, console = inputs.exp, Console()
    training = [Amount(part.rows, round(part.mean_length * part.rows)) for part in inputs.row_lengths]
    own = [Amount(part.own_rows, round(part.eval_mean_length * part.own_rows)) for part in inputs.row_lengths]
    roster = Roster(exp, inputs.shape, training, own)
    numbers = range(1, exp.train.rounds + 1)
    for text in schedule_lines(roster, numbers):
        say(text)
    rounds = [roster.schedule(number) for number in numbers]
    plans = [plan_group(inputs, group, rounds) for group in range(len(exp.trainers))]
    console.print(group_table(inputs, plans, memory))
    if device is not None:
        evaluated = [roster.evaluated_by(group) for group in range(len(exp.trainers))]
        say(round_line(inputs, round_seconds(inputs, rounds, evaluated, device), device))
    best = None
    if slots is not None and any(client.groups or client.hosts for client in exp.clients):
        say(
            "note: --devices: no other groups are tried, as clients name the `groups` or `hosts` for them",
            error=True,
        )
    elif slots is not None:
        count = min(exp.train.rounds, ADVISED_ROUNDS)
        found = that_fit(shapes(inputs, list(slots.values()), count), memory)
        console.print(shape_table(found, sum(slots.values()), count))
        best = found[0]
        say(f"shortest rounds, if all devices are equally fast: {as_config(best)}")
    if memory is not None:
        check_groups_fit(inputs, plans, memory, best)
    if slots is not None:
        say(f"placement: {describe(exp.trainers, place(exp.trainers, slots))}")


def read_slots(options: argparse.Namespace, named: Sequence[str]) -> dict[str, int] | None:
    """Return how many ranks each host has room for; None if no option names hosts.

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
    if options.devices is None:
        if options.hosts is not None:
            raise UserError("--hosts: goes with --devices, the number of accelerators of each host; give both")
        return None
    hosts = options.hosts or 1
    names = [*dict.fromkeys(named), *(f"host{n}" for n in range(1, hosts + 1))]
    return dict.fromkeys(names[:hosts], options.devices)


def read_inputs(exp: Experiment) -> PlanInput:
    """Return the experiment with its model's sizes and the lengths of its rows."""
    import torch  # takes seconds; mistakes in options and config are reported before

    on_cpu = exp.accelerator == "cpu" or (exp.accelerator == "auto" and not torch.cuda.is_available())
    os.environ["DS_ACCELERATOR"] = "cuda" if torch.cuda.is_available() else "cpu"  # or DeepSpeed guesses
    from ubsmoe_ds.models.families import FAMILIES
    from ubsmoe_ds.models.hf_config import model_shape, read_config
    from ubsmoe_ds.models.stored import may_have_own_head
    from ubsmoe_ds.planning.row_lengths import read_row_lengths

    config = read_config(exp.model_dir)
    shape = model_shape(config, lora_rank=exp.lora.rank, lora_attention=exp.lora.attention)
    tied = shape.tied_embeddings and not may_have_own_head(exp.model_dir, FAMILIES[config.model_type])
    return PlanInput(exp, replace(shape, tied_embeddings=tied), read_row_lengths(exp), on_cpu)


def schedule_lines(roster: "Roster", rounds: Sequence[int]) -> list[str]:
    """Return the schedules of the first rounds, and how long groups idle in the mean over all rounds."""
    idle, over = zip(*(roster.idle(number) for number in rounds), strict=True)
    mean = f"all {len(rounds)} rounds: groups idle {100 * sum(idle) / len(idle):.0f} % in the mean, rounds take "
    return [
        *(roster.line(number) for number in rounds[:SHOWN_ROUNDS]),
        f"{mean}{sum(over) / len(over):.2f} x the lower bound, if all devices are equally fast",
    ]


def cost_table(inputs: PlanInput, plans: Sequence[ClientPlan]) -> Table:
    """Return FLOPs of a client's ranks together, bytes that a rank sends in a step and the client in a round."""
    exp, device = inputs.exp, "cpu" if inputs.on_cpu else "cuda"
    title = f"{exp.name}: {exp.method}, {len(exp.clients)} clients on {exp.world_size} ranks ({device})"
    unit, scale = ("T", 1e12) if max(client.step_flops for client in plans) >= 1e12 else ("G", 1e9)
    table = Table(title=title, title_justify="left")
    for heading in ("client", "K", "ranks", f"{unit}FLOP/step", "/round", "MB/step", "/round", "time"):
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for client, cost in zip(exp.clients, plans, strict=True):
        table.add_row(
            client.name,
            str(exp.active_experts(client)),
            layout(client.ranks, client.expert_parallel),
            f"{cost.step_flops / scale:.2f}",
            f"{cost.round_flops / scale:.1f}",
            f"{cost.step_bytes / 1e6:.1f}",
            f"{cost.sent_bytes / 1e6:.1f}",
            f"{cost.time:.2f}",
        )
    return table


def memory_table(inputs: PlanInput, plans: Sequence[ClientPlan], fits: Sequence[Fit]) -> Table:
    """Return the memory of a client's fullest rank; with `fits`, what would fit the device memory."""
    table = Table(title="memory of a rank", title_justify="left")
    headings = ["client", "GB", "fullest in"]
    headings += ["training", "evaluation"] if not fits else ["fits", "K up to", "capacity up to", "ranks from"]
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "client" else "right")
    for number, (client, cost) in enumerate(zip(inputs.exp.clients, plans, strict=True)):
        phase, most = largest_phase(cost.phases)
        rest = _fit_cells(fits[number]) if fits else [gigabytes(cost.phases[key]) for key in ("train", "evaluate")]
        table.add_row(client.name, gigabytes(most), phase, *rest)
    return table


def _fit_cells(result: Fit) -> list[str]:
    capacity = "all kept" if math.isinf(result.capacity) else f"{result.capacity:g}" if result.capacity else "none"
    ranks = "none" if result.layout is None else layout(result.layout.ranks, result.layout.expert_parallel)
    ranks += "" if result.has_room else ", no room"
    return ["yes" if result.fits_now else "no", str(result.k or "none"), capacity, ranks]


if __name__ == "__main__":
    sys.exit(main())
