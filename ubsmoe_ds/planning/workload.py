"""How long the rows of an experiment are: its data read, dealt and tokenised as a run does, but nothing computed."""

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

from ubsmoe_ds.config.experiment import Experiment
from ubsmoe_ds.data.batches import Example, PackedRow, encode, pack, steps
from ubsmoe_ds.data.partition import partition
from ubsmoe_ds.data.sources import Row, load_rows, load_site
from ubsmoe_ds.models.hf_config import check_length, check_window, read_config
from ubsmoe_ds.models.tokenizer import read_tokenizer
from ubsmoe_ds.planning.plan import Workload

MOST_STEPS = 1000  # of a client that are looked at


def workloads(exp: Experiment) -> list[Workload]:
    """Of each client, from the very batches that it will get.

    Raises:
        UserError: for rows, lengths or a tokenizer that a run would refuse too.
    """
    model = read_config(exp.model_dir)
    tokenizer = read_tokenizer(exp.model_dir, model.vocab_size)
    check_length(model, exp.data.max_length, "data.max_length")
    sources = [client.source for client in exp.clients if client.source is not None]
    if sources:
        of_client, evaluations = zip(*(load_site(exp.data, source, exp.seed) for source in sources), strict=True)
        eval_rows, read_bytes = evaluations[0], [_bytes(rows) for rows in of_client]  # a rank reads its site's rows
    else:
        train_rows, eval_rows = load_rows(exp.data, exp.seed)
        shares = partition([row["task"] for row in train_rows], exp.clients, exp.data, exp.seed)
        of_client = tuple([train_rows[i] for i in share] for share in shares)
        read_bytes = [_bytes(train_rows)] * len(shares)
    packed = pack(eval_rows, tokenizer, exp.data.max_length)
    check_window(model, max(row.longest for row in packed))
    evaluation = _of_evaluation(packed, exp.evaluation.batch_size)
    found = []
    for number, rows in enumerate(of_client):
        examples, _ = encode(rows, tokenizer, exp.data.max_length)
        training = _of_training(exp, number, examples, tokenizer.pad_token_id)
        text = read_bytes[number] + _bytes(eval_rows)
        found.append(Workload(**training, **evaluation, text_bytes=text))
    return found


def _bytes(rows: Sequence[Row]) -> int:
    return sum(len(json.dumps(row)) for row in rows)


def _of_training(exp: Experiment, number: int, examples: Sequence[Example], pad: int) -> dict[str, Any]:
    ranks, micro = exp.clients[number].ranks, exp.deepspeed.gradient_accumulation_steps
    count = min(MOST_STEPS, exp.train.rounds * exp.train.local_steps)
    lengths, answers = [], []
    for rank in range(ranks):
        batches = steps(
            examples,
            batch_size=exp.deepspeed.train_batch_size,
            micro_batches=micro,
            rank=rank,
            ranks=ranks,
            pad=pad,
            seed=(exp.seed, number),
        )
        for batch in islice(batches, count):
            lengths += [tokens.input_ids.shape[1] for tokens in batch.micro]
            answers += [len(tokens.target_A) / len(tokens.input_ids) for tokens in batch.micro]
    means = {"mean_length": sum(lengths) / len(lengths), "mean_answers": sum(answers) / len(answers)}
    return {"length": max(lengths), "answers": max(answers), **means}


def _of_evaluation(packed: Sequence[PackedRow], batch_size: int) -> dict[str, Any]:
    order = sorted(packed, key=len)  # as `Evaluator` takes them
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [sum(sum(row.parts()) for row in batch) / len(batch) for batch in batches]
    padded = sum(len(batch) * len(batch[-1]) for batch in batches)
    return {
        "eval_length": len(order[-1]),
        "eval_answers": max(answers),
        "eval_mean_length": padded / len(order),
        "eval_rows": len(order),
    }
