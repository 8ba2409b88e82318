"""The one error that a user can cause and mend. Anything else that is raised is a defect or a failed machine."""

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130
LONGEST = 600  # characters of a message; names and values in it come from files that may hold anything


class UserError(Exception):
    """One line that names the key, the value and what would be right; the job ends with `EXIT_USER_ERROR`."""

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(text: str) -> str:
    """What a terminal shows as one line: control characters escaped, and of a long text the beginning and the end."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= LONGEST + 100 else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
