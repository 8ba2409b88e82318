"""Find the keys in which two configs of one experiment differ, and say which of them do not count.

A key is written as `section.key`, with numbers for list items, such as `clients.0.budget`.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

# where a run is written, and how it is saved meanwhile, does not change its results
WITHOUT_EFFECT = ("name", "output", "overwrite", "checkpoint", "fault_tolerance", "min_clients")
# a resumed run may also change how long it is, how it is watched and what it runs on; everything else makes results
MAY_CHANGE_ON_RESUME = (
    *WITHOUT_EFFECT,
    "accelerator",
    "oversubscribe",
    "data.packing",
    "evaluation",
    "host_timeout_s",
    "hang_timeout_s",
    "train.rounds",
    "train.save_every",
    "train.kept_states_gb",
    "train.save_best",
    "train.patience",
    "train.round_deadline_s",
    "train.schedule_by",
    "clients.*.ranks",
    "clients.*.expert_parallel",
    "clients.*.hosts",
    "clients.*.groups",
    "groups",
    "deepspeed.zero_optimization",
    "deepspeed.steps_per_print",
    "deepspeed.wall_clock_breakdown",
    "deepspeed.memory_breakdown",
    "deepspeed.comms_logger",
)


# what a version of the program wrote for the same thing before
FORMER = (("data.format", "instruction", "auto"),)  # the rows are compared by their digest


class Difference(NamedTuple):
    """A key with its value in either config; None: the key is missing there, or null."""

    key: str
    recorded: Any
    asked: Any


def differences(recorded: Mapping[str, Any], asked: Mapping[str, Any], may_differ: Sequence[str]) -> list[Difference]:
    """Return the keys whose values differ, sorted.

    Args:
        recorded, asked: configs as JSON.
        may_differ: keys to leave out, with everything below them; `*` stands for any number of a list item.
    """
    old, new = flatten(recorded), flatten(asked)
    for key, former, now in FORMER:
        for config in (old, new):
            config |= {key: now} if config.get(key) == former else {}
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return [Difference(key, old.get(key), new.get(key)) for key in keys if not _is_within(key, may_differ)]


def flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Return a nested config as `{"section.0.key": value}`; an empty section stays as it is."""
    if not isinstance(value, Mapping | list) or not value:
        return {key: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    return {k: v for name, part in items for k, v in flatten(part, f"{key}.{name}" if key else str(name)).items()}


def _is_within(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) or fnmatchcase(key, f"{pattern}.*") for pattern in patterns)
