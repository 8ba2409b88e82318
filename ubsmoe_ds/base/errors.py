"""The error that a user can cause and fix, the other planned ends of a job, and the exit codes.

Any other exception is a defect or a failed machine.
"""

from ubsmoe_ds.base.terminal import printable

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3  # the numbers have gone wrong; a repetition would end in the same way
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h, "temporary failure, try again": all is saved, --resume continues
EXIT_INTERRUPTED = 130  # 128 + SIGINT, the convention of shells
EXIT_UNREAD = 141  # 128 + SIGPIPE: the reader of the output, such as `head`, has left
EXIT_TERMINATED = 143  # 128 + SIGTERM: a second signal or the end of the grace time, before all was saved
# the job has ended as it meant to, or would end in the same way again
DELIBERATE = (0, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_PREEMPTED)
LONGEST = 600  # characters of a message; it may quote names and values from files that hold anything


class UserError(Exception):
    """A mistake of the user: one line with the key, the value and the remedy. The job ends with `EXIT_USER_ERROR`."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class RowError(UserError):
    """A bad row. The message names file, line and field; what they hold is in `content` and may not leave its host."""

    def __init__(self, message: str, content: object) -> None:
        super().__init__(message)
        self.content = _one_line(repr(content))

    def adding(self, hint: str) -> "RowError":
        """Return the same error with more in its message."""
        error = RowError(f"{self}{hint}", None)
        error.content = self.content
        return error


class Preempted(Exception):  # noqa: N818  # no error: the job did as it was asked
    """The job was asked to stop and has saved a checkpoint; it ends with `EXIT_PREEMPTED`."""


class Diverged(Exception):  # noqa: N818  # as above
    """Training has gone wrong in its numbers; the job ends with `EXIT_DIVERGED`."""


class TooFewClients(Exception):  # noqa: N818  # as above
    """Fewer than `min_clients` clients are left; the job ends with `EXIT_FAILURE`."""


def _one_line(text: str) -> str:
    """Return the text as one line for a terminal: control characters escaped, the middle of a long text left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    line = printable(text)
    return line if len(line) <= LONGEST + 100 else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
