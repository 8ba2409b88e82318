"""Read rows of multiple-choice questions from the built-in tasks, a JSON-lines file, or the Hugging Face hub.

schema.py has the schema of a row. Nothing here imports torch, so that a bad row is reported before any process is
started.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ubsmoe_ds.base.errors import RowError, UserError
from ubsmoe_ds.base.files import open_regular, parse_json
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.schema import Row, as_cloze, checked_row

SYNTHETIC_ROWS = 4000
LONGEST_LINE = 8 * 2**20  # bytes of a row in a file
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
        rows = synthetic.rows(config.rows or SYNTHETIC_ROWS, seed)
    else:
        rows = read_rows(config.source, split="train")
    if config.eval_source is None:
        held_out = [row for row in rows if _position(row["question"], 0) < config.eval_fraction]
        train = [row for row in rows if _position(row["question"], 0) >= config.eval_fraction]
    else:
        train, held_out = rows, read_rows(config.eval_source, split="test")
    train, held_out = (_in_form(part, config.format, seed) for part in (train, held_out))
    # a held-out row has another question than all training rows, which its prompt asks
    asked = set() if config.eval_source is None else {_prompt_and_answer(row) for row in held_out}
    new = [row for row in train if _prompt_and_answer(row) not in asked]
    chosen = Rows(new[: config.rows], held_out[: config.eval_rows], Unused(0, 0, 0))
    if not chosen.training:
        raise _nothing_left(config, "training", f"{len(train) - len(new)} are evaluation rows", "give more rows")
    if not chosen.evaluation:
        raise _nothing_left(
            config, "evaluation", f"they ask {len({row['question'] for row in rows})} questions", REMEDY_EVALUATION
        )
    if is_synthetic:
        return chosen
    beyond = len(new) - len(chosen.training), len(held_out) - len(chosen.evaluation)
    return chosen._replace(unused=Unused(len(train) - len(new), *beyond))


def _in_form(rows: Sequence[Row], form: str, seed: int) -> list[Row]:
    """Return rows as `data.format` says, in an order that depends on the seed and their questions."""
    ordered = sorted(rows, key=lambda row: _position(row["question"], seed + 1))
    return [as_cloze(row) for row in ordered] if form == "cloze" else ordered


def _prompt_and_answer(row: Row) -> tuple[str, str]:
    """Return what makes a row the same as another."""
    return row["instruction"], row["answer"]


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
        state.update(json.dumps(row, sort_keys=True).encode())
    return state.hexdigest()


def evaluation_rows(source: str, count: int | None, seed: int, form: str = "instruction") -> list[Row]:
    """Read rows to evaluate on: those held out by `synthetic`, or all rows of a file or of a data set's test split.

    Args:
        source: as `data.source`.
        count: most rows wanted; None: all.
        seed: of the choice of rows.
        form: as `data.format`.

    Raises:
        UserError: as `load_rows`.
    """
    config = only_source(source)
    rows = load_rows(config, seed).evaluation if source == "synthetic" else read_rows(source, split="test")
    chosen = sorted(rows, key=lambda row: _position(row["question"], seed + 1))[:count]
    return [as_cloze(row) for row in chosen] if form == "cloze" else chosen


def only_source(source: str) -> DataConfig:
    """Return a data section with the source that a command's option --data names.

    Raises:
        UserError: if it names none.
    """
    try:
        return DataConfig(source=source)
    except ValueError as error:
        raise UserError(f"--data: {source!r} is not synthetic, jsonl:PATH or hub:NAME[@SPLIT]") from error


def read_jsonl(path: Path) -> list[Row]:
    """Read the rows of a JSON-lines file and check each.

    Raises:
        UserError: naming the file, the line and the mistake in it.
    """
    rows = []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
                if line.strip():
                    rows.append(_checked(line, f"{path}, line {number}"))
    except OSError as error:
        raise UserError(f"data: {path} cannot be read ({error.strerror}); check the path") from error
    if not rows:
        raise UserError(f"data: {path} holds no rows")
    return rows


def read_rows(source: str, split: str) -> list[Row]:
    """Read the rows of `jsonl:PATH`, `hub:NAME` (its `split`) or `hub:NAME@SPLIT`."""
    kind, _, name = source.partition(":")
    if kind == "jsonl":
        return read_jsonl(Path(name))
    # imported here: the hub is used only when the config asks for it
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    name, _, named_split = name.partition("@")
    split = named_split or split
    try:
        dataset = load_dataset(name, split=split)
    except DatasetGenerationError as error:  # quotes what could not be parsed
        raise RowError(
            f"data: hub:{name}@{split} holds rows that cannot be read ({type(error).__name__})", error
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"data: hub:{name}@{split} cannot be loaded: {message}") from error
    rows = [checked_row(dict(row), f"hub:{name}@{split}, row {number}") for number, row in enumerate(dataset, start=1)]
    if not rows:
        raise UserError(f"data: hub:{name}@{split} holds no rows")
    return rows


def _checked(line: bytes, place: str) -> Row:
    if len(line) > LONGEST_LINE:
        raise UserError(f"data: {place}: is longer than {LONGEST_LINE} bytes; write one row a line")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise RowError(f"data: {place}: is not a JSON object ({_where(error)})", error) from error
    return checked_row(row, place)


def _where(error: ValueError) -> str:
    """Return what is wrong with a JSON text, without its content."""
    if isinstance(error, json.JSONDecodeError):
        return f"column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start + 1} is no UTF-8"
    return "a key stands twice, a number is too long or not finite, or it is nested too deeply"


def _position(question: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on question and seed, to split and order rows by question."""
    digest = hashlib.blake2b(f"{seed}\n{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
