"""Shared by all surfaces of the fuzz: verdicts on answers, hostile values, and mutations of nested documents."""

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from ubsmoe_ds.base.errors import UserError

LONGEST = 700  # characters of a refusal
Path_ = tuple[str | int, ...]


class Violation(Exception):  # noqa: N818
    """Something happened that must not."""


class Surface(NamedTuple):
    """A part of the program that takes users' input.

    name: for --only
    cases: inputs to try
    check: (case, an empty folder) -> accepted (True) or refused (False); raises for a violation
    share: of the cases, relative to the other surfaces
    """

    name: str
    cases: st.SearchStrategy[Any]
    check: Callable[[Any, Path], bool]
    share: float = 1.0


def accepts(call: Callable[[], object], names: Collection[str] = ()) -> bool:
    """Return whether the call accepts its input; a refusal must be one line that holds one of `names`."""
    try:
        call()
    except UserError as error:
        check_line(str(error), names)
        return False
    return True


def check_line(line: str, names: Collection[str] = ()) -> None:
    """Raise `Violation` unless a refusal is one short printable line that holds one of `names`."""
    if len(line.splitlines()) != 1 or not line.isprintable():
        raise Violation(f"refusal is not one printable line: {line[:200]!r}")
    if len(line) > LONGEST:
        raise Violation(f"refusal is long, {len(line)} characters: {line[:200]!r}")
    if names and not any(name in line for name in names):
        raise Violation(f"refusal names nothing: {line!r} should name one of {sorted(names)}")


def reads_only(call: Callable[[], object], folder: Path, names: Collection[str] = ()) -> bool:
    """Return what `accepts` does; check that nothing in the folder changed, so that no code of a file left a marker."""
    before = snapshot(folder)
    answer = accepts(call, names)
    changed = before.items() ^ snapshot(folder).items()
    if changed:
        raise Violation(f"files changed: {sorted({name for name, _ in changed})}")
    return answer


def snapshot(folder: Path) -> dict[str, object]:
    """Return every file of the folder with its bytes, and every other entry with its kind."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else path.is_dir()
        for path in sorted(folder.rglob("*"))
    }


class Bomb:
    """An object that leaves a file when it is unpickled, which a pickled model must never get to do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


TEXTS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["", " ", "../x", "/etc/passwd", "a\x00b", "a\nb", "\ud800", "\u2028", "x" * 5000, "nan", "-1"]),
)
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 10**4000, -(10**30), 0.0, -0.5, 1e-300, 1e300, 1.0, 2.0]),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def places(document: Any, path: Path_ = ()) -> list[Path_]:
    """Return the path of every key and list item of a nested document."""
    items = document.items() if isinstance(document, dict) else enumerate(document)
    paths: list[Path_] = []
    for key, value in items:
        paths.append((*path, key))
        if isinstance(value, dict | list):
            paths += places(value, (*path, key))
    return paths


def mutate(document: Any, path: Path_, how: str, value: Any) -> Any:
    """Return a copy with one change at a path: replace, remove, rename, wrap in a list, or add an unknown key."""
    changed = copy.deepcopy(document)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    last = path[-1]
    if how == "replace":
        parent[last] = value
    elif how == "remove":
        del parent[last]
    elif how == "wrap":
        parent[last] = [parent[last]]
    elif isinstance(parent, dict):
        kept = parent.pop(last) if how == "rename" else 1
        parent[value if isinstance(value, str) else repr(value)[:20]] = kept
    else:
        parent.append(value)
    return changed


def mutations(document: Any, most: int = 2, values: st.SearchStrategy[Any] = VALUES) -> st.SearchStrategy[Any]:
    """Return a strategy that makes the document with a few changes."""
    hows = st.sampled_from(["replace"] * 4 + ["remove", "rename", "wrap", "add"])

    @st.composite
    def mutated(draw: st.DrawFn) -> Any:
        changed = document
        for _ in range(draw(st.integers(1, most))):
            where = places(changed)
            if where:
                changed = mutate(changed, draw(st.sampled_from(where)), draw(hows), draw(values))
        return changed

    return mutated()


def damaged(data: bytes, where: tuple[int, int], how: str, byte: int) -> bytes:
    """Return the bytes damaged as files get damaged; a place is given in 1/10,000 of the length."""
    at = len(data) * where[0] // 10_000
    end = max(at, len(data) * where[1] // 10_000)
    if how == "flip":
        return data[:at] + bytes([data[at] ^ (byte or 1)]) + data[at + 1 :] if at < len(data) else data
    if how == "cut":
        return data[:at]
    if how == "remove":
        return data[:at] + data[end:]
    if how == "zero":
        return data[:at] + bytes(end - at) + data[end:]
    return data[:at] + bytes([byte]) * 9 + data[at:]  # insert


DAMAGES = st.tuples(
    st.tuples(st.integers(0, 9999), st.integers(0, 10_000)),
    st.sampled_from(["flip", "flip", "cut", "remove", "zero", "insert"]),
    st.integers(0, 255),
)
