"""Check and create the folder that a run writes to; one that holds another run is refused before anything starts."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import UNFINISHED, leads_out, read_json
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.launching import ownership

FILES = ("metrics.jsonl", "clients.jsonl", "samples.jsonl", "summary.json", "config.json", "tensorboard/events.*")
ADAPTERS = ("adapter*/**/*.safetensors", "adapter*/**/adapter_config.json")
MOST_CONFIG = 2**20  # bytes of a run's config.json
CHECKPOINTS = ("checkpoints/[0-9]*-*round-*", "checkpoints/left-*", "checkpoints/.tmp-*")


def check_run_folder(exp: Experiment, resuming: bool = False) -> None:
    """Raise if another job holds the run's folder, or it holds another run. Read-only.

    Args:
        exp: the experiment.
        resuming: as for `check_contents`.

    Raises:
        UserError: if another job holds the folder, and as `check_contents`.
    """
    try:
        holder = ownership.holder_of(exp.run_dir)
    except OSError as error:
        raise _unusable(exp.run_dir, error) from error
    if holder:
        raise ownership.held(exp.run_dir, holder)
    check_contents(exp, resuming)


def check_contents(exp: Experiment, resuming: bool = False) -> None:
    """Raise if the run's folder holds another run. Read-only.

    Args:
        exp: the experiment.
        resuming: whether the run may go on with what the folder holds; then that must be the same run.

    Raises:
        UserError: if the folder holds files and may not be used, or is not a folder.
    """
    folder = exp.run_dir
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"output: {folder} is a file; choose another folder with output=... or name=...")
        # a job that was killed while it made the folder leaves only hidden files
        if not folder.exists() or exp.overwrite or all(path.name.startswith(".") for path in folder.iterdir()):
            return
    except OSError as error:
        raise _unusable(folder, error) from error
    if resuming and _matching(folder, CHECKPOINTS[:1]):
        return  # reading them shows whether they belong to this experiment
    if not resuming or (folder / "summary.json").exists():
        raise UserError(
            f"output: {folder} already holds a run; go on with it by --resume auto if it has checkpoints, or set "
            "name=..., output=... or overwrite=true"
        )
    if _method_and_model(folder / "config.json") != (exp.method, exp.model.path, exp.name):
        raise UserError(f"output: {folder} holds another run; set name=..., output=... or overwrite=true")


def _unusable(folder: Path, error: OSError) -> UserError:
    """Return the error about a folder that cannot be read."""
    return UserError(f"output: {folder} cannot be used ({error.strerror}); choose another with output=...")


def resumes_in_place(exp: Experiment, resume: str | None) -> bool:
    """Return whether a job goes on in its own folder, rather than in a new one, maybe with a checkpoint from elsewhere.

    Args:
        exp: the experiment.
        resume: "auto", a checkpoint's folder, or None.

    Raises:
        UserError: if there is no such checkpoint, or it is on a branch that the run has left.
    """
    if resume is None or resume == "auto":
        return resume is not None
    if not (Path(resume) / "manifest.json").is_file():
        raise UserError(f"--resume: {resume} is not a complete checkpoint; use auto, or another folder")
    in_run_folder = exp.run_dir.resolve() in Path(resume).resolve().parents
    if in_run_folder and Path(resume).resolve().name.startswith("left-"):
        raise UserError(
            f"--resume: {resume} was left when the run went on from an older one, and the record is of its new branch; "
            "go on with it in a folder of its own, name=..."
        )
    return in_run_folder


def _method_and_model(path: Path) -> tuple[str, str, str] | None:
    """Return method, model and name from a run's config.json; None if it cannot be read."""
    try:
        config = read_json(path, MOST_CONFIG)
        return config["method"], config["model"]["path"], config["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def open_run_folder(run_dir: Path, run_id: str, wait_s: float = ownership.WAIT_SECONDS) -> IO[str]:
    """Make the run's folder, if there is none, and hold it for this process; return the file to close when it is done.

    What a killed job has left half-written there is removed.

    Args:
        run_dir: the folder.
        run_id: the run's.
        wait_s: how long to wait for another process that holds it.

    Raises:
        UserError: if it cannot be written, or another process holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        owner = ownership.claim(run_dir, run_id, wait_s)
        for unfinished in _matching(run_dir, [f"**/{UNFINISHED}*"]):
            shutil.rmtree(unfinished)
        return owner
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def clear_run_folder(run_dir: Path) -> None:
    """Remove the files of an earlier run, which `check_run_folder` has allowed; no others.

    Raises:
        UserError: if it cannot be written, or files to remove are behind a link, in a folder that is another's.
    """
    try:
        for old in _matching(run_dir, (*FILES, *ADAPTERS, *CHECKPOINTS)):
            if leads_out(old.parent, run_dir):
                raise UserError(
                    f"output: {old} is behind a link out of the run's folder and is not removed; remove the link, or "
                    "choose another folder with output=... or name=..."
                )
        forget_checkpoints(run_dir)  # first: a checkpoint without its records must not be resumed
        for old in _matching(run_dir, (*FILES, *ADAPTERS)):
            old.unlink()
        for folder in sorted(run_dir.glob("adapter*/**/"), reverse=True):  # inner folders first
            if not any(folder.iterdir()):
                folder.rmdir()
        probe = run_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> UserError:
    """Return the error about a folder that cannot be written."""
    return UserError(f"output: {run_dir} cannot be written ({error.strerror}); choose another with output=...")


def checkpoints(run_dir: Path) -> set[tuple]:
    """Identify the checkpoints in the run's folder; later ones of the same name differ."""
    return {(path.name, path.stat().st_ino) for path in _matching(run_dir, CHECKPOINTS[:1])}


def summary(run_dir: Path) -> set[tuple]:
    """Identify the summary in the run's folder, which a run writes last; a later one differs."""
    return {(path.stat().st_ino, path.stat().st_mtime_ns) for path in _matching(run_dir, ["summary.json"])}


def forget_checkpoints(run_dir: Path) -> None:
    """Remove the checkpoints of a run; one that is half removed no longer counts as a checkpoint."""
    for old in _matching(run_dir, CHECKPOINTS[:1]):
        old.rename(old.with_name(f".tmp-{old.name}"))
    for old in _matching(run_dir, CHECKPOINTS):
        shutil.rmtree(old)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the paths in a folder that match one of the patterns."""
    return [path for pattern in patterns for path in folder.glob(pattern)]
