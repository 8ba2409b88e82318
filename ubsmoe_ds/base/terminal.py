"""Write to the terminal: the one place that prints. Control characters in names and values, from files that hold
anything, are escaped, so that no file moves the cursor, hides a line or renames the window.
"""

import logging
import sys
import warnings
from typing import Any


def printable(text: str) -> str:
    """Return the text with all that a terminal does not show as a character escaped, line ends and tabs too."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def lines_of(text: str) -> str:
    """Return a text of several lines, each `printable`."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, *, error: bool = False) -> None:
    """Print a text at once.

    Args:
        text: one or more lines.
        error: print to stderr, as errors, warnings and notes are.
    """
    print(lines_of(text), file=sys.stderr if error else sys.stdout, flush=True)


def guard_libraries() -> None:
    """Escape what libraries log and warn of, from now on: transformers quotes a model's config."""
    make, form = logging.getLogRecordFactory(), warnings.formatwarning
    if getattr(make, "guards", False):
        return

    def guarded(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.msg, record.args = lines_of(record.getMessage()), ()
        return record

    guarded.guards = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)
    warnings.formatwarning = lambda message, *args, **kwargs: form(lines_of(str(message)), *args, **kwargs)  # type: ignore[assignment,arg-type]
