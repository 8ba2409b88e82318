"""Measure how well each pseudo-gradient (PG) estimator fits a model: its gradients against the dense model's.

    python launch/fidelity.py --config ds_configs/compare_tiny.yaml --out results/fidelity
    python launch/fidelity.py --config my.yaml model.path=FOLDER --ks 1 2 4 --steps 40

Runs the experiment's first client alone, in one process. It trains `--steps` steps, so that the adapters are no longer
zero, and measures on the training rows that follow. The moments of `linearised` are pooled over the K of the
experiment's clients, as in a federation.
Exit codes: 0 done, 2 a mistake in config or data.
"""

if __name__ == "__main__":
    import _environment  # noqa: F401

import argparse
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from ubsmoe_ds.base.command_line import Parser, add_show_rows, carry_out, quoting_rows, whole
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import replace_files
from ubsmoe_ds.base.terminal import say
from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.config.loading import load_experiment

CALIBRATION_STEPS = 8  # their rows give the moments of `linearised`


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key of the experiment")
    parser.add_argument("--config", required=True, help="experiment (YAML)")
    parser.add_argument("--ks", nargs="+", type=whole(1), help="active experts; default 1, 2, 4, ... K_max")
    parser.add_argument("--steps", type=whole(0), default=20, help="optimiser steps before measuring")
    parser.add_argument("--batches", type=whole(1), default=8, help="batches to measure on, each the rows of one step")
    parser.add_argument("--out", type=Path, help="folder for fidelity.md, fidelity.csv and fidelity.png")
    add_show_rows(parser)
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Measure and print; with --out also write. Returns the exit code."""
    return carry_out(lambda: measure(parse(sys.argv[1:])))


def measure(options: argparse.Namespace) -> None:
    """Measure, print, and write if asked.

    Raises:
        UserError: for a mistake in config, data or options, and if the folder cannot be written.
    """
    exp = load_experiment(options.config, options.overrides)
    ks = options.ks or [2**i for i in range(exp.k_max.bit_length()) if 2**i <= exp.k_max]
    check(exp, ks)
    with quoting_rows(options.show_rows):
        table, bias = report(exp, ks, options.steps, options.batches)
    from ubsmoe_ds.studies.fidelity_report import markdown, picture

    text = markdown(table, bias, shlex.join(["python", *sys.argv]), exp)
    say(text)
    if options.out is None:
        return
    whole = table.merge(bias, on=["k", "estimator"])
    contents: dict[str, Callable[[Path], object]] = {
        "fidelity.md": lambda path: path.write_text(text + "\n", encoding="utf-8"),
        "fidelity.csv": partial(whole.to_csv, index=False, float_format="%.5g"),
        "fidelity.png": partial(picture(table, bias).savefig, dpi=120),
    }
    replace_files(options.out, contents)


def check(exp: Experiment, ks: list[int]) -> None:
    """Check the numbers of active experts, before anything is loaded.

    Raises:
        UserError: for one out of range.
    """
    for k in ks:
        if k > exp.num_experts:
            raise UserError(f"--ks: {k} must lie between 1 and the model's {exp.num_experts} experts")


def report(exp: Experiment, ks: list[int], steps: int, batches: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (summary, bias) over all K; see studies/fidelity.py."""
    client, batches_from = start(single_client(exp))
    # these import DeepSpeed, which reads the environment that `start` has set
    from ubsmoe_ds.client.engine import LocalProgress
    from ubsmoe_ds.studies import fidelity

    if steps:
        client.begin_round()
        client.train(batches_from(), LocalProgress(), steps, lambda: False)
    total = 0
    for k in {exp.active_experts(config) for config in exp.clients}:
        client.k = k
        client.calibrate(batches_from(), CALIBRATION_STEPS)
        total += client.moments.sums()
    client.moments.update(total)
    tables: list[pd.DataFrame] = []
    biases: list[pd.DataFrame] = []
    for k in ks:
        measured = fidelity.measure(client, batches_from(first=steps), k, fidelity.COMPARED, batches)
        tables.append(fidelity.summary(measured, k))
        biases.append(fidelity.bias(measured, k))
    return pd.concat(tables, ignore_index=True), pd.concat(biases, ignore_index=True)


def single_client(exp: Experiment) -> Experiment:
    """Return the experiment with its first client alone on one rank; nothing is dropped or rescaled."""
    alone = exp.clients[0].model_copy(update={"ranks": 1, "expert_parallel": 1, "capacity_factor": None})
    router = exp.router.model_copy(update={"gate_rescale": "none"})
    estimator = exp.pseudo_gradient.model_copy(update={"estimator": "linearised"})  # so that moments are kept
    sections = {"clients": [alone], "groups": None, "sampling": None, "router": router, "pseudo_gradient": estimator}
    return exp.model_copy(update=sections)


def start(exp: Experiment) -> tuple[Any, Any]:
    """Start the client of a one-client experiment in this process.

    Returns:
        (client, function that yields its batches from a given step on).
    """
    from ubsmoe_ds import run
    from ubsmoe_ds.mpi.join import join

    place = join(exp, sys.argv[0], sys.argv[1:])
    devices = run.choose_accelerator(exp.accelerator)
    import datasets
    from transformers.utils import logging as transformers_logging

    from ubsmoe_ds.client.deepspeed_setup import start_deepspeed
    from ubsmoe_ds.client.engine import Client
    from ubsmoe_ds.data.encoding import read_encoder
    from ubsmoe_ds.data.lengths import length_lines
    from ubsmoe_ds.data.shares import rows_by_client

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    (rows,), _ = rows_by_client(exp)
    encoder = read_encoder(exp)
    examples, lengths = encoder.encode(rows.training, exp.clients[0].name)
    for line in length_lines(f"data.max_length={exp.data.max_length}", "training", lengths, overlong=exp.data.overlong):
        say(line)
    start_deepspeed(bool(devices), verbose=False)
    client = Client(exp, exp.clients[0], place.group_rank)
    return client, partial(encoder.steps, examples, 0, exp.clients[0])


if __name__ == "__main__":
    sys.exit(main())
