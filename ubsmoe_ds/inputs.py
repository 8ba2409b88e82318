"""What a run is made of beside its config, the model's weights and the rows, as digests that tell them from others."""

import hashlib
from pathlib import Path

from ubsmoe_ds.config import Experiment
from ubsmoe_ds.data.sources import digest, load_rows
from ubsmoe_ds.errors import UserError

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
    if exp.clients[0].source is not None:
        return None
    rows, evaluation = load_rows(exp.data, exp.seed)
    return digest([*rows, *evaluation])
