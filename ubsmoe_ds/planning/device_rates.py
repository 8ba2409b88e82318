"""Find what a device does in a second, stated on the command line or measured here, for `seconds.py`."""

import argparse
import statistics
import time
from collections.abc import Callable

from ubsmoe_ds.base.command_line import positive
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.planning.inputs import PlanInput, rank_setup
from ubsmoe_ds.planning.memory_model import ALIGNMENT
from ubsmoe_ds.planning.seconds import Device

COPIED = 2**28  # bytes, beyond any cache
REPEATS = 15


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `device_of` reads."""
    parser.add_argument("--device-flops", type=positive, metavar="200e12", help="FLOP/s that a rank's products reach")
    parser.add_argument("--device-bandwidth", type=positive, metavar="3e12", help="bytes/s of a rank's device memory")
    parser.add_argument("--network", type=positive, metavar="25e9", help="bytes/s that a rank sends to others")
    parser.add_argument("--measure", action="store_true", help="measure FLOP/s and memory bandwidth on this machine")


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that lack or contradict each other.

    Raises:
        UserError: with the option.
    """
    stated = [options.device_flops is not None, options.device_bandwidth is not None]
    if options.measure and any(stated):
        raise UserError("--measure: measures what --device-flops and --device-bandwidth state; give one or the other")
    if any(stated) and not all(stated):
        raise UserError("--device-flops: goes with --device-bandwidth; give both, or --measure")
    if options.network is not None and not (options.measure or all(stated)):
        raise UserError("--network: goes with --device-flops and --device-bandwidth, or with --measure")


def device_of(options: argparse.Namespace, inputs: PlanInput) -> Device | None:
    """Return the device that the options state or have measured; None: they ask for no seconds.

    Raises:
        UserError: if a device is to be measured that is not here.
    """
    if options.measure:
        return measured(inputs)._replace(network=options.network)
    if options.device_flops is None:
        return None
    return Device(options.device_flops, options.device_bandwidth, options.network)


def measured(inputs: PlanInput) -> Device:
    """Measure the experts' first product and a copy, with the threads of this process.

    The product is that of gate and up in the experiment's precision, with the rows of the client that has most of them
    and as many for each expert. Medians of several repeats; the first is not counted.

    Raises:
        UserError: if the plan is for accelerators and there is none.
    """
    import torch  # takes seconds; mistakes in options and config are reported before
    from torch.nn import functional as F

    if not inputs.on_cpu and not torch.cuda.is_available():
        raise UserError(
            "--measure: the plan is for an accelerator and none is found here; state --device-flops and "
            "--device-bandwidth, or set accelerator=cpu"
        )
    device = torch.device("cpu" if inputs.on_cpu else "cuda")
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    exp = inputs.exp
    pairs = ((c, g) for c in range(len(exp.clients)) for g in (exp.allowed_groups(c) if exp.takes_turns else [None]))
    setups = [rank_setup(inputs, client, group) for client, group in pairs]
    shape, experts = inputs.shape, setups[0].local_experts
    dtype = torch.bfloat16 if setups[0].bf16 else torch.float32
    rows = -(-max(setup.training.tokens * setup.k for setup in setups) // experts)
    width, outputs = (-(-size // ALIGNMENT) * ALIGNMENT for size in (shape.hidden, 2 * shape.expert_width))
    x_ND = torch.ones(rows * experts, width, dtype=dtype, device=device)
    weight_EOD = torch.ones(experts, outputs, width, dtype=dtype, device=device)
    ends_E = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * rows
    product = _median_seconds(lambda: (F.grouped_mm(x_ND, weight_EOD.mT, offs=ends_E), wait()))
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    copy = _median_seconds(lambda: (target.copy_(source), wait()))
    return Device(2.0 * len(x_ND) * width * outputs / product, 2 * COPIED / copy)


def _median_seconds(work: Callable[[], object]) -> float:
    """Return the median duration of a call, once it is warm."""
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
