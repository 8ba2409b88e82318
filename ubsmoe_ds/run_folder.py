"""The folder a run writes to: refused if it holds another run, before anything is started or written."""

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.errors import UserError

FILES = ("metrics.jsonl", "summary.json", "config.json", "tensorboard/events.*")
ADAPTERS = ("adapter*/**/*.safetensors", "adapter*/**/adapter_config.json")


def check_run_folder(exp: Experiment) -> None:
    """Writes nothing.

    Raises:
        UserError: if the folder holds files and `overwrite` is false, or is no folder.
    """
    folder = exp.run_dir
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file; choose another folder with output=... or name=...")
    if folder.exists() and any(folder.iterdir()) and not exp.overwrite:
        raise UserError(f"output: {folder} already holds a run; set name=..., output=... or overwrite=true")


def create_run_folder(exp: Experiment) -> None:
    """Make the folder; with `overwrite` the files of the earlier run go, and only those.

    Raises:
        UserError: as `check_run_folder`, or if it cannot be written.
    """
    check_run_folder(exp)
    try:
        exp.run_dir.mkdir(parents=True, exist_ok=True)
        for old in (path for pattern in (*FILES, *ADAPTERS) for path in exp.run_dir.glob(pattern)):
            old.unlink()
        for folder in sorted(exp.run_dir.glob("adapter*/**/"), reverse=True):  # the inner ones first
            if not any(folder.iterdir()):
                folder.rmdir()
        probe = exp.run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"output: {exp.run_dir} cannot be written ({error.strerror}); choose another with output=..."
        ) from error
