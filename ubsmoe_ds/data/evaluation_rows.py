"""Turn evaluation rows into tokens: a question with all its options in one sequence, any other row with its answer.

Shapes: B rows, S positions, A answer positions.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ubsmoe_ds.data.batches import Tokens, split_last_reply
from ubsmoe_ds.data.chat import ChatTemplate
from ubsmoe_ds.data.lengths import CUT_PROMPT, fit
from ubsmoe_ds.data.row_tokens import RowTokens, row_tokens
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.tokenizing import beginning, text_tokens
from ubsmoe_ds.data.words import occurrences


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
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int,
    chat: ChatTemplate | None = None,
    overlong: str = CUT_PROMPT,
) -> list[PackedRow | None]:
    """Tokenise rows to be scored, questions with their answer written with each label; None: dropped (`lengths.fit`).

    Args:
        rows: of one form.
        tokenizer: the model's.
        max_length: most tokens of a prompt with any of its options.
        chat: how conversations are written; None: the rows are none.
        overlong: as `data.overlong`.
    """
    if rows and "choices" not in rows[0]:
        return [_whole(tokens, max_length, overlong) for tokens in row_tokens(rows, tokenizer, chat)]
    prompts = text_tokens([row["instruction"] + "\n" for row in rows], tokenizer, rows, "instruction")
    begin = beginning(tokenizer)
    return [
        _pack(row, begin, prompt, tokenizer, (max_length, overlong)) for row, prompt in zip(rows, prompts, strict=True)
    ]


def _whole(tokens: RowTokens, max_length: int, overlong: str) -> PackedRow | None:
    """Return a row without choices to be scored: its answer is never cut."""
    begin, prompt, answer, learned = tokens
    start = fit(begin, prompt, len(answer), max_length, overlong)
    if start is None:
        return None
    return PackedRow(start, 0, [answer], 0, len(start) < len(begin) + len(prompt), (), learned)


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


def asked(row: PackedRow) -> tuple[list[int], list[int]]:
    """Return (the prompt of an evaluation row, its right answer), as a model is asked for it."""
    end = len(row.start) - row.common
    return split_last_reply(row.start[:end], row.start[end:] + row.options[row.label], row.learned)
