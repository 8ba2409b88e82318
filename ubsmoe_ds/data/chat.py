"""Turn conversations into tokens by a chat template, and prove which of them are the assistant's.

The rendered text is that of transformers' `apply_chat_template`. Characters are the assistant's where the template
marks them with {% generation %}; else from where the conversation so far ends, with the head of a new turn, to where it
ends with the turn. Both must be real beginnings of the whole text, or the row is refused. What a message says never
becomes a special token: a name such as `<|im_start|>` in it is tokenised as text.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from ubsmoe_ds.base.errors import RowError, UserError
from ubsmoe_ds.base.files import read_text
from ubsmoe_ds.data.schema import Row
from ubsmoe_ds.data.tokenizing import beginning, special_ids, special_names

MOST_BYTES = 2**18  # of a template; the longest of known models have 20 KB
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
# stand before and after text of a row that may read as a special token; of a plane that is for private use
BEFORE, AFTER = "\U000f0ad0", "\U000f0ad1"
# for models without a template of their own; a turn ends with end-of-text
PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
PLAINLY = (
    "note: the model has no chat template, so conversations are written as `### User:` and `### Assistant:` with "
    "end-of-text after each answer; data.chat_template names another"
)
Span = tuple[int, int]


class TurnTokens(NamedTuple):
    """Tokens of a rendered conversation, and which of them the loss is on."""

    ids: list[int]
    learned: list[bool]


def template_of(file: str | None, tokenizer: Any) -> tuple[str, bool]:
    """Return (the chat template of `data.chat_template`, else the tokenizer's, else a plain one; whether it is plain).

    Raises:
        UserError: if the file cannot be read.
    """
    if file is not None:
        try:
            return read_text(Path(file), MOST_BYTES), False
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"data.chat_template: {file!r} cannot be read ({reason}); name a jinja file") from error
    if tokenizer.chat_template:
        return tokenizer.get_chat_template(), False
    return ("{{ bos_token }}" if beginning(tokenizer) else "") + PLAIN, True


class ChatTemplate:
    """A chat template with its tokenizer.

    Args:
        tokenizer: the model's.
        template: the jinja text, see `template_of`.

    Raises:
        UserError: if the template is no jinja, is too long, or the tokenizer does not say where tokens are in a text.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template
        if len(template) > MOST_BYTES:
            raise UserError(f"data.chat_template: has more than {MOST_BYTES} characters; give a shorter one")
        if not tokenizer.is_fast:
            raise UserError(
                "model.path: the tokenizer has no tokenizer.json and does not say where its tokens are in a text, "
                "which conversations need; convert it to a fast one"
            )
        try:
            _compile_jinja_template(template)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"data.chat_template: line {error.lineno} is no jinja ({error.message})") from error
        self._is_marked = MARKED.search(template) is not None
        names = sorted(special_names(tokenizer), key=len, reverse=True)
        self._names, self._special = tuple(names), set(tokenizer.convert_tokens_to_ids(names))
        self._name = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._heads = {name[:n] for name in names for n in range(1, len(name))}
        self._tails = {name[n:] for name in names for n in range(1, len(name))}

    def tokens(self, rows: Sequence[Row]) -> Iterator[TurnTokens]:
        """Yield the tokens of each row.

        Raises:
            RowError: if the template refuses a row, does not show which characters are the assistant's, or a message
                holds a special token that the tokenizer cannot tell from text.
        """
        texts, spans = [], []
        for row in rows:
            text, marks = self.rendered(row)
            texts.append(text)
            spans.append(self._learned(row, text, marks))
        if not texts:
            return
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for row, text, learned, ids, places in zip(
            rows, texts, spans, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            ids, places = self._without_names_of_rows(row, text, ids, places)
            bears = [any(a < end and b > start for start, end in learned) for a, b in places]
            if not any(bears[1:]):
                raise self._unproved(row, "shows no text of it")
            yield TurnTokens(ids, bears)

    def rendered(self, row: Row) -> tuple[str, list[Span]]:
        """Return a row's text, and what the template marks in it with {% generation %}."""
        return self._of(row, row["messages"])

    def _of(self, row: Row, messages: Sequence[dict[str, str]], *, head: bool = False) -> tuple[str, list[Span]]:
        """Render some messages of a row, with the head of the assistant's next turn if asked for."""
        try:
            return self._render(messages, add_generation_prompt=head)
        except Exception as error:  # a template may raise anything, and quote what it was given
            said = str(error) if str(error) in self.template else type(error).__name__
            raise RowError(
                f"data: {_place(row)}: the chat template refuses {len(messages)} of its messages ({said}); correct the "
                "row, or set data.chat_template",
                row["messages"],
            ) from error

    def _render(self, messages: Sequence[dict[str, str]], **options: Any) -> tuple[str, list[Span]]:
        texts, marks = render_jinja_template(
            [list(messages)],
            chat_template=self.template,
            return_assistant_tokens_mask=self._is_marked,
            **self.tokenizer.special_tokens_map,
            **options,
        )
        return texts[0], marks[0] if self._is_marked else []

    # ---- which characters are learned

    def _learned(self, row: Row, text: str, marks: list[Span]) -> list[Span]:
        """Return the characters that the loss is on."""
        turns = [n for n, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        if not self._is_marked:
            return list(self._between_beginnings(row, text, [n for n in turns if n >= row["given"]]))
        left_out = sum(n < row["given"] for n in turns)
        if not marks or (left_out and len(marks) != len(turns)):
            raise self._unproved(row, f"marks {len(marks)} of its {len(turns)} assistant turns")
        return marks[left_out:]

    def _between_beginnings(self, row: Row, text: str, turns: Sequence[int]) -> Iterator[Span]:
        """Yield the characters between the text before each turn and the text with it."""
        messages, last = row["messages"], 0
        for turn in turns:
            before = self._of(row, messages[:turn], head=True)[0] if turn else ""
            whole = text if turn == len(messages) - 1 else self._of(row, messages[: turn + 1])[0]
            proved = turn and text.startswith(before) and text.startswith(whole) and last <= len(before) < len(whole)
            if not proved:
                raise self._unproved(row, f"renders its message {turn} otherwise at the end than in the whole")
            last = self._end(text[: len(whole)])
            yield len(before), last

    def _end(self, text: str) -> int:
        """Return where a turn ends: blanks after a special token that ends it are the template's."""
        short = text.rstrip()
        return len(short) if short.endswith(self._names) else len(text)

    def _unproved(self, row: Row, why: str) -> UserError:
        return RowError(
            f"data: {_place(row)}: the chat template does not show which text is the assistant's: it {why}; mark the "
            "turns with {% generation %} in a file for data.chat_template",
            row["messages"],
        )

    # ---- special tokens are the template's alone

    def _without_names_of_rows(
        self, row: Row, text: str, ids: list[int], places: list[Span]
    ) -> tuple[list[int], list[Span]]:
        """Return tokens and their places, with text of the row instead of special tokens that its messages spell."""
        marked = [dict(message, content=self._marked(message["content"])) for message in row["messages"]]
        if marked == row["messages"]:
            return ids, places
        edges = list(self._edges(row, text, marked))
        new_ids: list[int] = []
        new_places: list[Span] = []
        for token, (start, end) in zip(ids, places, strict=True):
            if token in self._special and self._is_of_row(edges, start, end):
                piece = self._as_text(row, text[start:end])
                new_ids += piece
                new_places += [(start, end)] * len(piece)
            else:
                new_ids.append(token)
                new_places.append((start, end))
        return new_ids, new_places

    def _marked(self, content: str) -> str:
        """Return a message's text with marks around names of special tokens, and at an edge that may be part of one.

        A template may take blanks off a message, so marks stand within them.
        """
        core = content.strip()
        longest = len(self._names[0]) if self._names else 0
        begins = any(core[:n] in self._tails for n in range(1, longest))
        begins = begins or 0 < len(core) < longest and any(core in name for name in self._names)
        ends = any(core[-n:] in self._heads for n in range(1, longest))
        if not (begins or ends or self._name.search(core)):
            return content
        lead, trail = content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :]
        inner = self._name.sub(f"{BEFORE}\\g<0>{AFTER}", core.replace(BEFORE, "").replace(AFTER, ""))
        return f"{lead}{BEFORE if begins else ''}{inner}{AFTER if ends else ''}{trail}"

    def _edges(self, row: Row, text: str, marked: list[dict[str, str]]) -> Iterator[tuple[int, str]]:
        """Yield the places of the marks in the text, each with its mark."""
        rendered, _ = self._of(row, marked)
        place = 0
        for character in rendered:
            if character in (BEFORE, AFTER):
                yield place, character
            else:
                place += 1
        if rendered.replace(BEFORE, "").replace(AFTER, "") != text:
            raise RowError(
                f"data: {_place(row)}: a message holds the name of a special token, and the chat template depends on "
                "what messages hold, so that the two cannot be told apart; take it out",
                row["messages"],
            )

    @staticmethod
    def _is_of_row(edges: Sequence[tuple[int, str]], start: int, end: int) -> bool:
        """Return whether a token at a place is a name between marks, or goes across one."""
        inside = any(start < place < end for place, _ in edges)
        return inside or ((start, BEFORE) in edges and (end, AFTER) in edges)

    def _as_text(self, row: Row, piece: str) -> list[int]:
        """Return the tokens of a special token's name as text."""
        encode = self.tokenizer
        line = encode("\n", add_special_tokens=False)["input_ids"]
        # after a newline, so that no blank is put before it, which some tokenizers do at the beginning of a text
        ids = encode("\n" + piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids[: len(line)] != line:
            ids = line + encode(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if not special_ids(self.tokenizer).isdisjoint(ids[len(line) :]):
            raise RowError(
                f"data: {_place(row)} holds {piece!r}, which the model's tokenizer reads as its special token and not "
                "as text; take it out",
                row["messages"],
            )
        return ids[len(line) :]


def _place(row: Row) -> str:
    return getattr(row, "place", "a row")
