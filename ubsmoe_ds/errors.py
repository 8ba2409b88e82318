"""The one error that a user can cause and mend. Anything else that is raised is a defect or a failed machine."""

EXIT_USER_ERROR = 2
EXIT_FAILURE = 1
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """One line that names the key, the value and what would be right; the job ends with `EXIT_USER_ERROR`."""
