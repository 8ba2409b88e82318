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


def expand_source(text: str) -> str:
    """Return a data source with its path expanded, where it is `jsonl:PATH`; raise as `expand` does."""
    return "jsonl:" + expand(text.removeprefix("jsonl:")) if text.startswith("jsonl:") else text


def check_source(text: str, *, synthetic: bool) -> str:
    """Return a data source, its path expanded.

    Args:
        text: the key's value.
        synthetic: whether the built-in rows are meant by `synthetic`.

    Raises:
        ValueError: if it is none, with what to write.
    """
    kind, _, rest = text.partition(":")
    if (kind in ("jsonl", "hub") and rest) or (synthetic and text == "synthetic"):
        return expand_source(text)
    options = ["jsonl:PATH for a file of rows", "hub:NAME[@SPLIT] for a data set of the hub"]
    if ":" not in text and text:
        options[0] = f"jsonl:{text} for a file of rows"
        options[1] = f"hub:{text} for a data set of the hub" if "." not in text else options[1]
    raise ValueError(f"{text!r} is not valid: write {', '.join([*options, *(['synthetic'] if synthetic else [])])}")
