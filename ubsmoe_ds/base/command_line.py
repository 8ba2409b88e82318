"""Option parsing for all commands: a mistake in an option is one line and exit code 2, like any other user error."""

import argparse
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ubsmoe_ds.base.errors import EXIT_INTERRUPTED, EXIT_UNREAD, EXIT_USER_ERROR, RowError, UserError
from ubsmoe_ds.base.terminal import guard_libraries, say

MOST = 2**31 - 1


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        """Raise the mistake as one line instead of printing the usage.

        Raises:
            UserError: always.
        """
        raise UserError(f"{message}; see --help")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Return a converter for `type=` that reads a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.removeprefix("-").isdecimal() and len(text) < 20):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} must be {least} to {most}")
        return int(text)

    return read


def positive(text: str) -> float:
    """Read a finite number above 0, for `type=`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return value


def add_show_rows(parser: argparse.ArgumentParser) -> None:
    """Add the option --show-rows, whose value `quoting_rows` takes."""
    parser.add_argument(
        "--show-rows", action="store_true", help="quote a bad row that this process reads; else only its place is named"
    )


@contextmanager
def quoting_rows(asked: bool) -> Iterator[None]:
    """Add what a bad row holds to the error that the block raises, if the user asked for it."""
    try:
        yield
    except RowError as error:
        if asked:
            raise UserError(f"{error}; it holds {error.content}") from error
        raise


def carry_out(command: Callable[[], int | None]) -> int:
    """Run a command; return its exit code. A `UserError` or Ctrl-C is one line; if nobody reads on, it ends silently.

    Args:
        command: returns its exit code, or None for 0.
    """
    guard_libraries()
    try:
        code = command()
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {error}", error=True)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        say("error: interrupted", error=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _reader_has_left(sys.stdout.fileno()):
            raise
        # what is buffered still would fail once more at the end of the program
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    return code or 0


def _reader_has_left(descriptor: int) -> bool:
    """Return whether this is a pipe from which nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)  # an error is always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))
