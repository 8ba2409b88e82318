"""Read the weights of a model folder tensor by tensor, so that a rank never holds weights that it does not keep.

safetensors only: nothing in the folder is executed or unpickled.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json
from ubsmoe_ds.base.tensor_files import MOST_TENSORS, open_tensors
from ubsmoe_ds.models.hub import INDEX, SINGLE

RECOMPUTED = "rotary_emb.inv_freq"  # older files hold it; transformers computes it from config.json
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # others are quantised, or not weights
PLAIN = "use weights in float32, float16 or bfloat16"
MOST_SHARDS = 4096
MAPPED_BYTES = 64 * 2**20  # unmap a file after so many: its pages count as this process's memory


class WeightFiles:
    """The safetensors files of a model folder, read by tensor name: those that transformers would read.

    These are `model.safetensors`, or else the shards that the index names, and of a shard every tensor; of two with
    one name in two shards, the last shard's.

    Args:
        folder: the model's.
        rename: gives the name under which a tensor is asked for; None: its name in the file.

    Raises:
        UserError: here and in every method, naming the file, and the tensor where there is one.
    """

    def __init__(self, folder: Path, rename: Callable[[str], str] | None = None) -> None:
        self.folder = folder
        self._opened: safe_open | None = None
        self._open_name = ""
        self._read_bytes = 0
        if (folder / SINGLE).is_file():
            files = {SINGLE: ""}
        elif (folder / INDEX).is_file():
            files = self._shards()
        else:
            pickled = next(iter(sorted(path.name for path in folder.glob("*.bin"))), None)
            hint = f"; {pickled} may run code when read: save the model as safetensors" if pickled else ""
            raise UserError(f"model.path: {str(folder)!r} has neither {SINGLE} nor {INDEX}{hint}")
        self.file_names = sorted(files)
        self._places: dict[str, tuple[str, str]] = {}  # name: (file, name there)
        for file in self.file_names:
            for stored in self._handle(file, files[file]).keys():  # noqa: SIM118 - no mapping
                name = rename(stored) if rename else stored
                other = self._places.get(name, (file, stored))[1]
                if other != stored:
                    raise UserError(
                        f"model.path: {str(folder)!r} holds one tensor under two names, {other!r} and {stored!r}; "
                        "remove one"
                    )
                self._places[name] = file, stored
            if len(self._places) > MOST_TENSORS:
                raise UserError(f"model.path: {str(folder)!r} holds more than {MOST_TENSORS} tensors")

    @property
    def names(self) -> list[str]:
        """Return the names of the tensors."""
        return list(self._places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def require(self, names: Collection[str]) -> None:
        """Raise unless the files hold these tensors."""
        missing = [name for name in names if name not in self]
        if missing:
            raise UserError(f"model.path: {str(self.folder)!r} lacks {len(missing)} tensors, first {missing[0]!r}")

    def require_shapes(self, shapes: Mapping[str, Collection[int]]) -> None:
        """Raise unless these tensors have these shapes; before memory is taken for whatever config.json says."""
        self.require(shapes)
        for name, shape in shapes.items():
            file, stored = self._places[name]
            try:
                found = self._handle(file, stored).get_slice(stored).get_shape()
            except SafetensorError as error:
                raise self._unreadable(file, stored, error) from error
            if [*found] != [*shape]:
                raise UserError(
                    f"model.path: in {str(self.folder / file)!r}, tensor {stored!r} has the shape {[*found]}, "
                    f"config.json asks for {[*shape]}"
                )

    def refuse_others(self, known: Collection[str], ignored: Callable[[str], bool]) -> None:
        """Raise if a tensor is neither known nor ignored: config.json describes another model then."""
        for name, (file, stored) in self._places.items():
            if name not in known and RECOMPUTED not in name and not ignored(name):
                raise UserError(
                    f"model.path: in {str(self.folder / file)!r}, tensor {stored!r} has no place in the model that "
                    "config.json describes"
                )

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...] | None = None) -> None:
        """Copy a tensor, in whatever precision it is stored, into one of the same shape.

        Args:
            target: where to.
            name: the tensor's.
            part: reads only this part of a tensor whose shape was checked before; None: all of it.
        """
        if part is None:
            self.require_shapes({name: target.shape})
        file, stored = self._places[name]
        try:
            handle = self._handle(file, stored)
            value = handle.get_tensor(stored) if part is None else handle.get_slice(stored)[part]
        except SafetensorError as error:
            raise self._unreadable(file, stored, error) from error
        if value.dtype not in FLOATS:
            raise UserError(f"model.path: in {str(self.folder / file)!r}, tensor {stored!r} is {value.dtype}; {PLAIN}")
        assert value.shape == target.shape, f"{name} {part}: {value.shape} {target.shape}"
        target.copy_(value)
        self._read_bytes += value.numel() * value.element_size()

    def _shards(self) -> dict[str, str]:
        """Return the files that the index names, each with a tensor that it should hold."""
        files = _weight_map(self.folder / INDEX)
        for name, file in files.items():
            if not (self.folder / file).is_file():
                raise UserError(f"model.path: {str(self.folder / file)!r} is missing; it should hold {name!r}")
        shards = {file: name for name, file in files.items()}
        if len(shards) > MOST_SHARDS:
            raise UserError(f"model.path: {str(self.folder / INDEX)!r} names more than {MOST_SHARDS} files")
        return shards

    def _handle(self, file: str, name: str) -> safe_open:
        if self._opened is not None and file == self._open_name and self._read_bytes <= MAPPED_BYTES:
            return self._opened
        self._opened = None  # unmaps what was read before the next file is mapped
        try:
            self._opened = open_tensors(self.folder / file)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file, name, error) from error
        self._open_name, self._read_bytes = file, 0
        return self._opened

    def _unreadable(self, file: str, name: str, error: Exception) -> UserError:
        tensor = f" (for tensor {name!r})" if name else ""
        reason = " ".join(str(error).split())[:200]
        remedy = "check that it is there and may be read"
        if isinstance(error, SafetensorError):
            remedy = "it is damaged or cut off: fetch it again"
        return UserError(f"model.path: {str(self.folder / file)!r} cannot be read{tensor}: {reason}; {remedy}")


def _weight_map(path: Path) -> dict[str, str]:
    """Return the file of each tensor that an index of shards names."""
    try:
        index = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {str(path)!r} is no index of safetensors shards ({error})") from error
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise UserError(f"model.path: {str(path)!r} is no index of safetensors shards (weight_map is missing)")
    if len(files) > MOST_TENSORS:
        raise UserError(f"model.path: {str(path)!r} names more than {MOST_TENSORS} tensors")
    for name, file in files.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise UserError(f"model.path: in {str(path)!r}, {name!r} is in {file!r}, no safetensors file beside it")
    return files


def known_names(folder: Path, rename: Callable[[str], str]) -> set[str]:
    """Return the names of a model's tensors, as far as they are known without its weights.

    They stand in the index of its shards, or in the header of its only file.

    Args:
        folder: the model's; neither file need be there.
        rename: as in `WeightFiles`.

    Raises:
        UserError: if one is there and cannot be read.
    """
    if (folder / SINGLE).is_file():
        return set(WeightFiles(folder, rename).names)
    return {rename(name) for name in _weight_map(folder / INDEX)} if (folder / INDEX).is_file() else set()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a small file, such as an adapter's.

    Raises:
        UserError: if the file cannot be read, or a tensor is not of floats or not finite; names file and tensor.
    """
    try:
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError) as error:
        pickled = next(iter(sorted(other.name for other in path.parent.glob("*.bin"))), None)
        hint = f"; {pickled} may run code when read: save it as safetensors" if pickled else ""
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"adapter: {str(path)!r} cannot be read ({reason}){hint}") from error
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            raise UserError(f"adapter: in {str(path)!r}, tensor {name!r} is {value.dtype}; {PLAIN}")
        if not bool(value.isfinite().all()):
            raise UserError(f"adapter: in {str(path)!r}, tensor {name!r} holds NaN or Inf; use an earlier adapter")
    return tensors
