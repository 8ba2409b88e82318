"""Read the tokenizer of a model folder."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ubsmoe_ds.base.errors import UserError

FILES = ("tokenizer*", "*.model", "vocab.*", "merges.txt")  # of a tokenizer, in one format or another


def read_tokenizer(folder: Path, vocabulary: int) -> Any:
    """Return the folder's tokenizer, with a padding token; no code of the folder is run.

    Args:
        folder: the model's.
        vocabulary: number of tokens that the model knows.

    Raises:
        UserError: if it is missing or cannot be used with the model.
    """
    files = sorted({path.name for pattern in FILES for path in folder.glob(pattern)})
    if not files:  # of some families transformers would make a tokenizer that knows no word
        raise UserError(
            f"model.path: {str(folder)!r} has no tokenizer; put tokenizer.json and tokenizer_config.json of the model "
            "there that it was made from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # there are readers of many formats, which raise anything
        raise _unusable(folder, files, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model.path: the tokenizer in {str(folder)!r} has no end-of-text token; set eos_token")
    if len(tokenizer) > vocabulary:
        raise UserError(
            f"model.path: the tokenizer in {str(folder)!r} has {len(tokenizer)} tokens, the model {vocabulary}; "
            "it belongs to another model"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so its id does not matter
    return tokenizer


def _unusable(folder: Path, files: list[str], error: Exception) -> UserError:
    """Return the error to raise where transformers made no tokenizer of the folder's files."""
    remedy = "install what it asks for" if isinstance(error, ImportError) else f"correct or replace {', '.join(files)}"
    reason = " ".join(str(error).split())[:200]
    return UserError(f"model.path: {str(folder)!r} has no usable tokenizer ({reason}); {remedy}")
