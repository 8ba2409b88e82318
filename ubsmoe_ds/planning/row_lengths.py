"""Measure the lengths of an experiment's rows: read, dealt and tokenised as in a run, but nothing is computed."""

import json
import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example
from ubsmoe_ds.data.encoding import Encoder, read_encoder
from ubsmoe_ds.data.evaluation_rows import PackedRow
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.shares import has_sources, rows_by_client
from ubsmoe_ds.data.stored import StoredRows
from ubsmoe_ds.planning.inputs import RowLengths

MOST_STEPS = 1000  # steps of a client that are measured


def read_row_lengths(exp: Experiment) -> list[RowLengths]:
    """Return the lengths of each client's rows, from the very batches that it will get.

    Raises:
        UserError: for rows, lengths or a tokenizer that a run would refuse too.
    """
    encoder = read_encoder(exp)
    client_rows, eval_rows = rows_by_client(exp)
    # a rank reads the rows of its site, or all common rows
    text_bytes = [_bytes(rows.training) for rows in client_rows]
    read_bytes = text_bytes if has_sources(exp.clients) else [sum(text_bytes)] * len(text_bytes)
    common = encoder.pack(eval_rows) if eval_rows else []
    lengths = []
    for number, rows in enumerate(client_rows):
        examples, _ = encoder.encode(rows.training, exp.clients[number].name)
        training = _training_lengths(encoder, number, examples)
        own = encoder.pack(rows.evaluation) if rows.evaluation else []
        evaluation = _evaluation_lengths(common + own, exp.evaluation.batch_size)
        read = read_bytes[number] + _bytes(eval_rows) + _bytes(rows.evaluation)
        lengths.append(RowLengths(**training, **evaluation, text_bytes=read, rows=len(examples), own_rows=len(own)))
    return lengths


def _bytes(rows: Sequence[Row]) -> int:
    """Return the bytes of rows that a rank holds in memory; those in a file are mapped."""
    return 0 if isinstance(rows, StoredRows) else sum(len(json.dumps(row)) for row in rows)


def _training_lengths(encoder: Encoder, number: int, examples: Sequence[Example]) -> dict[str, Any]:
    exp, config = encoder.exp, encoder.exp.clients[number]
    count = min(MOST_STEPS, exp.train.rounds * exp.local_steps(config, len(examples)))
    rows = exp.settings(config).train_batch_size // (config.ranks * exp.settings(config).gradient_accumulation_steps)
    shapes, answers = [], []  # of micro-batches
    for rank in range(config.ranks):
        for batch in islice(encoder.steps(examples, number, config, rank), count):
            shapes += [tuple(tokens.input_ids.shape) for tokens in batch.micro]
            answers += [len(tokens.target_A) for tokens in batch.micro]
    sequences, length = max(shapes, key=math.prod)
    return {
        "length": length,
        "answers": max(answers) / sequences,
        "mean_length": sum(map(math.prod, shapes)) / len(shapes) / rows,
        "mean_answers": sum(answers) / len(answers) / rows,
        "sequences": sequences / rows,
        "mean_context": sum(length for _, length in shapes) / len(shapes),
    }


def _evaluation_lengths(packed: Sequence[PackedRow], batch_size: int) -> dict[str, Any]:
    order = sorted(packed, key=len)  # as `Evaluator` batches them
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [sum(sum(row.parts()) for row in batch) / len(batch) for batch in batches]
    padded = sum(len(batch) * len(batch[-1]) for batch in batches)
    return {
        "eval_length": len(order[-1]),
        "eval_answers": max(answers),
        "eval_mean_length": padded / len(order),
        "eval_rows": len(order),
    }
