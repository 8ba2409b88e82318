"""Turn the texts of rows into tokens. A row is text: special tokens come from the program or a template alone."""

from collections.abc import Sequence
from typing import Any

from ubsmoe_ds.base.errors import RowError
from ubsmoe_ds.data.schema import Row, place_of


def beginning(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text: its beginning-of-text token (Llama, Mixtral), or nothing."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def text_tokens(texts: Sequence[str], tokenizer: Any, rows: Sequence[Row], field: str) -> list[list[int]]:
    """Tokenise texts without adding anything; a special token's name in a text, such as `</s>`, is tokenised as text.

    Args:
        texts: made of the rows, one of each.
        tokenizer: the model's.
        rows, field: name the text in messages.

    Raises:
        RowError: if the tokenizer reads such a name as the special token even so (Unigram and word-level vocabularies
            that list it among the words).
    """
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = special_ids(tokenizer)
    for row, text, tokens in zip(rows, texts, ids, strict=True):
        if not special.isdisjoint(tokens):
            name = tokenizer.convert_ids_to_tokens(next(token for token in tokens if token in special))
            raise RowError(
                f"data: {place_of(row, field)} holds {name!r}, which the model's tokenizer reads as its special token "
                "and not as text; take it out",
                text,
            )
    return list(ids)


def special_names(tokenizer: Any) -> set[str]:
    """Return the names of all special tokens, those of the vocabulary's end among them."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return (added | set(tokenizer.all_special_tokens)) - {""}


def special_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that no text may become; unknown words are text, and padding is never looked at."""
    harmless = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    return set(tokenizer.all_special_ids) - harmless
