"""Turn rows of every form into tokens: what comes before the answer, the answer, and which tokens of it bear loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from ubsmoe_ds.data.chat import ChatTemplate
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.tokenizing import beginning, text_tokens


class RowTokens(NamedTuple):
    """A row's tokens, before any is cut.

    begin: what stands before the prompt and is never cut; learned: which tokens of the answer bear loss; None: all.
    """

    begin: list[int]
    prompt: list[int]
    answer: list[int]
    learned: list[bool] | None = None


def row_tokens(rows: Sequence[Row], tokenizer: Any, chat: ChatTemplate | None) -> list[RowTokens]:
    """Return the tokens of rows of one form; the answer is all from the first learned token to the last.

    A text or completion ends with the end-of-text token, as does an answer to a question with choices; a conversation
    as its template ends it.

    Args:
        rows: of one form, see formats.py.
        tokenizer: the model's.
        chat: how conversations are written; None: the rows are none.

    Raises:
        RowError: naming the place of a row that cannot be told in tokens.
    """
    if not rows:
        return []
    if "messages" in rows[0]:
        assert chat is not None
        return [_of_turns(ids, learned, tokenizer) for ids, learned in chat.tokens(rows)]
    begin, end = beginning(tokenizer), [tokenizer.eos_token_id]
    if "choices" in rows[0]:
        prompts = text_tokens([row["instruction"] + "\n" for row in rows], tokenizer, rows, "instruction")
        replies = text_tokens([row["answer"] for row in rows], tokenizer, rows, "answer")
        return [RowTokens(begin, prompt, reply + end) for prompt, reply in zip(prompts, replies, strict=True)]
    prompts = text_tokens([row["prompt"] for row in rows], tokenizer, rows, "prompt")
    replies = text_tokens([row["completion"] for row in rows], tokenizer, rows, "completion")
    return [_of_texts(begin, prompt, reply + end) for prompt, reply in zip(prompts, replies, strict=True)]


def _of_texts(begin: list[int], prompt: list[int], answer: list[int]) -> RowTokens:
    """Return the tokens of a completion; a token without one before it is predicted by nothing."""
    return RowTokens(begin, prompt, answer) if begin or prompt else RowTokens([], answer[:1], answer[1:])


def _of_turns(ids: list[int], learned: list[bool], tokenizer: Any) -> RowTokens:
    """Return the tokens of a conversation; what comes after its last learned token is of no use."""
    begin = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    first = max(learned.index(True), 1)
    last = len(learned) - learned[::-1].index(True)
    mask = learned[first:last]
    return RowTokens(begin, ids[len(begin) : first], ids[first:last], None if all(mask) else mask)
