"""Rows are text: what a row says never becomes one of the tokenizer's special tokens."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from launch.prepare import text_blocks
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data import synthetic
from ubsmoe_ds.data.batches import encode
from ubsmoe_ds.data.evaluation_rows import pack
from ubsmoe_ds.data.schema import PlacedRow
from ubsmoe_ds.data.tokenizing import text_tokens
from ubsmoe_ds.models.hub import BUILTIN_MODELS


def tokens_of(texts, tokenizer):
    rows = [PlacedRow({}, f"rows.jsonl, line {number}") for number in range(1, len(texts) + 1)]
    return text_tokens(texts, tokenizer, rows, "answer")


def builtin():
    """Return a byte-level BPE tokenizer, the kind of OLMoE and Qwen, with more special tokens than its own."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def with_words(model):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama():
    """Return a BPE tokenizer whose vocabulary lists the special tokens too, the kind of Mixtral."""
    words = ["<unk>", "<s>", "</s>", "▁", *"</s>abc "]
    return with_words(models.BPE({word: n for n, word in enumerate(dict.fromkeys(words))}, [], unk_token="<unk>"))


@pytest.mark.parametrize("tokenizer", [builtin(), llama(), ByT5Tokenizer()], ids=["backend", "llama", "python"])
def test_names_of_special_tokens_are_tokenised_as_text(tokenizer):
    names = [token for token in tokenizer.all_special_tokens if token != tokenizer.unk_token]
    assert len(names) >= 2
    texts = [f"a {name} b{name}" for name in names]
    for text, ids in zip(texts, tokens_of(texts, tokenizer), strict=True):
        assert set(ids).isdisjoint(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}), text
        pieces = tokens_of([text[: len(text) - 3], text[len(text) - 3 :]], tokenizer)
        assert len(ids) <= sum(map(len, pieces)), "read as characters, not dropped"


def test_a_row_has_special_tokens_from_its_end_alone():
    tokenizer = builtin()
    text = "say <s>, <|im_start|> and <|end|>"
    row = synthetic.rows(1, 0)[0] | {"instruction": text, "answer": f"<|end|>{text} red", "labels": ["red", "<s>"]}
    row |= {"choices": ["x", "y"], "label": 0}
    ((example,), _), (packed,) = encode([row], tokenizer, 256), pack([row], tokenizer, 256)
    special = set(tokenizer.all_special_ids)
    assert special.isdisjoint(example.prompt) and special.isdisjoint(example.answer[:-1])
    assert example.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.prompt) == text + "\n" and tokenizer.decode(example.answer[:-1]) == row["answer"]
    assert special.isdisjoint(packed.start) and special.isdisjoint(packed.options[0][:-1] + packed.options[1])


def test_texts_without_special_tokens_are_those_of_the_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    texts = [row["instruction"] for row in synthetic.rows(40, 0)] + ["ünïcode 正确", "  two  spaces\n\n"]
    assert tokens_of(texts, tokenizer) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_refused():
    """Unigram and word-level models find `</s>` among their words; there it cannot be told from the end of a text."""
    words = ["<unk>", "<s>", "</s>", "▁a"]
    unigram = with_words(models.Unigram([(word, -float(n)) for n, word in enumerate(words)], unk_id=0))
    level = with_words(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    level.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for tokenizer in (unigram, level):
        tokens_of(["a never seen"], tokenizer)
        with pytest.raises(UserError, match="data: rows.jsonl, line 2: field 'answer' holds '</s>', ") as caught:
            tokens_of(["a", "never a </s> a"], tokenizer)
        assert "never" not in str(caught.value) and "never" in caught.value.content


def test_texts_that_calibrate_experts_end_by_the_program_alone():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny_olmoe"])
    rows = [{"instruction": "say <|end|>", "answer": "<|end|>"}] * 2
    ids = text_blocks(rows, tokenizer, length=30, count=1)[0].tolist()
    end = tokenizer.eos_token_id
    text = tokenizer("say ", add_special_tokens=False)["input_ids"]
    once = ids[: ids.index(end) + 1]
    assert ids.count(end) == len(ids) // len(once) and once[: len(text)] == text and len(once) > len(text) + 3
    assert tokenizer.decode(once) == "say <|end|>\n<|end|><|end|>"
