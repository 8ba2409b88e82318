"""A Hugging Face checkpoint folder read tensor by tensor, so that a rank never holds what it does not keep.

safetensors only: nothing in the folder is executed or unpickled.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ubsmoe_ds.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAPPED_BYTES = 64 * 2**20  # pages of a mapped file count as this process's memory: let go of them that often


class Checkpoint:
    """The tensors of a folder by name.

    Args:
        folder: with `model.safetensors`, or its shards and their index.

    Raises:
        UserError: here and in every method; it names the file, and the tensor where there is one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: safe_open | None = None
        self._open_name = ""
        self._read_bytes = 0
        if (folder / INDEX).is_file():
            self._files = self._index()
        elif (folder / SINGLE).is_file():
            self._files = dict.fromkeys(self._handle(SINGLE, "").keys(), SINGLE)
        else:
            pickled = next(iter(sorted(path.name for path in folder.glob("*.bin"))), None)
            hint = f"; {pickled} may run code when read: save the model as safetensors" if pickled else ""
            raise UserError(f"model.path: {str(folder)!r} has neither {SINGLE} nor {INDEX}{hint}")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def require(self, names: list[str]) -> None:
        """Refuse a folder that lacks some of these."""
        missing = [name for name in names if name not in self]
        if missing:
            raise UserError(f"model.path: {str(self.folder)!r} lacks {len(missing)} tensors, first {missing[0]!r}")

    def read_into(self, target: Tensor, name: str) -> None:
        """Copy a tensor, in whatever precision it is stored, to where it is kept, of the same shape."""
        file = self._files[name]
        handle = self._handle(file, name)
        try:
            value = handle.get_tensor(name)
        except SafetensorError as error:
            raise self._unreadable(file, name, error) from error
        if value.shape != target.shape:
            raise UserError(
                f"model.path: in {str(self.folder / file)!r}, tensor {name!r} has the shape {[*value.shape]}, "
                f"config.json asks for {[*target.shape]}"
            )
        target.copy_(value)
        self._read_bytes += value.numel() * value.element_size()

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            assert all(isinstance(file, str) and Path(file).name == file for file in files.values())
        except (OSError, ValueError, KeyError, AttributeError, AssertionError, TypeError) as error:
            raise UserError(f"model.path: {str(path)!r} is no index of safetensors shards ({error!r})") from error
        for name, file in files.items():
            if not (self.folder / file).is_file():
                raise UserError(f"model.path: {str(self.folder / file)!r} is missing; it should hold {name!r}")
        return files

    def _handle(self, file: str, name: str) -> safe_open:
        if self._opened is not None and file == self._open_name and self._read_bytes <= MAPPED_BYTES:
            return self._opened
        self._opened = None  # unmaps what was read before the next file is mapped
        try:
            self._opened = safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file, name, error) from error
        self._open_name, self._read_bytes = file, 0
        return self._opened

    def _unreadable(self, file: str, name: str, error: Exception) -> UserError:
        tensor = f" (for tensor {name!r})" if name else ""
        reason = " ".join(str(error).split())[:200]
        return UserError(f"model.path: {str(self.folder / file)!r} cannot be read{tensor}: {reason}; copy it again")
