"""Read rows of multiple-choice questions from the built-in tasks, a JSON-lines file, or the Hugging Face hub.

Schema of a row: task (str), id (str), instruction (str, the prompt), answer (str), question (str),
choices (list of str), labels (list of str, how an answer names each choice), label (index of the right choice).
`answer` contains `labels[label]` as a separate word (words.py). A row's other options are `answer` with the last such
word replaced by another label. Texts are in NFC. Nothing here imports torch, so that a bad row is reported before any
process is started.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.base.files import open_regular, parse_json
from ubsmoe_ds.config.sections import DataConfig
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.words import nfc, occurrences

TEXT_FIELDS = ("task", "id", "instruction", "answer", "question")
SYNTHETIC_ROWS = 4000
LONGEST_LINE = 8 * 2**20  # bytes of a row in a file
REMEDY_EVALUATION = "raise data.eval_fraction or set data.eval_source"
Row = dict[str, Any]


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
    return [as_cloze(row) if form == "cloze" else dict(row) for row in ordered]


def _prompt_and_answer(row: Row) -> tuple[str, str]:
    """Return what makes a row the same as another."""
    return row["instruction"], row["answer"]


def _nothing_left(config: DataConfig, kind: str, why: str, remedy: str) -> UserError:
    """Return the error where a source leaves no rows of a kind."""
    return UserError(f"data.source: {config.source!r} leaves no {kind} rows ({why}); {remedy}")


def load_site(config: DataConfig, source: str, seed: int) -> Rows:
    """Read rows as `load_rows` does, with the training rows of one client's own source."""
    return load_rows(config.model_copy(update={"source": source}), seed)


def digest(rows: Sequence[Any]) -> str:
    """Return 32 hexadecimal digits that differ when the rows or their order differ."""
    state = hashlib.blake2b(digest_size=16)
    for row in rows:
        state.update(json.dumps(row, sort_keys=True).encode())
    return state.hexdigest()


def as_cloze(row: Row) -> Row:
    """Return the row as a cloze: the question alone, answered by the text of a choice, for models without instructions.

    A choice that a row holds twice is one option.

    Raises:
        UserError: naming the row, if all its choices are the same.
    """
    choices = list(dict.fromkeys(row["choices"]))
    if len(choices) == 1:
        raise UserError(
            f"data: row {row['id']!r} of {row['task']!r} offers {choices[0]!r} alone; a cloze row needs two"
        )
    answer = row["choices"][row["label"]]
    changed = {"instruction": f"Question: {row['question']}\nAnswer:", "answer": answer}
    return row | changed | {"choices": choices, "labels": choices, "label": choices.index(answer)}


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
    from datasets.exceptions import DatasetsError

    name, _, named_split = name.partition("@")
    split = named_split or split
    try:
        dataset = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"data: hub:{name}@{split} cannot be loaded: {message}") from error
    rows = [_checked_row(dict(row), f"hub:{name}@{split}, row {number}") for number, row in enumerate(dataset, start=1)]
    if not rows:
        raise UserError(f"data: hub:{name}@{split} holds no rows")
    return rows


def _checked(line: bytes, where: str) -> Row:
    if len(line) > LONGEST_LINE:
        raise UserError(f"data: {where}: is longer than {LONGEST_LINE} bytes; write one row a line")
    try:
        row = parse_json(line)
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        raise UserError(f"data: {where}: is not a JSON object ({error})") from error
    return _checked_row(row, where)


def _checked_row(row: Any, where: str) -> Row:
    """Return the row if it has the schema, else raise with one line that names the wrong field."""
    if not isinstance(row, dict):
        raise UserError(f"data: {where}: is a {type(row).__name__}, must be an object with the fields of a row")
    for field in TEXT_FIELDS:
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise UserError(f"data: {where}: field {field!r} is {row.get(field)!r}, must be a text")
    for field in ("choices", "labels"):
        if (
            not isinstance(row.get(field), list)
            or not row[field]
            or not all(isinstance(v, str) and v for v in row[field])
        ):
            raise UserError(f"data: {where}: field {field!r} is {row.get(field)!r}, must be a list of texts")
    if len(row["choices"]) != len(row["labels"]):
        raise UserError(f"data: {where}: has {len(row['choices'])} choices but {len(row['labels'])} labels")
    if len(row["labels"]) < 2:
        raise UserError(f"data: {where}: field 'labels' is {row['labels']}, must hold at least two")
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(row["labels"]):
        raise UserError(f"data: {where}: field 'label' is {label!r}, must be 0 to {len(row['labels']) - 1}")
    row |= {field: nfc(row[field]) for field in TEXT_FIELDS}
    row |= {field: [nfc(text) for text in row[field]] for field in ("choices", "labels")}
    if len(set(row["labels"])) != len(row["labels"]):
        raise UserError(f"data: {where}: field 'labels' is {row['labels']}, must not repeat a label")
    if not occurrences(row["labels"][label], row["answer"]):
        raise UserError(
            f"data: {where}: field 'answer' is {row['answer']!r}, must contain {row['labels'][label]!r} as a word"
        )
    for field in (*TEXT_FIELDS, "choices", "labels"):
        try:
            "".join(row[field]).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"data: {where}: field {field!r} is {row[field]!r}, no valid Unicode") from error
    return row


def _position(question: str, seed: int) -> float:
    """Return a number in [0, 1) that depends only on question and seed, to split and order rows by question."""
    digest = hashlib.blake2b(f"{seed}\n{question}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
