"""Check that a config continues the experiment that a checkpoint belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.differences import MAY_CHANGE_ON_RESUME, differences


def check_same_experiment(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Compare the config of a checkpoint with the one to continue with.

    Raises:
        UserError: naming the first key that makes it another experiment, with both values.
    """
    for key, recorded, asked in differences(old, new, MAY_CHANGE_ON_RESUME):
        raise UserError(
            f"--resume: {key} is {asked!r}, but {recorded!r} in {folder}, which makes it another experiment; set it "
            "back, or start a new run with another name=..."
        )
