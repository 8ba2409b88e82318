"""Read and write checkpoint files: all ranks write in parallel, completely or not at all, and verify before use.

A checkpoint is a folder such as `checkpoints/000007-round-12`, where 000007 is a serial number. Each rank writes one
safetensors file of pieces, which are named ranges of flat tensors, so that a job of another layout can read exactly the
ranges it needs. The manifest (JSON) holds the checksums of all files and of itself. Everything is written to a
temporary folder, synced, then renamed.

This file knows files only; state.py decides what they contain.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ubsmoe_ds import __version__
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import read_json, require_regular, sha256
from ubsmoe_ds.base.tensor_files import open_tensors

FORMATS = "ubsmoe_ds.checkpoint."
FORMAT = f"{FORMATS}2"
FOLDER, MANIFEST, TEMPORARY, LEFT = "checkpoints", "manifest.json", ".tmp-", "left-"
MOST_MANIFEST = 16 * 2**20  # bytes; 10,000 ranks and clients take 5 MB
OUR_FILE = re.compile(r"(rank|(kept|controls)-[0-9]{6}-[0-9]{6,})-[0-9]{5,}\.safetensors")


class Piece(NamedTuple):
    """Elements of the flat tensor `name` from `offset` on; `kind` and `owner` tell tensors of the same name apart."""

    kind: str
    owner: str
    name: str
    offset: int
    value: Tensor


class Damaged(Exception):  # noqa: N818  # not an error of this program
    """A checkpoint cannot be used; the text says why, in one line."""


class OtherFormat(Exception):  # noqa: N818  # as above
    """A whole checkpoint of another version of the program; the text names both."""


def folders(run_dir: Path) -> list[Path]:
    """Return a run's checkpoint folders, newest first, without half-written ones."""
    complete = (path for path in (run_dir / FOLDER).glob("[0-9][0-9][0-9][0-9][0-9][0-9]-*") if path.is_dir())
    return sorted(complete, key=serial_of, reverse=True)


def serial_of(folder: Path) -> int:
    """Return the serial number at the beginning of a checkpoint's name."""
    return int(folder.name.partition("-")[0])


def set_aside_newer(run_dir: Path, folder: Path) -> None:
    """Rename checkpoints that are newer than the one the run resumes from: they belong to an abandoned branch.

    Raises:
        OSError: if one cannot be renamed.
    """
    if folder.parent.resolve() != (run_dir / FOLDER).resolve():
        return
    for newer in folders(run_dir):
        if serial_of(newer) > serial_of(folder):
            names = (f"{LEFT}{newer.name}{f'-{number}' if number else ''}" for number in itertools.count())
            newer.rename(next(path for path in map(newer.with_name, names) if not path.exists()))


def rank_file(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


def begin(run_dir: Path, serial: int) -> Path:
    """Make an empty temporary folder for a checkpoint and remove leftovers of interrupted ones. One rank calls it."""
    parent = run_dir / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = temporary(run_dir, serial)
    folder.mkdir()
    return folder


def named(run_dir: Path, serial: int, label: str) -> Path:
    """Return the folder of a complete checkpoint."""
    return run_dir / FOLDER / f"{serial:06d}-{label}"


def temporary(run_dir: Path, serial: int) -> Path:
    """Return the folder in which a checkpoint is written before it is complete."""
    return run_dir / FOLDER / f"{TEMPORARY}{serial:06d}"


def kept_file(name: str, client: int, version: int, rank: int) -> str:
    """Return the name in a checkpoint of a file of kept_states.py: whose states, client number, round, rank."""
    return f"{name}-{client:06d}-{version:06d}-{rank:05d}.safetensors"


def write_pieces(path: Path, pieces: Iterable[Piece]) -> tuple[int, bytes]:
    """Write and sync a file.

    Returns:
        (size in bytes, SHA-256).

    Raises:
        OSError, SafetensorError: if it cannot be written, for example on a full disk.
    """
    tensors = {
        f"{piece.kind}|{piece.owner}|{piece.name}|{piece.offset}": piece.value.detach().reshape(-1).cpu().clone()
        for piece in pieces
    }
    save_file(tensors, path)
    _sync(path)
    return path.stat().st_size, sha256(path)


def add_file(source: Path, target: Path) -> None:
    """Put a file that never changes into a checkpoint: as another name of it, or copied where that cannot be.

    Raises:
        OSError: if it cannot be written, for example on a full disk.
    """
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
        _sync(target)


def commit(
    run_dir: Path,
    serial: int,
    label: str,
    files: Mapping[str, tuple[int, bytes]],
    content: Mapping[str, Any],
) -> Path:
    """Write the manifest and give the checkpoint its name. One rank calls it.

    Args:
        run_dir: the run's folder.
        serial: serial number of this checkpoint.
        label: rest of its folder's name.
        files: size in bytes and SHA-256 of each rank's file; all are written.
        content: further content of the manifest; JSON types only.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written, for example on a full disk.
    """
    source, target = temporary(run_dir, serial), named(run_dir, serial, label)
    listed = {name: {"bytes": size, "sha256": digest.hex()} for name, (size, digest) in files.items()}
    manifest = {"format": FORMAT, "version": __version__, "files": listed, **content}
    manifest["sha256"] = _digest(manifest)
    (source / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(source / MANIFEST)
    _sync(source)
    source.rename(target)
    _sync(target.parent)
    return target


def remove_old(run_dir: Path, keep: int, kept_too: Path | None) -> None:
    """Remove all checkpoints but the newest `keep` and `kept_too`. One rank calls it.

    Raises:
        OSError: if one cannot be renamed.
    """
    for old in folders(run_dir)[keep:]:
        if old != kept_too:
            leftover = temporary(run_dir, serial_of(old))
            old.rename(leftover)  # a half-removed folder must not pass for a checkpoint
            shutil.rmtree(leftover, ignore_errors=True)  # newer ones are complete; `begin` removes what remains


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, its own checksum verified.

    Raises:
        Damaged: if it is missing, unreadable or changed.
        OtherFormat: if another version of the program wrote it in a format that this one does not read.
    """
    try:
        manifest = read_json(folder / MANIFEST, MOST_MANIFEST)
    except (OSError, ValueError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({' '.join(str(error).split())[:100]})") from error
    if not isinstance(manifest, dict) or not str(manifest.get("format")).startswith(FORMATS):
        raise Damaged(f"{MANIFEST} is not of format {FORMAT}")
    if manifest.get("sha256") != _digest({key: value for key, value in manifest.items() if key != "sha256"}):
        raise Damaged(f"{MANIFEST} does not have its checksum")
    if manifest["format"] != FORMAT:
        raise OtherFormat(
            f"was written by version {manifest.get('version', 'unknown')} in format {manifest['format']}; this is "
            f"version {__version__}, which reads {FORMAT}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        OUR_FILE.fullmatch(name) and isinstance(files[name], dict) for name in files
    ):
        raise Damaged(f"{MANIFEST} lists files that are not ours")  # a name must not lead outside the folder
    return manifest


def verify_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Compare a file with its size and checksum in the manifest.

    Raises:
        Damaged: if it is missing or differs.
    """
    path = folder / name
    try:
        require_regular(path)
        if path.stat().st_size != expected.get("bytes"):
            raise Damaged(f"{name} has {path.stat().st_size} bytes instead of {expected.get('bytes')}")
        if sha256(path).hex() != expected.get("sha256"):
            raise Damaged(f"{name} does not have its checksum")
    except OSError as error:
        raise Damaged(f"{name} cannot be read ({error.strerror})") from error


class Reader:
    """Read ranges of tensors from the files of a verified checkpoint, or from pieces in memory (`of`).

    Args:
        folder: the folder of the files.
        names: their names.

    Raises:
        UserError: if a file is not one of ours in spite of its checksum.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder = folder
        # by kind, owner, tensor: (offset, elements, what gives them when it is sliced)
        self._index: dict[tuple[str, str, str], list[tuple[int, int, Any]]] = defaultdict(list)
        for name in names:
            try:
                file = open_tensors(folder / name)
                for key in file.keys():  # noqa: SIM118  # a safetensors file is not a mapping
                    kind, owner, tensor, offset = key.split("|")
                    part = file.get_slice(key)
                    self._index[kind, owner, tensor].append((int(offset), part.get_shape()[0], part))
            except (OSError, SafetensorError, ValueError, IndexError) as error:
                raise UserError(f"checkpoint: {folder / name} cannot be read ({error}); use an older one") from error

    @classmethod
    def of(cls, pieces: Iterable[Piece]) -> "Reader":
        """Return a reader of pieces that are in memory."""
        reader = cls(Path(), [])
        for piece in pieces:
            part = (piece.offset, piece.value.numel(), piece.value.reshape(-1))
            reader._index[piece.kind, piece.owner, piece.name].append(part)
        return reader

    def within(self, prefix: str) -> "Reader":
        """Return a reader of the pieces whose kind begins with `prefix`, without it."""
        reader = Reader(self.folder, [])
        for (kind, owner, name), parts in self._index.items():
            if kind.startswith(prefix):
                reader._index[kind.removeprefix(prefix), owner, name] = parts
        return reader

    def pieces(self, prefix: str) -> Iterator[tuple[Piece, Callable[[], Tensor]]]:
        """Yield every piece whose kind begins with `prefix`, without its value, and what reads that."""
        for (kind, owner, name), parts in self._index.items():
            if kind.startswith(prefix):
                for offset, _, part in parts:
                    yield Piece(kind, owner, name, offset, torch.empty(0)), partial(part.__getitem__, slice(None))

    def has(self, kind: str, owner: str, name: str) -> bool:
        """Return whether there is any piece of this tensor."""
        return (kind, owner, name) in self._index

    def kinds(self, prefix: str) -> list[str]:
        """Return all kinds that begin with `prefix`."""
        return sorted({kind for kind, _, _ in self._index if kind.startswith(prefix)})

    def read(self, kind: str, owner: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Return elements [start, start + numel) of a tensor, joined from its pieces; numel None: all from `start` on.

        Raises:
            UserError: if the pieces do not cover them.
        """
        if numel is None:
            pieces = self._index.get((kind, owner, name), [])
            numel = max((offset + size for offset, size, _ in pieces), default=start) - start
        parts, reached = [], start
        for offset, value in self.overlaps(kind, owner, name, start, numel):
            if offset <= reached < offset + len(value):
                parts.append(value[reached - offset :])
                reached = offset + len(value)
        if reached < start + numel or not parts:
            raise UserError(
                f"checkpoint: {self.folder} has no {kind} of {name!r} of {owner!r} from element {reached} on; it "
                "belongs to another model or config"
            )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def overlaps(self, kind: str, owner: str, name: str, start: int, numel: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (offset, values) of every stored part of elements [start, start + numel), in order."""
        for offset, size, part in sorted(self._index.get((kind, owner, name), []), key=itemgetter(0, 1)):
            first, end = max(offset, start), min(offset + size, start + numel)
            if first < end:
                yield first, part[first - offset : end - offset]


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
