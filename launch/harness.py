"""Run lm-evaluation-harness on trained adapters: its own command line, with `--model ubsmoe` beside its models.

    pip install '.[lm-eval]'
    python launch/harness.py run --model ubsmoe --model_args adapter=runs/tiny/adapter,k=2 --tasks arc_easy

`--model_args`: adapter, base, k, dtype, and those of the harness's `hf` that do not choose another model (batch_size,
max_length, ...). The harness fetches its tasks from the hub.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import sys
from pathlib import Path

from ubsmoe_ds.base.errors import EXIT_USER_ERROR, UserError


def main() -> int:
    """Hand over to the harness; return the exit code."""
    # the harness imports Hugging Face's `evaluate`, which this folder's evaluate.py would hide
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    try:
        from lm_eval.__main__ import cli_evaluate

        import ubsmoe_ds.adapters.lm_eval  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing; pip install '.[lm-eval]'", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
