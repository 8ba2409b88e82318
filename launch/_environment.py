"""Say in one line what this Python lacks. Commands import this first; it needs the standard library alone."""

import sys
from importlib.util import find_spec

NEEDED = ("ubsmoe_ds", "torch", "deepspeed", "mpi4py")
EXIT_USER_ERROR = 2  # as in ubsmoe_ds/base/errors.py, which may not be there

missing = [name for name in NEEDED if find_spec(name) is None]
if missing:
    verb = "is" if len(missing) == 1 else "are"
    print(
        f"error: {', '.join(missing)} {verb} not installed in this Python ({sys.executable}); run `make setup`, then "
        "`source .venv/bin/activate`",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)
