"""Start DeepSpeed for a client's group: its torch world, the config of its engine, and silence while it starts."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator

from ubsmoe_ds.config.deepspeed_json import DeepSpeedConfig

ADAMS = ("adam", "adamw")


def engine_config(settings: DeepSpeedConfig) -> dict[str, Any]:
    """Return the DeepSpeed section as DeepSpeed gets it: no progress lines, no clipping where it would be wrong."""
    config = settings.model_dump(exclude_none=True)
    config.setdefault("steps_per_print", 2**31)
    if settings.zero_stage == 0:
        config["gradient_clipping"] = 0.0  # see GradientHook
    optimizer = config["optimizer"]
    if str(optimizer.get("type", "")).lower() in ADAMS:
        # DeepSpeed compiles its own Adam at start; torch's needs no compiler and is as fast for adapters
        optimizer["params"] = {"torch_adam": True, **optimizer.get("params", {})}
    return config


def start_deepspeed(on_accelerator: bool, verbose: bool) -> None:
    """Initialise torch.distributed for this client's group."""
    # on the CPU DeepSpeed would compile this at start (40-85 s, needs a compiler); a killed build hangs all later runs
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_accelerator:
        get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    with deepspeed_output(verbose):
        deepspeed.init_distributed(
            dist_backend=get_accelerator().communication_backend_name() if on_accelerator else "gloo"
        )


@contextlib.contextmanager
def deepspeed_output(verbose: bool) -> Iterator[None]:
    """Suppress what DeepSpeed prints and logs during setup, unless `verbose`."""
    logger = logging.getLogger("DeepSpeed")
    logger.setLevel(logging.INFO if verbose else logging.ERROR)
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        yield
