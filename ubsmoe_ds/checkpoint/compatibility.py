"""Check that a config continues the experiment that a checkpoint belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubsmoe_ds import __version__
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.differences import MAY_CHANGE_ON_RESUME, differences
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.messages import section_of
from ubsmoe_ds.config.sections import Section


def check_same_experiment(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path, version: str) -> None:
    """Compare the config of a checkpoint with the one to continue with.

    Args:
        old: the checkpoint's config; keys that were added since it was written have their defaults.
        new: the config to continue with.
        folder: the checkpoint.
        version: version of the program that wrote it.

    Raises:
        UserError: naming the first key that makes it another experiment, with both values; or a key of `old` that
            this version does not know, with both versions.
    """
    for key, recorded, asked in differences(with_defaults(Experiment, old), new, MAY_CHANGE_ON_RESUME):
        if key.partition(".")[0] != "deepspeed" and not _is_known(Experiment, key):
            raise UserError(
                f"--resume: {folder} has {key}={recorded!r}, which this version {__version__} does not know; resume it "
                f"with version {version}, which wrote it, or start a new run with another name=..."
            )
        raise UserError(
            f"--resume: {key} is {asked!r}, but {recorded!r} in {folder}, which makes it another experiment; set it "
            "back, or start a new run with another name=..."
        )


def with_defaults(section: type[Section], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's values as JSON with the default of every key that is missing."""
    whole = section.model_construct().model_dump(mode="json", warnings=False)
    for key, value in values.items():
        inner = _section_of(section, key)
        if inner is not None and isinstance(value, Mapping):
            value = with_defaults(inner, value)
        elif inner is not None and isinstance(value, list):
            value = [with_defaults(inner, item) for item in value]
        whole[key] = value
    return whole


def _section_of(section: type[Section], key: str) -> type[Section] | None:
    """Return the class of a nested section, or of the items of a list of sections; None for any other key."""
    field = section.model_fields.get(key)
    found = None if field is None else section_of(field)
    return found if found is not None and issubclass(found, Section) else None


def _is_known(section: type[Section], key: str) -> bool:
    """Return whether this version has the key, written as `section.0.key`."""
    name, _, rest = key.partition(".")
    inner = _section_of(section, name)
    while rest and rest.partition(".")[0].isdigit():
        rest = rest.partition(".")[2]
    return name in section.model_fields and (inner is None or not rest or _is_known(inner, rest))
