"""Read files of users within bounds; write files whole or not at all.

A path given by a user may lead to anything: a pipe, a device, gigabytes, or nesting that fills the stack. A disk may be
full. Readers raise OSError or ValueError, so that each caller can say whose file it was; writers raise UserError.
"""

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from ubsmoe_ds.base.errors import UserError

UNFINISHED = ".unfinished-"  # begins the name of a folder whose files are being written
MOST_BYTES = 64 * 2**20  # of a JSON file; the weight index of a large model has a few MB
MOST_VALUES = 2**20  # of a JSON text, about; Python takes 0.5 s for them


def require_regular(path: Path) -> None:
    """Check that a path leads to a regular file, which can be read without waiting and has an end.

    Raises:
        OSError: with a readable `strerror` if it does not.
    """
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, "a path cannot hold a NUL") from error
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "Is a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a regular file")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; raise as `require_regular` does."""
    require_regular(path)
    return path.open("rb")


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """Return the content of a text file in UTF-8.

    Raises:
        OSError: as `require_regular` does.
        ValueError: for more than `most` bytes, or another encoding.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"more than {most} bytes")
    return data.decode()


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """Return the value of a JSON file of at most `most` bytes; raise as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, most))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; drop nothing silently.

    Raises:
        ValueError: for a text that is not JSON, a key that stands twice in an object, NaN, Infinity, nesting that is
            too deep, and more than about `MOST_VALUES` values.
    """
    raw = text if isinstance(text, bytes) else text.encode(errors="surrogatepass")
    if sum(map(raw.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES} values")
    try:
        if isinstance(text, bytes):
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        return _STRICT.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def first_json(text: str, start: int = 0) -> tuple[Any, int]:
    """Return (the JSON value that begins at a place of the text, where it ends); raise ValueError as `parse_json`."""
    try:
        return _STRICT.raw_decode(text, start)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def leads_out(path: Path, folder: Path) -> bool:
    """Return whether a path in a folder is, or is below, a link that leads out of it."""
    return not path.resolve().is_relative_to(folder.resolve())


def json_line(value: Any, indent: int | None = None) -> str:
    """Return a line of JSON, or several, with null in place of NaN and Inf."""
    try:
        return json.dumps(value, allow_nan=False, indent=indent) + "\n"
    except ValueError:
        return json.dumps(finite_or_null(value), indent=indent) + "\n"


def finite_or_null(value: Any) -> Any:
    """Return the value with None in place of NaN and Inf, which JSON cannot express."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of JSON; raise ValueError for a key that stands twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key[:80]!r} stands twice")
        result[key] = value
    return result


def _no_number(text: str) -> Any:
    """Refuse NaN and Infinity."""
    raise ValueError(f"{text} is not a number in JSON")


_STRICT = json.JSONDecoder(object_pairs_hook=_without_repeats, parse_constant=_no_number)


@contextmanager
def writes(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission and the like into a `UserError` that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors hides the system's error in its own
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise UserError(f"{str(path)!r} cannot be written ({reason}); free space there or choose another") from error


def sha256(path: Path) -> bytes:
    """Return the SHA-256 of a file's content; raise OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def replace_files(folder: Path, contents: Mapping[str, Callable[[Path], object]]) -> None:
    """Write files that belong together to a folder: a failure leaves all the earlier ones, and none of the new.

    A process that is killed while it gives them their names can still leave some of each. A reader that must know needs
    a digest of the others in the file that is named last.

    Args:
        folder: made if it does not exist.
        contents: name of a file -> function that writes it to a path.

    Raises:
        UserError: if they cannot be written, naming the folder.
    """
    with writes(folder), _made(folder):
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=folder) as unfinished:
            new, earlier = Path(unfinished), Path(unfinished) / "earlier"
            earlier.mkdir()
            for name, write in contents.items():
                write(new / name)
            for name in contents:
                if os.path.lexists(folder / name):
                    _keep(folder / name, earlier / name)
            try:
                for name in contents:
                    (new / name).replace(folder / name)
            except OSError:
                _put_back(folder, contents, earlier)
                raise


def _keep(path: Path, copy: Path) -> None:
    """Give a file a second name; a copy, where the file system has no links."""
    try:
        os.link(path, copy, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, copy, follow_symlinks=False)


def _put_back(folder: Path, names: Iterable[str], earlier: Path) -> None:
    """Undo the replacement of files, of which some have been replaced."""
    for name in names:
        if os.path.lexists(earlier / name):
            (earlier / name).replace(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder for the block; remove it again if it is new and the block fails."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def require_new(folder: Path, option: str) -> None:
    """Check that a folder can be made: it does not exist yet, or is empty.

    Args:
        folder: the path.
        option: the command's option that names it, for the error.

    Raises:
        UserError: if it is in use.
    """
    with writes(folder):
        if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
            raise UserError(f"{option}: {str(folder)!r} is in use; name a new folder")


@contextmanager
def new_folder(folder: Path, option: str) -> Iterator[Path]:
    """Make a folder that exists complete or not at all: what the block writes to the yielded path appears at its end.

    Args:
        folder: the path; see `require_new`.
        option: the command's option that names it, for the error.

    Raises:
        UserError: if it is in use or cannot be written.
    """
    require_new(folder, option)
    with writes(folder):
        whole = folder.resolve()
        whole.parent.mkdir(parents=True, exist_ok=True)
        unfinished = whole.parent / f".unfinished-{os.getpid()}-{whole.name[:100]}"
        unfinished.mkdir()
        try:
            yield unfinished
            unfinished.replace(whole)  # takes the place of an empty folder
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
