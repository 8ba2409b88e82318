"""Expand `~` and environment variables in the paths of an experiment, as a shell would. Imports no torch."""

import os
import re
from pathlib import Path

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def expand(text: str) -> str:
    """Return a path with `~`, `$NAME` and `${NAME}` replaced.

    Raises:
        ValueError: for a variable that is not set or a home that is not known, else a folder of that name is made.
    """
    for match in VARIABLE.finditer(text):
        name = match[1] or match[2]
        if name not in os.environ:
            raise ValueError(f"{text!r} names the variable {name}, which is not set; set it, or write the path")
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except RuntimeError as error:
            raise ValueError(f"{text!r} names a home folder that is not known; write the path") from error
    return os.path.expandvars(text)


# of files of rows; each may be followed by an ending of PACKED
ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
# hub:OWNER/NAME, hub:OWNER/NAME/SUBSET, and a split after @; an old data set without owner has no subset here
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,2}(@[\w.\[\]:%+-]+)?")


def check_source(text: str, *, synthetic: bool) -> str:
    """Return a data source, its path expanded.

    Args:
        text: the key's value.
        synthetic: whether the built-in rows are meant by `synthetic`.

    Raises:
        ValueError: if it is none, with what to write.
    """
    kind, _, rest = text.partition(":")
    if (synthetic and text == "synthetic") or (kind == "hub" and HUB_NAME.fullmatch(rest)):
        return text
    if kind == "jsonl" and rest:
        return "jsonl:" + expand(rest)
    if _is_path(text):
        return expand(text)
    options = [f"the path of a file ({' '.join(ENDINGS)}) or folder", "hub:OWNER/NAME[/SUBSET][@SPLIT]"]
    if HUB_NAME.fullmatch(text):
        options = [f"./{text} for a folder of rows", f"hub:{text} for a data set of the hub"]
    raise ValueError(f"{text!r} is not valid: write {', '.join([*options, *(['synthetic'] if synthetic else [])])}")


def _is_path(text: str) -> bool:
    """Return whether a text without prefix is meant as a path: by its look, or because it exists."""
    whole = text.lower()
    for packed in PACKED:
        whole = whole.removesuffix(packed)
    if whole.endswith(ENDINGS) or text.startswith(("/", "./", "../", "~", "$")) or any(sign in text for sign in "*?["):
        return "://" not in text
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False
