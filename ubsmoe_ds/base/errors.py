"""The one error that a user can cause and mend, how a job may end otherwise, and what the program's exit codes mean.

Any exception but these is a defect or a failed machine.
"""

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "temporary failure, try again"; all is saved, resume goes on
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_TERMINATED = 143  # 128 + SIGTERM: a second signal or the end of the grace time, before all was saved
LONGEST = 600  # characters of a message; names and values in it come from files that may hold anything


class UserError(Exception):
    """One line that names the key, the value and what would be right; the job ends with `EXIT_USER_ERROR`."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


class Preempted(Exception):  # noqa: N818  # no error: the job did what it was asked
    """The job was asked to stop, and has saved a checkpoint to go on from; it ends with `EXIT_PREEMPTED`."""


class TooFewClients(Exception):  # noqa: N818  # as above
    """So many clients are lost that the rest may not go on; the job ends with `EXIT_FAILURE`."""


def _one_line(text: str) -> str:
    """What a terminal shows as one line: control characters escaped, and of a long text the beginning and the end."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST + 100 else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
