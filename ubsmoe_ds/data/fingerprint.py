"""Digests of a run's weights and rows, which tell them from others, and a description of the machine."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.shares import common_rows, has_sites

PIECES, PIECE_BYTES = 64, 2**16  # read of each weight file: training changes every weight, so a sample is enough


def model_digest(folder: Path) -> str:
    """Return a digest of config.json and, by size and sample, of the weights: 32 hexadecimal digits.

    Raises:
        UserError: naming a file that cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        try:
            size = path.stat().st_size
            state.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for piece in range(PIECES):
                    file.seek(piece * size // PIECES)
                    state.update(file.read(PIECE_BYTES))
        except OSError as error:
            raise UserError(
                f"model.path: {str(path)!r} cannot be read ({error.strerror}); check that it is there and may be read"
            ) from error
    return state.hexdigest()


def data_digest(exp: Experiment) -> str | None:
    """Return the digest of training and evaluation rows that a run records; None where clients have their own rows.

    Raises:
        UserError: as `load_rows`.
    """
    return None if has_sites(exp.clients) else common_rows(exp).digest


def machine(proc: Path = Path("/proc")) -> str:
    """Return processor, cores that this process may use, accelerators, and the versions that results depend on."""
    text = (proc / "cpuinfo").read_text(encoding="utf-8") if (proc / "cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    # read from the driver: asking torch would import it
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("Model:")
    ]
    cores = f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}"
    versions = [f"{name} {version(name)}" for name in ("torch", "deepspeed", "mpi4py")]
    return ", ".join([cores, *gpus, f"Python {platform.python_version()}", *versions])
