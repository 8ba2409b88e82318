"""Rows of two clients with sources of their own, equal to the shares that a job would deal them."""

import json
from collections.abc import Iterable
from pathlib import Path

from ubsmoe_ds.config.sections import ClientConfig, DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import load_rows

NAMES = ("a", "b")


def write(path: Path, rows: Iterable[dict]) -> str:
    """Write rows to a file; return it as a source."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"jsonl:{path}"


def write_sites(folder: Path) -> dict[str, str]:
    """Write a file of all rows, one of evaluation rows, and one of each client's share as a job deals it."""
    rows = synthetic.rows(240, seed=5)
    sources = {"all": write(folder / "all.jsonl", rows[40:]), "eval": write(folder / "eval.jsonl", rows[:40])}
    config = DataConfig(source=sources["all"], eval_source=sources["eval"], partition="dirichlet", eval_rows=24)
    common = load_rows(config, seed=0).training
    clients = [ClientConfig(name=name, budget=1.0) for name in NAMES]
    for name, share in zip(
        NAMES, partition([row["task"] for row in common], clients, config, seed=0).shares, strict=True
    ):
        sources[name] = write(folder / f"{name}.jsonl", reversed([common[number] for number in share]))
    return sources
