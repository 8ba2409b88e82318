"""What a run is made of beside its config: weights and rows, as digests that tell them from others, and the machine."""

import hashlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.shares import common_rows, has_sites

PIECES, PIECE_BYTES = 64, 2**16  # of a file of weights: training changes all of them, so a sample tells


def model_digest(folder: Path) -> str:
    """Of config.json and, by size and sample, of the weights; 32 hexadecimal digits.

    Raises:
        UserError: naming a file that cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        try:
            size = path.stat().st_size
            found.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for piece in range(PIECES):
                    file.seek(piece * size // PIECES)
                    found.update(file.read(PIECE_BYTES))
        except OSError as error:
            raise UserError(f"model.path: {str(path)!r} cannot be read ({error.strerror}); copy it again") from error
    return found.hexdigest()


def data_digest(exp: Experiment) -> str | None:
    """Of training and evaluation rows, as a run of this experiment has it; None where clients have rows of their own.

    Raises:
        UserError: as `load_rows`.
    """
    return None if has_sites(exp) else common_rows(exp).digest


def machine(proc: Path = Path("/proc")) -> str:
    """Processor, cores that this process may use, accelerators, and the versions that results depend on."""
    text = (proc / "cpuinfo").read_text(encoding="utf-8") if (proc / "cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    # as the driver names them: asking torch would import it
    gpus = [
        line.partition(":")[2].strip()
        for path in sorted((proc / "driver" / "nvidia" / "gpus").glob("*/information"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("Model:")
    ]
    cores = f"{len(os.sched_getaffinity(0))} cores of {models[0] if models else platform.machine()}"
    versions = [f"{name} {version(name)}" for name in ("torch", "deepspeed", "mpi4py")]
    return ", ".join([cores, *gpus, f"Python {platform.python_version()}", *versions])
