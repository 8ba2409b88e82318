"""Tokenizers that cannot be used: what is wrong with them, and a remedy that fits."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.models.hub import BUILTIN_MODELS
from ubsmoe_ds.models.tokenizer import read_tokenizer

BUILTIN = BUILTIN_MODELS["builtin:tiny_olmoe"]


@pytest.fixture
def folder(tmp_path):
    for path in [*BUILTIN.glob("tokenizer*"), BUILTIN / "config.json"]:
        shutil.copy(path, tmp_path)
    return tmp_path


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        read_tokenizer(folder, 10**6)
    return str(error.value)


def test_padding_is_chosen_where_there_is_none(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert read_tokenizer(folder, 10**6).pad_token_id is not None


def test_a_folder_without_a_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer; put tokenizer.json and tokenizer_config.json" in refusal(folder)


def test_a_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "has no usable tokenizer (" in refusal(folder)
    assert refusal(folder).endswith("correct or replace tokenizer.json, tokenizer_config.json")


def test_a_tokenizer_that_needs_another_package(folder, monkeypatch):
    def needs(*_, **__):
        raise ImportError("needs the package sentencepiece")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", needs)
    assert refusal(folder).endswith("(needs the package sentencepiece); install what it asks for")


def test_a_tokenizer_of_another_model(folder):
    with pytest.raises(UserError, match=r"has \d+ tokens, the model 3; it belongs to another model"):
        read_tokenizer(folder, 3)
