"""Choose training and evaluation rows from the built-in tasks, files, or the Hugging Face hub.

formats.py has the forms of a row. Nothing here imports torch, so that a bad row is reported before any process is
started.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.config.formats import AUTO, CLOZE
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.files import raw_rows
from ubsmoe_ds.data.formats import format_of, read_row, renamed
from ubsmoe_ds.data.schema import Row, as_cloze, content, question_of

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

    training: list[Row]
    evaluation: list[Row]
    unused: Unused


def load_rows(config: DataConfig, seed: int) -> Rows:
    """Read training and evaluation rows; no row is in both.

    Rows are the same if their prompts and their answers are. Where evaluation rows are held out, it is by question.

    Args:
        config: the data section.
        seed: of the synthetic tasks and of the choice of rows.

    Raises:
        UserError: naming file, line and field of a bad row, or the key to change if nothing is left.
    """
    is_synthetic = config.source == "synthetic"
    if is_synthetic:
        if config.format not in (AUTO, CLOZE, "instruction"):
            raise UserError(f"data.format: {config.format!r} is not that of the synthetic rows; use auto or cloze")
        rows = synthetic.rows(config.rows or SYNTHETIC_ROWS, seed)
        rows = [as_cloze(row) for row in rows] if config.format == CLOZE else rows
    else:
        rows = read_rows(config.source, config, split="train")
    if config.eval_source is None:
        held_out = [row for row in rows if _position(question_of(row), 0) < config.eval_fraction]
        train = [row for row in rows if _position(question_of(row), 0) >= config.eval_fraction]
    else:
        train, held_out = rows, read_rows(config.eval_source, config, split="test")
    train, held_out = (
        sorted(part, key=lambda row: _position(question_of(row), seed + 1)) for part in (train, held_out)
    )
    # a held-out row has another question than all training rows, which its prompt asks
    asked = set() if config.eval_source is None else {content(row) for row in held_out}
    new = [row for row in train if content(row) not in asked]
    chosen = Rows(new[: config.rows], held_out[: config.eval_rows], Unused(0, 0, 0))
    if not chosen.training:
        raise _nothing_left(config, "training", f"{len(train) - len(new)} are evaluation rows", "give more rows")
    if not chosen.evaluation:
        raise _nothing_left(
            config, "evaluation", f"they ask {len({question_of(row) for row in rows})} questions", REMEDY_EVALUATION
        )
    if is_synthetic:
        return chosen
    beyond = len(new) - len(chosen.training), len(held_out) - len(chosen.evaluation)
    return chosen._replace(unused=Unused(len(train) - len(new), *beyond))


def _nothing_left(config: DataConfig, kind: str, why: str, remedy: str) -> UserError:
    """Return the error where a source leaves no rows of a kind."""
    return UserError(f"data.source: {config.source!r} leaves no {kind} rows ({why}); {remedy}")


def load_site(config: DataConfig, source: str, seed: int) -> Rows:
    """Read rows as `load_rows` does, with the training rows of one client's own source."""
    return load_rows(config.model_copy(update={"source": source}), seed)


def digest(rows: Sequence[Any], key: bytes = b"") -> str:
    """Return 32 hexadecimal digits that differ when the rows, their order or the key differ.

    Args:
        rows: JSON values.
        key: at most 64 bytes; whoever does not know it cannot tell which rows a digest is of.
    """
    state = hashlib.blake2b(digest_size=16, key=key)
    for row in rows:
        state.update(json.dumps(row, sort_keys=True, default=str).encode())
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
    rows = load_rows(config, seed).evaluation if source == "synthetic" else read_rows(source, config, split="test")
    return sorted(rows, key=lambda row: _position(question_of(row), seed + 1))[:count]


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


def read_rows(sources: str | Sequence[str], config: DataConfig, split: str) -> list[Row]:
    """Read the rows of one or several sources, all of one format, and check each.

    Args:
        sources: as `data.source`, without `synthetic`.
        config: how they are read.
        split: of a data set that has splits, where the source names none.

    Raises:
        UserError: naming the file, the row and the mistake in it.
    """
    rows = list(_checked(sources, config, split))
    if not rows:
        raise UserError(f"data: {sources if isinstance(sources, str) else ', '.join(sources)} holds no rows")
    return rows


def _checked(sources: str | Sequence[str], config: DataConfig, split: str) -> Iterator[Row]:
    """Yield each row, checked; the first one decides the format."""
    name = ""
    for place, raw in raw_rows(sources, split):
        if not name:
            name = format_of(renamed(raw, place, config.columns), config.format, place)
        yield read_row(raw, name, place, config.columns, cloze=config.format == CLOZE)


def _position(question: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on question and seed, to split and order rows by question."""
    digest = hashlib.blake2b(f"{seed}\n{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
