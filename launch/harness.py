"""Run lm-evaluation-harness on trained adapters: its own command line, with `--model ubsmoe` beside its models.

    pip install '.[lm-eval]'
    python launch/harness.py run --model ubsmoe --model_args adapter=runs/tiny/adapter,k=2 --tasks arc_easy

`--model_args`: adapter, base, k, dtype, and those of the harness's `hf` that do not choose another model (batch_size,
max_length, ...). The harness fetches its tasks from the hub.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import sys
from importlib.util import find_spec
from pathlib import Path

from ubsmoe_ds.base.command_line import carry_out
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.terminal import say


def main() -> int:
    """Hand over to the harness; return the exit code."""
    # the harness imports Hugging Face's `evaluate`, which this folder's evaluate.py would hide
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    return carry_out(hand_over)


def hand_over() -> None:
    """Run the harness's own command line, which knows our model too.

    Raises:
        UserError: if the harness is not installed, and for our own arguments.
    """
    if find_spec("lm_eval") is None and {"-h", "--help"} & set(sys.argv[1:]):
        say(f"{__doc__}\nThe harness's own options are shown where it is installed.")
        return
    try:
        from lm_eval.__main__ import cli_evaluate

        import ubsmoe_ds.adapters.lm_eval  # noqa: F401 - registers the model
    except ModuleNotFoundError as error:
        raise UserError(f"harness: {error.name} is missing; pip install '.[lm-eval]'") from error
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
