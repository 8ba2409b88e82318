"""Messages to users are one line of bounded length."""

from ubsmoe_ds.base.errors import LONGEST, UserError


def test_control_characters_cannot_break_the_line():
    assert str(UserError("name: 'a\nb\x1b[2J\u2028é'")) == "name: 'a\\nb\\x1b[2J\\u2028é'"


def test_a_long_message_keeps_its_beginning_and_its_end():
    text = str(UserError("key: " + "x" * 10_000 + "; set it to 1"))
    assert text.startswith("key: xxx") and " ... " in text and text.endswith("xxx; set it to 1")
    assert len(text) <= LONGEST + len(" ... ")


def test_a_message_that_grows_by_escaping_stays_bounded():
    assert len(str(UserError("\x00" * LONGEST))) <= LONGEST + len(" ... ")
