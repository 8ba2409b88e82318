"""Choose training and evaluation rows from the built-in tasks, files, or the Hugging Face hub.

formats.py has the forms of a row. Nothing here imports torch, so that a bad row is reported before any process is
started.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.formats import AUTO, CLOZE
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.row_table import DIGEST, RowTable, read_table, table_of
from ubsmoe_ds.data.schema import Row, as_cloze
from ubsmoe_ds.data.stored import Alone, Sharing, texts_of

SYNTHETIC_ROWS = 4000
REMEDY_EVALUATION = "raise data.eval_fraction or set data.eval_source"


class Unused(NamedTuple):
    """Count rows of a source that a run does not use.

    evaluated: training rows that are evaluation rows too; beyond_rows, beyond_eval_rows: those over these settings.
    The synthetic tasks have none: their rows are made as they are needed.
    """

    evaluated: int
    beyond_rows: int
    beyond_eval_rows: int


class Rows(NamedTuple):
    """Training and evaluation rows, in an order that depends on the seed only, and how many others there are."""

    training: Sequence[Row]
    evaluation: Sequence[Row]
    unused: Unused


class Chosen(NamedTuple):
    """The same, with what training rows are dealt by."""

    training: RowTable
    evaluation: Sequence[Row]
    unused: Unused


def load_rows(config: DataConfig, seed: int) -> Rows:
    """Read training and evaluation rows as `choose` does, in a process of its own."""
    chosen = choose(config, seed)
    return Rows(chosen.training.rows, *chosen[1:])


def choose(config: DataConfig, seed: int, sharing: Sharing | None = None) -> Chosen:
    """Read training and evaluation rows; no row is in both.

    Rows are the same if their prompts and their answers are. Where evaluation rows are held out, it is by question.

    Args:
        config: the data section.
        seed: of the synthetic tasks and of the choice of rows.
        sharing: with whom many rows are shared; None: with nobody.

    Raises:
        UserError: naming file, line and field of a bad row, or the key to change if nothing is left.
    """
    sharing, is_synthetic = sharing or Alone(), config.source == "synthetic"
    if is_synthetic:
        rows = table_of(_synthetic(config, seed), "instruction", seed)
    else:
        rows = read_table(config.source, config, "train", seed, sharing)
    if config.eval_source is None:
        is_held_out_N = rows.columns.hold_out_N < config.eval_fraction
        train, held_out = (rows.select(np.flatnonzero(part)) for part in (~is_held_out_N, is_held_out_N))
    else:
        train, held_out = rows, read_table(config.eval_source, config, "test", seed, sharing)
    train, held_out = train.ordered(), held_out.ordered()
    new_N = np.arange(len(train))  # a held-out row has another question than all training rows, which its prompt asks
    if config.eval_source is not None:
        new_N = np.flatnonzero(~np.isin(train.columns.same_N, held_out.columns.same_N))
    training = train.select(new_N[: config.rows])
    evaluation = list(held_out.rows_at(np.arange(len(held_out))[: config.eval_rows]))
    evaluated = len(train) - len(new_N)
    if not len(training):
        raise _nothing_left(config, "training", f"{evaluated} are evaluation rows", "give more rows")
    if not evaluation:
        asked = f"they ask {len(np.unique(rows.columns.hold_out_N))} questions"
        raise _nothing_left(config, "evaluation", asked, REMEDY_EVALUATION)
    if is_synthetic:
        return Chosen(training, evaluation, Unused(0, 0, 0))
    return Chosen(training, evaluation, Unused(evaluated, len(new_N) - len(training), len(held_out) - len(evaluation)))


def _synthetic(config: DataConfig, seed: int) -> list[Row]:
    """Make rows of the built-in tasks."""
    if config.format not in (AUTO, CLOZE, "instruction"):
        raise UserError(f"data.format: {config.format!r} is not that of the synthetic rows; use auto or cloze")
    rows = synthetic.rows(config.rows or SYNTHETIC_ROWS, seed)
    return [as_cloze(row) for row in rows] if config.format == CLOZE else rows


def _nothing_left(config: DataConfig, kind: str, why: str, remedy: str) -> UserError:
    """Return the error where a source leaves no rows of a kind."""
    return UserError(f"data.source: {config.source!r} leaves no {kind} rows ({why}); {remedy}")


def digest(rows: Sequence[Any], key: bytes = b"") -> str:
    """Return 32 hexadecimal digits that differ when the rows, their order or the key differ.

    Args:
        rows: JSON values.
        key: at most 64 bytes; whoever does not know it cannot tell which rows a digest is of.
    """
    return digest_of([rows], key)


def digest_of(parts: Iterable[Sequence[Any]], key: bytes = b"") -> str:
    """Return the digest of several sequences of rows, one after another."""
    state = hashlib.blake2b(digest_size=DIGEST, key=key)
    for rows in parts:
        for text in texts_of(rows):
            state.update(text)
    return state.hexdigest()


def evaluation_rows(
    source: str, count: int | None, seed: int, form: str = AUTO, columns: Mapping[str, str] | None = None
) -> list[Row]:
    """Read rows to evaluate on: those held out by `synthetic`, or all rows of a file or of a data set's test split.

    Args:
        source: as `data.source`.
        count: most rows wanted; None: all.
        seed: of the choice of rows.
        form, columns: as `data.format` and `data.columns`.

    Raises:
        UserError: as `load_rows`.
    """
    config = only_source(source).model_copy(update={"format": form, "columns": dict(columns or {})})
    if source == "synthetic":
        return list(load_rows(config, seed).evaluation)[:count]
    rows = read_table(source, config, "test", seed, Alone()).ordered().rows
    return list(rows[: len(rows) if count is None else count])


def only_source(source: str) -> DataConfig:
    """Return a data section with the source that a command's option --data names.

    Raises:
        UserError: if it names none.
    """
    try:
        return DataConfig(source=source)
    except ValueError as error:
        raise UserError(
            f"--data: {source!r} is not synthetic, a path, jsonl:PATH or hub:OWNER/NAME[/SUBSET][@SPLIT]"
        ) from error
