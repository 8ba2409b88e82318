"""Build token batches for training and evaluation. Loss and scores are on the tokens that a row has for that.

Rows are padded on the right to the longest row of the whole step, so that all ranks of a client, and all micro-batches
of a step, have equal token counts. Shapes: B rows, S positions, A answer positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.data.chat import ChatTemplate
from ubsmoe_ds.data.lengths import CUT_PROMPT, Lengths, fit_row
from ubsmoe_ds.data.packing import share_out
from ubsmoe_ds.data.row_tokens import RowTokens, row_tokens
from ubsmoe_ds.data.schema import Row


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
        """Return the batch on a device: itself for the CPU, else a copy from pinned memory that nothing waits for."""
        if device.type == "cpu":
            return self
        return Tokens._make(p if p is None else p.pin_memory().to(device, non_blocking=True) for p in self)


@dataclass(frozen=True)
class Example:
    """One row's tokens: the prompt, then the answer, which ends as its row does unless its end is cut.

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
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    chat: ChatTemplate | None = None,
    train_on: str = "answers",
    overlong: str = CUT_PROMPT,
) -> tuple[list[Example], Lengths]:
    """Tokenise rows of at most `max_length` tokens each, by the rule of `lengths.fit_row`.

    Args:
        rows: of one form.
        tokenizer: the model's.
        max_length: most tokens of a row.
        chat: how conversations are written; None: the rows are none.
        train_on: as `data.train_on`.

    Returns:
        (examples of the rows that are kept, numbers of rows kept, cut and dropped).
    """
    found = encode_each(rows, tokenizer, max_length, chat, train_on, overlong)
    examples = [example for example, _ in found if example is not None]
    return examples, Lengths(len(examples), sum(cut for _, cut in found), len(rows) - len(examples))


def encode_each(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    chat: ChatTemplate | None = None,
    train_on: str = "answers",
    overlong: str = CUT_PROMPT,
) -> list[tuple[Example | None, bool]]:
    """Return of each row (its example, or None if it is dropped; whether it lost something); see `encode`."""
    found = [_fitted(tokens, max_length, overlong) for tokens in row_tokens(rows, tokenizer, chat)]
    if train_on == "all":  # but the first token, which nothing predicts
        found = [(e and Example(e.prompt[:1], e.prompt[1:] + e.answer), cut) for e, cut in found]
    return found


def _fitted(tokens: RowTokens, max_length: int, overlong: str) -> tuple[Example | None, bool]:
    """Return (the row to train on, or None if it is dropped; whether it lost something)."""
    begin, prompt, answer, learned = tokens
    parts = fit_row(begin, prompt, answer, max_length, overlong)
    if parts is None:
        return None, False
    start, answer = parts
    learned = None if learned is None else learned[: len(answer)]
    return Example(start, answer, learned), len(start) + len(answer) < len(begin) + len(prompt) + len(tokens.answer)


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


def last_reply(example: Example) -> tuple[list[int], list[int]]:
    """Return (all tokens before an example's last answer, that answer), as a model is asked for it."""
    return split_last_reply(example.prompt, example.answer, example.learned)


def split_last_reply(
    prompt: list[int], answer: list[int], learned: Sequence[bool] | None
) -> tuple[list[int], list[int]]:
    """Move what comes before the last learned stretch of an answer to the prompt."""
    between = [place for place, bears in enumerate(learned or ()) if not bears]
    first = between[-1] + 1 if between else 0
    return prompt + answer[:first], answer[first:]


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
    step, epoch, current = first, -1, torch.empty(0, dtype=torch.int64)
    while True:
        numbers = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            if row // len(examples) != epoch:
                epoch = row // len(examples)
                current = _order(len(examples), seed, epoch)
            numbers.append(int(current[row % len(examples)]))
        chosen = _take(examples, numbers)
        mine = [m * ranks + rank for m in range(micro_batches)]
        micro = _micro_batches(chosen, mine, ranks * micro_batches, pad, packed_length)
        yield StepBatch(micro, sum(len(e.places) for e in chosen), sum(int(t.used.sum()) for t in micro))
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


def _take(examples: Sequence[Example], numbers: Sequence[int]) -> list[Example]:
    """Return the examples of these numbers; those of a file are tokenised together."""
    take = getattr(examples, "take", None)
    return take(numbers) if take is not None else [examples[number] for number in numbers]


def _order(count: int, seed: Sequence[int], epoch: int) -> Tensor:
    """Return the order of the rows in one pass over them, [count] int64."""
    generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
    return torch.randperm(count, generator=generator)
