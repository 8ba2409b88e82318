"""Token batches for training and evaluation. Loss and scores are on answer tokens only.

Shapes: B rows, S positions, A answer positions. Rows are padded on the right to the longest row of the whole step, so
that all ranks of a client, and all micro-batches of a step, have equal token counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ubsmoe_ds.data.sources import Row


class Tokens(NamedTuple):
    """A padded batch: input_ids [B, S] int64, used [B, S] bool, answer positions b * S + s [A], their targets [A]."""

    input_ids: Tensor
    used: Tensor
    position_A: Tensor
    target_A: Tensor

    def to(self, device: torch.device) -> "Tokens":
        """The same batch on another device."""
        return Tokens(*(part.to(device, non_blocking=True) for part in self))


@dataclass(frozen=True)
class Example:
    """One row's tokens: the prompt, then the answer, which ends with the end-of-text token."""

    prompt: list[int]
    answer: list[int]


def encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> tuple[list[Example], int]:
    """Tokenise rows; a prompt that does not fit loses its beginning.

    Returns:
        (examples, number of rows that were cut).
    """
    if not rows:
        return [], 0
    prompts = tokenizer([row["instruction"] + "\n" for row in rows], add_special_tokens=False)["input_ids"]
    replies = tokenizer([row["answer"] for row in rows], add_special_tokens=False)["input_ids"]
    found, cut = [], 0
    for prompt, reply in zip(prompts, replies, strict=True):
        answer = [*reply, tokenizer.eos_token_id]
        room = max(1, max_length - len(answer))
        cut += len(prompt) > room
        found.append(Example(prompt[-room:], answer))
    return found, cut


def collate(examples: Sequence[Example], pad: int, length: int | None = None) -> Tokens:
    """Pad to `length` (default: the longest); targets are the answer tokens, at the positions that predict them."""
    length = length or max(len(e.prompt) + len(e.answer) - 1 for e in examples)
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


class StepBatch(NamedTuple):
    """One optimiser step of one rank.

    micro: the rank's micro-batches; answer_tokens: of all ranks together, which the loss is divided by;
    used_tokens: of this rank, without padding.
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
    """The client's endless sequence of steps, as one of its ranks sees it.

    Rows are reshuffled in each pass over them; a step's rows are the same for any number of ranks and micro-batches,
    so that layouts can be compared. Step n is the same whenever it is asked for.

    Args:
        examples: the client's rows.
        batch_size: rows of a step, over all ranks; a multiple of ranks * micro_batches.
        micro_batches: gradient accumulation steps.
        rank, ranks: this rank's place in the client.
        pad: token id of padding.
        seed: of the order, such as (experiment's seed, client number).
        first: number of the first step wanted.
    """

    def order(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(hash((*seed, epoch)) % 2**63)
        return torch.randperm(len(examples), generator=generator).tolist()

    micro_rows = batch_size // (ranks * micro_batches)
    step, epoch, current = first, -1, []
    while True:
        chosen = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            if row // len(examples) != epoch:
                epoch = row // len(examples)
                current = order(epoch)
            chosen.append(examples[current[row % len(examples)]])
        length = max(len(e.prompt) + len(e.answer) - 1 for e in chosen)
        mine = [chosen[(m * ranks + rank) * micro_rows :][:micro_rows] for m in range(micro_batches)]
        micro = [collate(part, pad, length) for part in mine]
        yield StepBatch(micro, sum(len(e.answer) for e in chosen), sum(int(t.used.sum()) for t in micro))
        step += 1


class Candidate(NamedTuple):
    """One scored sequence of a row: shared tokens, then several possible last tokens, one for each of `options`.

    Options that differ in their last token only share one sequence; the score of an option is the log-probability of
    its own answer tokens, exactly as if each were run alone. The sequence that holds the right option has it first and
    goes on to the end-of-text token (`end`), so that the same pass gives the answer loss.
    """

    row: int
    prompt: list[int]
    shared: list[int]
    last: list[int]
    options: list[int]
    end: list[int]
    cut: bool  # the prompt lost its beginning

    def example(self) -> Example:
        """The tokens to run: through the first of `last`, and the end if there is one."""
        return Example(self.prompt, [*self.shared, self.last[0], *self.end])


def candidates(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[list[Candidate]]:
    """For each row its options (its answer with every label in turn), grouped by all their tokens but the last."""
    prompts = tokenizer([row["instruction"] + "\n" for row in rows], add_special_tokens=False)["input_ids"]
    return [
        _row_candidates(number, row, prompt, tokenizer, max_length)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
    ]


def _row_candidates(number: int, row: Row, prompt: list[int], tokenizer: Any, max_length: int) -> list[Candidate]:
    head, _, tail = row["answer"].rpartition(row["labels"][row["label"]])
    encoded = tokenizer([head + label + tail for label in row["labels"]], add_special_tokens=False)["input_ids"]
    right_first = sorted(range(len(encoded)), key=lambda option: option != row["label"])
    groups: dict[tuple[int, ...], list[int]] = {}
    for option in right_first:
        groups.setdefault(tuple(encoded[option][:-1]), []).append(option)
    found = []
    for shared, options in groups.items():
        end = [tokenizer.eos_token_id] if options[0] == row["label"] else []
        room = max(1, max_length - len(shared) - 1 - len(end))
        last = [encoded[option][-1] for option in options]
        found.append(Candidate(number, prompt[-room:], list(shared), last, options, end, cut=len(prompt) > room))
    return found
