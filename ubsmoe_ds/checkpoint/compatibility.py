"""Whether a config goes on with the experiment that a checkpoint is of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import UserError

# what a job that goes on may change: how long, how it is watched, and on what it runs. Everything else makes results
MAY_CHANGE = (
    "name",
    "output",
    "overwrite",
    "accelerator",
    "oversubscribe",
    "evaluation",
    "checkpoint",
    "fault_tolerance",
    "min_clients",
    "host_timeout_s",
)
MAY_CHANGE_WITHIN = {
    "train": ("rounds", "save_every", "round_deadline_s"),
    "clients": ("ranks", "expert_parallel", "hosts"),
    "deepspeed": ("zero_optimization", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "comms_logger"),
}


def check_same_experiment(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Compare the config of a checkpoint with the one to go on with.

    Raises:
        UserError: naming the first key that makes it another experiment, with both values.
    """
    before, after = _by_key(old), _by_key(new)
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            raise UserError(
                f"--resume: {key} is {after.get(key)!r}, but {before.get(key)!r} in {folder}, which makes it another "
                "experiment; set it back, or start anew with another name=..."
            )


def _by_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that makes results, as section.key; those of clients as clients.NUMBER.key."""
    found = {}
    for section, value in config.items():
        parts = {section: value}
        if section == "clients":
            parts = {f"clients.{number}": client for number, client in enumerate(value)}
        for name, part in parts.items():
            if section in MAY_CHANGE:
                continue
            if not isinstance(part, Mapping):
                found[name] = part
                continue
            free = MAY_CHANGE_WITHIN.get(section, ())
            found |= {f"{name}.{key}": v for key, v in part.items() if key not in free}
    return found
