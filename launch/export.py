"""Merge an adapter of a run into its base model and write plain Hugging Face weights.

    python launch/export.py --adapter runs/tiny/adapter --merge merged
    python launch/export.py --adapter runs/tiny/adapter/clients/phone --merge phone --base FOLDER

The result is read by transformers and every program that reads its models. It computes what the adapter computes under
PEFT: the model at phi = 0 without the gate's learned scale, at the K of its config. A note names what is lost.

Exit codes: 0 done, 2 a mistake in the arguments or files.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import sys
from pathlib import Path

from ubsmoe_ds.base.command_line import Parser, carry_out
from ubsmoe_ds.base.terminal import say


def main() -> int:
    """Merge; return the exit code."""
    return carry_out(lambda: export(parse(sys.argv[1:])))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, type=Path, help="folder of an adapter")
    parser.add_argument("--merge", required=True, type=Path, metavar="OUT", help="new folder for the merged model")
    parser.add_argument("--base", help="model folder, or as in model.path; default: the one the adapter was trained on")
    return parser.parse_args(arguments)


def export(options: argparse.Namespace) -> None:
    """Read the adapter, write the merged model, and print what is lost."""
    from ubsmoe_ds.adapters.adapter import read_adapter
    from ubsmoe_ds.adapters.merged import write_merged
    from ubsmoe_ds.models.families import read_facts

    state, _, scaling, base, facts = read_adapter(options.adapter, options.base)
    lost = []
    if any(bool(value.any()) for name, value in state.items() if name.endswith(".phi")):
        lost.append("phi (the modulation of the routing)")
    if facts.get("gate_rescale", "none") != "none":
        lost.append("the gate's learned scale")
    family, config = read_facts(base)
    default = config["num_experts_per_tok"]
    if facts.get("k", str(default)) != str(default):
        lost.append(f"K = {facts['k']} (set {family.active}; it is {default} in the config)")
    write_merged(base, state, scaling, options.merge, whole=bool(facts))
    if lost:
        say(f"note: plain weights have no place for {', '.join(lost)}", error=True)
    say(f"written to {options.merge}")


if __name__ == "__main__":
    sys.exit(main())
