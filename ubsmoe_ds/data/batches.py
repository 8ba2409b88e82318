"""Build token batches for training and evaluation. Loss and scores are on answer tokens only.

Rows are padded on the right to the longest row of the whole step, so that all ranks of a client, and all micro-batches
of a step, have equal token counts. Shapes: B rows, S positions, A answer positions.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.data.lengths import CUT_PROMPT, Lengths, fit, fit_row
from ubsmoe_ds.data.packing import share_out
from ubsmoe_ds.data.sources import Row
from ubsmoe_ds.data.tokenizing import beginning, text_tokens
from ubsmoe_ds.data.words import occurrences


class Tokens(NamedTuple):
    """A padded batch: input_ids [B, S] int64, used [B, S] bool, answer positions b * S + s [A], their targets [A].

    branch_BS: for rows with several continuations of one beginning, 0 in the beginning and n in the nth continuation,
    which attends to the beginning and itself; None where rows are plain texts.
    position_BS: for sequences of several rows (packing.py), each token's position in its row; 0 where a row begins, and
    where padding does. A row attends to itself alone. None where a sequence is a row.
    """

    input_ids: Tensor
    used: Tensor
    position_A: Tensor
    target_A: Tensor
    branch_BS: Tensor | None = None
    position_BS: Tensor | None = None

    def to(self, device: torch.device) -> "Tokens":
        """Return the batch on another device."""
        return Tokens._make(None if part is None else part.to(device, non_blocking=True) for part in self)


@dataclass(frozen=True)
class Example:
    """One row's tokens: the prompt, then the answer, which ends with the end-of-text token unless its end is cut."""

    prompt: list[int]
    answer: list[int]

    def __len__(self) -> int:
        """Return the number of tokens to run: the last one is only predicted."""
        return len(self.prompt) + len(self.answer) - 1


def encode(
    rows: Sequence[Row], tokenizer: Any, max_length: int, overlong: str = CUT_PROMPT
) -> tuple[list[Example], Lengths]:
    """Tokenise rows of at most `max_length` tokens each, by the rule of `lengths.fit_row`.

    Returns:
        (examples of the rows that are kept, numbers of rows kept, cut and dropped).
    """
    prompts = text_tokens([row["instruction"] + "\n" for row in rows], tokenizer, rows, "instruction")
    replies = text_tokens([row["answer"] for row in rows], tokenizer, rows, "answer")
    begin, examples, cut = beginning(tokenizer), [], 0
    for prompt, reply in zip(prompts, replies, strict=True):
        answer = [*reply, tokenizer.eos_token_id]
        parts = fit_row(begin, prompt, answer, max_length, overlong)
        if parts is not None:
            cut += len(parts[0]) + len(parts[1]) < len(begin) + len(prompt) + len(answer)
            examples.append(Example(*parts))
    return examples, Lengths(len(examples), cut, len(rows) - len(examples))


def collate(examples: Sequence[Example], pad: int, length: int | None = None) -> Tokens:
    """Return a batch padded to `length` (default: the longest row).

    Targets are the answer tokens, at the positions that predict them.
    """
    length = length or max(map(len, examples))
    ids = torch.full((len(examples), length), pad, dtype=torch.int64)
    used = torch.zeros(len(examples), length, dtype=torch.bool)
    positions: list[int] = []
    for b, example in enumerate(examples):
        sequence = example.prompt + example.answer[:-1]
        ids[b, : len(sequence)] = torch.tensor(sequence)
        used[b, : len(sequence)] = True
        first = b * length + len(example.prompt) - 1
        positions.extend(range(first, first + len(example.answer)))
    targets = [token for example in examples for token in example.answer]
    return Tokens(ids, used, torch.tensor(positions), torch.tensor(targets))


def collate_sequences(sequences: Sequence[Sequence[Example]], pad: int, length: int) -> Tokens:
    """Return sequences of rows as a batch, padded to `length`; see `Tokens.position_BS`."""
    ids_BS = torch.full((len(sequences), length), pad, dtype=torch.int64)
    used_BS = torch.zeros(len(sequences), length, dtype=torch.bool)
    position_BS = torch.zeros(len(sequences), length, dtype=torch.int64)
    positions, targets = [], []
    for b, rows in enumerate(sequences):
        start = 0
        for row in rows:
            alone = collate([row], pad)
            end = start + alone.input_ids.shape[1]
            ids_BS[b, start:end], used_BS[b, start:end] = alone.input_ids[0], alone.used[0]
            position_BS[b, start:end] = torch.arange(end - start)
            positions.append(alone.position_A + b * length + start)
            targets.append(alone.target_A)
            start = end
        position_BS[b, start:] = torch.arange(length - start)
    return Tokens(ids_BS, used_BS, torch.cat(positions), torch.cat(targets), position_BS=position_BS)


class StepBatch(NamedTuple):
    """One optimiser step of one rank.

    micro: the rank's micro-batches; answer_tokens: of all ranks together, which the loss is divided by; used_tokens: of
    this rank, without padding.
    """

    micro: list[Tokens]
    answer_tokens: int
    used_tokens: int


def steps(
    examples: Sequence[Example],
    *,
    batch_size: int,
    micro_batches: int,
    rank: int,
    ranks: int,
    pad: int,
    seed: Sequence[int],
    first: int = 0,
    packed_length: int | None = None,
) -> Iterator[StepBatch]:
    """Yield a client's endless sequence of steps, as one of its ranks sees it.

    Rows are reshuffled in each pass over them. A step's rows are the same for any number of ranks and micro-batches, so
    that layouts can be compared, and packed or not. Step n does not depend on `first`.

    Args:
        examples: the client's rows.
        batch_size: rows of a step over all ranks; a multiple of ranks * micro_batches.
        micro_batches: gradient accumulation steps.
        rank, ranks: this rank's place in the client.
        pad: token id of padding.
        seed: of the order, such as (the experiment's seed, client number).
        first: number of the first step wanted.
        packed_length: most tokens of a sequence of several rows (packing.py); None: each row is a sequence.
    """
    step, epoch, current = first, -1, []
    while True:
        chosen = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            if row // len(examples) != epoch:
                epoch = row // len(examples)
                current = _order(len(examples), seed, epoch)
            chosen.append(examples[current[row % len(examples)]])
        mine = [m * ranks + rank for m in range(micro_batches)]
        micro = _micro_batches(chosen, mine, ranks * micro_batches, pad, packed_length)
        yield StepBatch(micro, sum(len(e.answer) for e in chosen), sum(int(t.used.sum()) for t in micro))
        step += 1


def _micro_batches(
    chosen: Sequence[Example], mine: Sequence[int], parts: int, pad: int, packed_length: int | None
) -> list[Tokens]:
    """Return those of the equally large parts of a step's rows that are this rank's, all of the same shape."""
    if packed_length is None:
        rows, length = len(chosen) // parts, max(map(len, chosen))
        return [collate(chosen[part * rows :][:rows], pad, length) for part in mine]
    shared = share_out([*map(len, chosen)], parts, packed_length)
    length = max(sum(len(chosen[row]) for row in rows) for part in shared for rows in part)
    return [collate_sequences([[chosen[row] for row in rows] for rows in shared[part]], pad, length) for part in mine]


def _order(count: int, seed: Sequence[int], epoch: int) -> list[int]:
    """Return the order of the rows in one pass over them."""
    generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


class PackedRow(NamedTuple):
    """A row's prompt and all its options in one sequence, so that the prompt is computed once.

    start: the prompt and the `common` tokens that all options begin with; options: the rest of each. The right option
    (`label`) includes the end-of-text token, so that the same pass gives the answer loss.
    """

    start: list[int]
    common: int
    options: list[list[int]]
    label: int
    cut: bool  # the prompt lost its beginning

    def __len__(self) -> int:
        """Return the number of tokens to run: the last token of an option is only predicted."""
        return len(self.start) + sum(len(option[:-1]) for option in self.options)

    @property
    def longest(self) -> int:
        """Return the tokens of the prompt with the longest option, as one text."""
        return len(self.start) + max(len(option[:-1]) for option in self.options)

    def parts(self) -> list[int]:
        """Return how many predicted tokens belong to the common part, and to each option."""
        return [self.common, *map(len, self.options)]


def pack(rows: Sequence[Row], tokenizer: Any, max_length: int, overlong: str = CUT_PROMPT) -> list[PackedRow | None]:
    """Tokenise rows with their answer written with each label; None for a row that is dropped (see `lengths.fit`)."""
    prompts = text_tokens([row["instruction"] + "\n" for row in rows], tokenizer, rows, "instruction")
    begin = beginning(tokenizer)
    return [
        _pack(row, begin, prompt, tokenizer, (max_length, overlong)) for row, prompt in zip(rows, prompts, strict=True)
    ]


def _pack(row: Row, begin: list[int], prompt: list[int], tokenizer: Any, limit: tuple[int, str]) -> PackedRow | None:
    label = row["label"]
    place = occurrences(row["labels"][label], row["answer"])[-1]
    head, tail = row["answer"][:place], row["answer"][place + len(row["labels"][label]) :]
    options = [head + name + tail for name in row["labels"]]
    encoded = text_tokens(options, tokenizer, [row] * len(options), "labels")
    encoded[label].append(tokenizer.eos_token_id)
    common = len(os.path.commonprefix(encoded))
    start = fit(begin, prompt, max(map(len, encoded)), *limit)
    if start is None:
        return None
    cut = len(start) < len(begin) + len(prompt)
    return PackedRow(start + encoded[label][:common], common, [option[common:] for option in encoded], label, cut)


def collate_packed(rows: Sequence[PackedRow], pad: int) -> Tokens:
    """Return a padded batch; targets are, row by row, the common tokens, then each option's (`PackedRow.parts`)."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad, dtype=torch.int64)
    branch = torch.zeros(len(rows), length, dtype=torch.int64)
    positions: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        end = len(row.start)
        ids[b, :end] = torch.tensor(row.start)
        last = b * length + end - 1  # the last token that all options see; it predicts the first token of each
        positions += range(last - row.common, last)  # common tokens are predicted once
        targets += row.start[end - row.common :]
        for number, option in enumerate(row.options, start=1):
            inputs = option[:-1]  # the last token is only predicted
            ids[b, end : end + len(inputs)] = torch.tensor(inputs, dtype=torch.int64)
            branch[b, end : end + len(inputs)] = number
            positions += [last, *range(b * length + end, b * length + end + len(inputs))][: len(option)]
            targets += option
            end += len(inputs)
    used = torch.arange(length) < torch.tensor([[len(row)] for row in rows])
    # if at most one option of each row has inputs, options cannot see each other: a plain causal mask is enough
    several = any(sum(len(option) > 1 for option in row.options) > 1 for row in rows)
    return Tokens(ids, used, torch.tensor(positions), torch.tensor(targets), branch if several else None)
