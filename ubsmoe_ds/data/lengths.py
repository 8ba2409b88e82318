"""The one rule for rows that are too long, in training, evaluation and generation; and its lines for the user.

A row has at most `data.max_length` tokens: what the tokenizer puts first, the prompt, the answer (in evaluation the
longest option) and end-of-text. What happens to a longer row is `data.overlong`, and is counted:

    cut_prompt  the prompt loses its beginning; a row whose answer leaves no room for the last `LEAST_PROMPT` tokens of
                a cut prompt is dropped
    cut_end     a row to train on loses its end, so its end-of-text token is not learned; it is dropped if nothing of
                its answer is left. An evaluation row is dropped: a cut option would decide nothing
    drop        the row is dropped
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ubsmoe_ds.base.errors import UserError

LEAST_PROMPT = 16  # tokens that a cut prompt keeps; fewer would be hardly a question
CUT_PROMPT = "cut_prompt"
NAMED = 5  # rows that a line names


class Lengths(NamedTuple):
    """Count rows by length: kept, those of them that lost something (cut), and dropped."""

    kept: int
    cut: int
    dropped: int

    @property
    def rows(self) -> int:
        """Return the number of rows before any was dropped."""
        return self.kept + self.dropped


def fit(
    begin: list[int], prompt: list[int], answer: int, max_length: int, overlong: str = CUT_PROMPT
) -> list[int] | None:
    """Return the tokens before an answer, or None if the row is to be dropped.

    Args:
        begin: what the tokenizer puts before a text; never cut.
        prompt: tokens of the prompt.
        answer: number of tokens of the answer with end-of-text, or of the longest option.
        max_length: most tokens of all together.
        overlong: as `data.overlong`.
    """
    room = max_length - answer - len(begin)
    if len(prompt) <= room:
        return begin + prompt
    return begin + prompt[-room:] if overlong == CUT_PROMPT and room >= LEAST_PROMPT else None


def fit_row(
    begin: list[int], prompt: list[int], answer: list[int], max_length: int, overlong: str
) -> tuple[list[int], list[int]] | None:
    """Return the tokens before an answer, and those of the answer, of a row to train on; None if it is to be dropped.

    Args:
        begin, prompt: as in `fit`.
        answer: tokens of the answer with end-of-text.
        max_length, overlong: as in `fit`.
    """
    start = fit(begin, prompt, len(answer), max_length, overlong)
    if start is not None:
        return start, answer
    room = max_length - len(begin) - len(prompt)
    return (begin + prompt, answer[:room]) if overlong == "cut_end" and room > 0 else None


def length_lines(
    setting: str, kind: str, lengths: Lengths, cut_of: str = "", dropped_of: str = "", overlong: str = CUT_PROMPT
) -> Iterator[str]:
    """Yield a line for rows that were cut, and one for rows that were dropped, if any.

    Args:
        setting: the limit, such as "data.max_length=256".
        kind: "training" or "evaluation".
        lengths: of all rows of that kind.
        cut_of, dropped_of: whose or which they are, in brackets.
        overlong: as `data.overlong`.
    """
    if lengths.cut:
        lost = "prompts lose their beginning" if overlong == CUT_PROMPT else "rows lose their end"
        yield f"note: {setting}: {lengths.cut} of {lengths.rows} {kind} {lost}{cut_of}"
    if lengths.dropped:
        dropped = f"{lengths.dropped} of {lengths.rows} {kind} rows are dropped{dropped_of}"
        yield f"warning: {setting}: {dropped}: {_why_dropped(kind, overlong)}; raise it"


def _why_dropped(kind: str, overlong: str) -> str:
    """Return why rows of a kind are dropped."""
    if overlong == CUT_PROMPT:
        return f"their answers leave fewer than {LEAST_PROMPT} tokens for the prompt"
    if overlong == "cut_end" and kind == "training":
        return "their prompts leave no room for an answer"
    return f"they are longer (data.overlong={overlong})"


def nothing_fits(key: str, max_length: int, rows: str) -> UserError:
    """Return the error to raise where each of the `rows` is too long; `key` names the limit."""
    return UserError(f"{key}: {max_length} is too short for each of the {rows}; raise it")


def by_client(counts: Mapping[str, int]) -> str:
    """Return the counts above zero, such as " (phone 3, server 1)"."""
    parts = [f"{name} {count}" for name, count in counts.items() if count]
    return f" ({', '.join(parts)})" if parts else ""


def by_name(rows: Iterable[str]) -> str:
    """Return the first rows' ids, such as " ('q1', 'q7', ...)"."""
    names = list(map(repr, rows))
    return f" ({', '.join([*names[:NAMED], *(['...'] if len(names) > NAMED else [])])})" if names else ""
