"""Build token batches for training and evaluation. Loss and scores are on the tokens that a row has for that.

Rows are padded on the right to the longest row of the whole step, so that all ranks of a client, and all micro-batches
of a step, have equal token counts. Shapes: B rows, S positions, A answer positions.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.data.chat import ChatTemplate
from ubsmoe_ds.data.lengths import Lengths, fit
from ubsmoe_ds.data.row_tokens import RowTokens, row_tokens
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.tokenizing import beginning, text_tokens
from ubsmoe_ds.data.words import occurrences


class Tokens(NamedTuple):
    """A padded batch: input_ids [B, S] int64, used [B, S] bool, answer positions b * S + s [A], their targets [A].

    branch_BS: for rows with several continuations of one beginning, 0 in the beginning and n in the nth continuation,
    which attends to the beginning and itself; None where rows are plain texts.
    """

    input_ids: Tensor
    used: Tensor
    position_A: Tensor
    target_A: Tensor
    branch_BS: Tensor | None = None

    def to(self, device: torch.device) -> "Tokens":
        """Return the batch on another device."""
        return Tokens._make(None if part is None else part.to(device, non_blocking=True) for part in self)


@dataclass(frozen=True)
class Example:
    """One row's tokens: the prompt, then the answer, which ends with the end-of-text token or as a template has it.

    learned: which tokens of the answer bear loss, as other turns may stand between those of the assistant; None: all.
    """

    prompt: list[int]
    answer: list[int]
    learned: list[bool] | None = None

    def __len__(self) -> int:
        """Return the number of tokens to run: the last one is only predicted."""
        return len(self.prompt) + len(self.answer) - 1

    @property
    def places(self) -> list[int]:
        """Return the places in the answer of the tokens that bear loss."""
        if self.learned is None:
            return list(range(len(self.answer)))
        return [place for place, bears in enumerate(self.learned) if bears]


def encode(
    rows: Sequence[Row], tokenizer: Any, max_length: int, chat: ChatTemplate | None = None, train_on: str = "answers"
) -> tuple[list[Example], Lengths]:
    """Tokenise rows of at most `max_length` tokens each, by the rule of `lengths.fit`.

    Args:
        rows: of one form.
        tokenizer: the model's.
        max_length: most tokens of a row.
        chat: how conversations are written; None: the rows are none.
        train_on: as `data.train_on`.

    Returns:
        (examples of the rows that are kept, numbers of rows kept, cut and dropped).
    """
    found = encode_each(rows, tokenizer, max_length, chat, train_on)
    examples = [example for example, _ in found if example is not None]
    return examples, Lengths(len(examples), sum(cut for _, cut in found), len(rows) - len(examples))


def encode_each(
    rows: Sequence[Row], tokenizer: Any, max_length: int, chat: ChatTemplate | None = None, train_on: str = "answers"
) -> list[tuple[Example | None, bool]]:
    """Return of each row (its example, or None if it is dropped; whether it was cut); see `encode`."""
    found = [fitted(tokens, max_length) for tokens in row_tokens(rows, tokenizer, chat)]
    if train_on == "all":  # but the first token, which nothing predicts
        found = [(e and Example(e.prompt[:1], e.prompt[1:] + e.answer), cut) for e, cut in found]
    return found


def fitted(tokens: RowTokens, max_length: int) -> tuple[Example | None, bool]:
    """Return (the row cut to a length, or None if it is dropped; whether its prompt lost its beginning)."""
    begin, prompt, answer, learned = tokens
    start = fit(begin, prompt, len(answer), max_length)
    if start is None:
        return None, False
    return Example(start, answer, learned), len(start) < len(begin) + len(prompt)


def collate(examples: Sequence[Example], pad: int, length: int | None = None) -> Tokens:
    """Return a batch padded to `length` (default: the longest row).

    Targets are the tokens that bear loss, at the positions that predict them.
    """
    length = length or max(map(len, examples))
    ids = torch.full((len(examples), length), pad, dtype=torch.int64)
    used = torch.zeros(len(examples), length, dtype=torch.bool)
    positions: list[int] = []
    targets: list[int] = []
    for b, example in enumerate(examples):
        sequence = example.prompt + example.answer[:-1]
        ids[b, : len(sequence)] = torch.tensor(sequence)
        used[b, : len(sequence)] = True
        first = b * length + len(example.prompt) - 1
        positions.extend(first + place for place in example.places)
        targets.extend(example.answer[place] for place in example.places)
    return Tokens(ids, used, torch.tensor(positions), torch.tensor(targets))


def last_reply(example: Example) -> tuple[list[int], list[int]]:
    """Return (all tokens before an example's last answer, that answer), as a model is asked for it."""
    first = max((place for place in range(len(example.answer)) if not _bears(example, place)), default=-1) + 1
    return example.prompt + example.answer[:first], example.answer[first:]


def _bears(example: Example, place: int) -> bool:
    return example.learned is None or example.learned[place]


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
) -> Iterator[StepBatch]:
    """Yield a client's endless sequence of steps, as one of its ranks sees it.

    Rows are reshuffled in each pass over them. A step's rows are the same for any number of ranks and micro-batches, so
    that layouts can be compared. Step n does not depend on `first`.

    Args:
        examples: the client's rows.
        batch_size: rows of a step over all ranks; a multiple of ranks * micro_batches.
        micro_batches: gradient accumulation steps.
        rank, ranks: this rank's place in the client.
        pad: token id of padding.
        seed: of the order, such as (the experiment's seed, client number).
        first: number of the first step wanted.
    """
    micro_rows = batch_size // (ranks * micro_batches)
    step, epoch, current = first, -1, torch.empty(0, dtype=torch.int64)
    while True:
        numbers = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            if row // len(examples) != epoch:
                epoch = row // len(examples)
                current = _order(len(examples), seed, epoch)
            numbers.append(int(current[row % len(examples)]))
        chosen = _take(examples, numbers)
        length = max(map(len, chosen))
        parts = [chosen[(m * ranks + rank) * micro_rows :][:micro_rows] for m in range(micro_batches)]
        micro = [collate(part, pad, length) for part in parts]
        yield StepBatch(micro, sum(len(e.places) for e in chosen), sum(int(t.used.sum()) for t in micro))
        step += 1


def _take(examples: Sequence[Example], numbers: Sequence[int]) -> list[Example]:
    """Return the examples of these numbers; those of a file are tokenised together."""
    take = getattr(examples, "take", None)
    return take(numbers) if take is not None else [examples[number] for number in numbers]


def _order(count: int, seed: Sequence[int], epoch: int) -> Tensor:
    """Return the order of the rows in one pass over them, [count] int64."""
    generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
    return torch.randperm(count, generator=generator)


class PackedRow(NamedTuple):
    """A row's prompt and all its options in one sequence, so that the prompt is computed once.

    start: the prompt and the `common` tokens that all options begin with; options: the rest of each. The right option
    (`label`) includes the end-of-text token, so that the same pass gives the answer loss. A row without choices has one
    option, its answer.
    characters: of each whole option; learned: as in `Example`, of an answer.
    """

    start: list[int]
    common: int
    options: list[list[int]]
    label: int
    cut: bool  # the prompt lost its beginning
    characters: tuple[int, ...] = ()
    learned: list[bool] | None = None

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


def pack(
    rows: Sequence[Row], tokenizer: Any, max_length: int, chat: ChatTemplate | None = None
) -> list[PackedRow | None]:
    """Tokenise rows to be scored, questions with their answer written with each label; None: dropped (`lengths.fit`).

    Args:
        rows: of one form.
        tokenizer: the model's.
        max_length: most tokens of a prompt with any of its options.
        chat: how conversations are written; None: the rows are none.
    """
    if rows and "choices" not in rows[0]:
        answered = (fitted(tokens, max_length) for tokens in row_tokens(rows, tokenizer, chat))
        return [None if e is None else PackedRow(e.prompt, 0, [e.answer], 0, cut, (), e.learned) for e, cut in answered]
    prompts = text_tokens([row["instruction"] + "\n" for row in rows], tokenizer, rows, "instruction")
    begin = beginning(tokenizer)
    return [_pack(row, begin, prompt, tokenizer, max_length) for row, prompt in zip(rows, prompts, strict=True)]


def _pack(row: Row, begin: list[int], prompt: list[int], tokenizer: Any, max_length: int) -> PackedRow | None:
    label = row["label"]
    place = occurrences(row["labels"][label], row["answer"])[-1]
    head, tail = row["answer"][:place], row["answer"][place + len(row["labels"][label]) :]
    options = [head + name + tail for name in row["labels"]]
    encoded = text_tokens(options, tokenizer, [row] * len(options), "labels")
    encoded[label].append(tokenizer.eos_token_id)
    common = len(os.path.commonprefix(encoded))
    start = fit(begin, prompt, max(map(len, encoded)), max_length)
    if start is None:
        return None
    cut = len(start) < len(begin) + len(prompt)
    rest = [option[common:] for option in encoded]
    return PackedRow(start + encoded[label][:common], common, rest, label, cut, tuple(map(len, options)))


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
