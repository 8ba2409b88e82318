"""Open safetensors files of users within bounds: a header may claim anything, and is read and kept whole."""

import struct
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ubsmoe_ds.base.files import open_regular

MOST_HEADER = 64 * 2**20  # bytes
MOST_TENSORS = 2**18  # of a file or a model; mixtures of experts with one tensor a projection have some 40,000


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file for torch.

    Raises:
        OSError: as `open_regular` does.
        SafetensorError: for a file that is none, or whose header is larger or names more tensors than the bounds.
    """
    with open_regular(path) as file:
        (size,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if size > MOST_HEADER:
            raise SafetensorError(f"its header has {size} bytes, more than {MOST_HEADER}")
        if file.read(size).count(b"data_offsets") > MOST_TENSORS:
            raise SafetensorError(f"it holds more than {MOST_TENSORS} tensors")
    return safe_open(path, framework="pt")
