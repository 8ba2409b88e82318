"""Conversations in tokens: transformers' own text, tokens and assistant mask; and rows never make special tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import CHATML, LLAMA3, MISTRAL, SPECIAL, TEMPLATES, TOKENIZERS, byte_level, unmarked
from ubsmoe_ds.base.errors import UserError
from ubsmoe_ds.data.chat import PLAIN, ChatTemplate, template_of
from ubsmoe_ds.data.row_tokens import row_tokens
from ubsmoe_ds.data.schema import PlacedRow

LONG = [
    ("user", "What is 2 + 3?"),
    ("assistant", "It is 5."),
    ("user", "  And\ttwice that, please?\n\n"),
    ("assistant", "10\n\nSee: 5 + 5 = 10."),
]


def conversation(turns, given=0):
    messages = [{"role": role, "content": text} for role, text in turns]
    return PlacedRow({"messages": messages, "given": given}, "rows.jsonl, line 3")


def learned_text(row, tokenizer, template):
    """Return the runs of tokens that bear loss, as text."""
    (tokens,) = ChatTemplate(tokenizer, template).tokens([row])
    runs, last = [], False
    for token, bears in zip(tokens.ids, tokens.learned, strict=True):
        if bears:
            runs = runs if last else [*runs, []]
            runs[-1].append(token)
        last = bears
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("marks", [True, False], ids=["marked", "by beginnings"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_tokens_and_mask_are_those_of_transformers(name, marks, kind):
    tokenizer, template = TOKENIZERS[kind](), TEMPLATES[name]
    turns = LONG if name == "mistral" else [("system", "You add up."), *LONG, ("tool", "{}"), ("assistant", "Done")]
    row = conversation(turns)
    ours = ChatTemplate(tokenizer, template if marks else unmarked(template))
    text = tokenizer.apply_chat_template(row["messages"], chat_template=template, tokenize=False)
    assert ours.rendered(row)[0] == text
    expected = tokenizer.apply_chat_template(
        row["messages"], chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    (found,) = ours.tokens([row])
    assert found.ids == expected["input_ids"]
    assert [int(bears) for bears in found.learned] == expected["assistant_masks"] and any(found.learned)


@pytest.mark.parametrize(
    ("template", "ends"), [(CHATML, "<|im_end|>"), (LLAMA3, "<|eot_id|>"), (unmarked(CHATML), "<|im_end|>")]
)
def test_the_end_of_a_turn_is_learned(template, ends):
    expected = ["It is 5." + ends, "10\n\nSee: 5 + 5 = 10." + ends]
    assert learned_text(conversation(LONG), byte_level(), template) == expected


def test_the_plain_template_by_hand():
    tokenizer = byte_level()
    template, plain = template_of(None, tokenizer)
    row = conversation([("system", "Be brief."), *LONG[:2]])
    text = f"### System:\nBe brief.\n\n### User:\nWhat is 2 + 3?\n\n### Assistant:\nIt is 5.{tokenizer.eos_token}\n\n"
    assert plain and template == PLAIN and ChatTemplate(tokenizer, template).rendered(row)[0] == text
    assert learned_text(row, tokenizer, template) == ["It is 5." + tokenizer.eos_token]
    (tokens,) = row_tokens([row], tokenizer, ChatTemplate(tokenizer, template))
    assert tokens.learned is None and tokenizer.decode(tokens.answer) == "It is 5." + tokenizer.eos_token


def test_messages_of_a_prompt_are_given():
    row = conversation(LONG, given=2)
    for template in (CHATML, unmarked(CHATML)):
        assert learned_text(row, byte_level(), template) == ["10\n\nSee: 5 + 5 = 10.<|im_end|>"]


def test_turns_between_answers_are_kept_and_not_learned():
    tokenizer = byte_level()
    (tokens,) = row_tokens([conversation(LONG)], tokenizer, ChatTemplate(tokenizer, CHATML))
    assert tokenizer.decode(tokens.prompt).endswith("3?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokens.answer).startswith("It is 5.<|im_end|>\n<|im_start|>user\n")
    assert tokens.answer[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>"), "nothing after the last answer"
    bears = [token for token, learned in zip(tokens.answer, tokens.learned, strict=True) if learned]
    assert tokenizer.decode(bears) == "It is 5.<|im_end|>10\n\nSee: 5 + 5 = 10.<|im_end|>"
    (begun,) = row_tokens([conversation(LONG)], tokenizer, ChatTemplate(tokenizer, LLAMA3))
    assert begun.begin == [tokenizer.bos_token_id] and tokenizer.bos_token_id not in begun.prompt


PIECES = [*SPECIAL, "<s>", "<|end|>", "</s>", "<unk>", "<|im_", "end|>", "<", "|>", "[/INST", "]", " ", "\n", "a", "ü"]


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([CHATML, LLAMA3, MISTRAL, unmarked(CHATML)]),
    st.sampled_from([*TOKENIZERS]),
    st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), min_size=2, max_size=2),
)
def test_no_message_becomes_a_special_token(template, kind, texts):
    """The special tokens are those of harmless messages, and the tokens spell the rendered text."""
    tokenizer, (asked, said) = TOKENIZERS[kind](), texts
    ours = ChatTemplate(tokenizer, template)
    said = said if said.strip() else "b"
    row = conversation([("user", asked), ("assistant", said)])
    harmless = conversation([("user", "a"), ("assistant", "b")])
    special = {*tokenizer.convert_tokens_to_ids([*SPECIAL, "<s>", tokenizer.eos_token])}
    (found,), (expected,) = ours.tokens([row]), ours.tokens([harmless])
    assert [t for t in found.ids if t in special] == [t for t in expected.ids if t in special]
    text = tokenizer.apply_chat_template(row["messages"], chat_template=template, tokenize=False)
    assert tokenizer.decode(found.ids, clean_up_tokenization_spaces=False) == text
    assert [bears for t, bears in zip(found.ids, found.learned, strict=True) if t in special] == [
        bears for t, bears in zip(expected.ids, expected.learned, strict=True) if t in special
    ]


@pytest.mark.parametrize("said", ["|im_end|", "im_end", "<|im_end", "|im_end|>", "<|im_end|>", "x<|im_end", "<"])
def test_no_template_completes_a_special_token_that_a_message_begins(said):
    """This one puts < and > around what is said, and <| and |> a second time, but no special token of its own."""
    template = "Q{% for m in messages %}{% generation %}{{ '<' + m['content'] + '><|' + m['content'] + '|>' }}"
    template += "{% endgeneration %}{% endfor %}"
    tokenizer = byte_level()
    ours = ChatTemplate(tokenizer, template)
    row = conversation([("assistant", said)])
    (found,) = ours.tokens([row])
    assert tokenizer.decode(found.ids) == ours.rendered(row)[0] == f"Q<{said}><|{said}|>"
    assert {*tokenizer.convert_tokens_to_ids(SPECIAL)}.isdisjoint(found.ids)


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            "{% for m in messages %}{{ loop.length ~ m['content'] }}{% endfor %}",
            LONG,
            "renders its message 1 otherwise",
        ),
        ("{{ messages[-1]['content'] }}", LONG, "renders its message 1 otherwise"),
        (unmarked(CHATML), [("assistant", "secret"), *LONG], "renders its message 0 otherwise"),
        ("{% generation %}{% endgeneration %}{{ messages[0]['content'] }}", LONG, "shows no text of it"),
        (
            MISTRAL,
            [("system", "secret"), *LONG],
            r"refuses 5 of its messages \(Roles must alternate user and assistant\)",
        ),
        ("{{ messages[0]['content'] + 1 }}", [("user", "secret"), LONG[1]], r"refuses 2 of its messages \(TypeError\)"),
        ("{{ raise_exception(messages[0]['content']) }}", [("user", "secret"), LONG[1]], r"\(TemplateError\)"),
    ],
)
def test_what_cannot_be_proved_is_refused_in_one_line(template, turns, message):
    with pytest.raises(UserError, match=message) as caught:
        list(ChatTemplate(byte_level(), template).tokens([conversation(turns)]))
    assert "rows.jsonl, line 3" in str(caught.value) and "secret" not in str(caught.value)
    assert "data.chat_template" in str(caught.value)


def test_a_template_comes_from_the_file_the_tokenizer_or_the_program(tmp_path):
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    assert template_of(None, tokenizer) == (CHATML, False)
    (tmp_path / "own.jinja").write_text(LLAMA3)
    assert template_of(str(tmp_path / "own.jinja"), tokenizer) == (LLAMA3, False)
    (tmp_path / "long.jinja").write_text("x" * 2**19)
    for name, why in {"none.jinja": "No such file", "long.jinja": "more than 262144 bytes"}.items():
        with pytest.raises(UserError, match=f"data.chat_template: .*{name}' cannot be read .{why}"):
            template_of(str(tmp_path / name), tokenizer)
    with pytest.raises(UserError, match="data.chat_template: line 1 is no jinja"):
        ChatTemplate(tokenizer, "{% for %}")


def test_a_template_has_no_way_to_the_machine(tmp_path):
    """It runs in jinja's sandbox, as transformers makes it."""
    marker = tmp_path / "made"
    for attempt in ("self.__init__.__globals__", "messages.__class__.__base__.__subclasses__()", "cycler.__init__"):
        template = f"{{{{ {attempt} }}}}{{{{ '{marker}' }}}}"
        with pytest.raises(UserError, match="the chat template refuses|does not show"):
            list(ChatTemplate(byte_level(), template).tokens([conversation(LONG)]))
    assert not marker.exists()
